"""ExecEnv: where a job runs. What a recipe and a `Run` need from a simulation, a local deployment or real sites."""

from __future__ import annotations

from abc import ABC, abstractmethod

from flarebus.job.definition import JobDefinition

__all__ = ["ExecEnv"]


class ExecEnv(ABC):
    """An environment that takes jobs. All methods may be called from any thread."""

    @abstractmethod
    def deploy(self, job: JobDefinition) -> str:
        """Start `job` and return its id at once, without waiting for it to end.

        Raises:
            ConfigError: the job does not fit this environment; nothing was started.
        """

    @abstractmethod
    def get_job_status(self, job_id: str) -> str | None:
        """`running`, `completed`, `failed`, `aborted`, or None where nothing is known."""

    @abstractmethod
    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str | None:
        """Wait for the end of the job, at most `timeout` seconds, or as long as it takes if that is 0.

        Returns:
            The folder that the job left, failed jobs included; None when it has not ended in time.
        """

    @abstractmethod
    def abort_job(self, job_id: str) -> None:
        """Ask the job to end; returns before it has. Nothing happens if it has ended already."""

    @abstractmethod
    def stop(self, clean_up: bool = False) -> None:
        """Give back what the environment holds for jobs that have ended. May be called often.

        Args:
            clean_up: remove what the environment made for itself, too.
        """

    def get_job_reason(self, job_id: str) -> str | None:
        """Why the job failed or who aborted it; None when there is nothing to say."""
        return None
