"""The site side of a job: hosts that run training scripts by turns."""

__all__: list[str] = []
