"""Tasks on their way: who has answered, what is fetched. The same for whoever steers, server or site."""

__all__: list[str] = []
