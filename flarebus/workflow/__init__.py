"""What a workflow implements and what it may call: controllers, means, selection."""

__all__: list[str] = []
