"""The trainer's side of a script that runs in a process of its own."""

__all__: list[str] = []
