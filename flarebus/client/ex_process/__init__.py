"""The Client API in a process of its own: a trainer that its client job launched, or that somebody else started."""

__all__: list[str] = []
