"""The server side of a job: the job itself, its archive, and simulations of whole federations."""

__all__: list[str] = []
