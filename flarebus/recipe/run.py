"""Run: the handle on one job in one environment."""

from __future__ import annotations

import logging
import threading

from flarebus.recipe.env import ExecEnv

__all__ = ["Run"]

_log = logging.getLogger(__name__)


class Run:
    """A job that runs or has run. Thread-safe.

    Errors of the environment are logged and answered with None: a notebook cell that asks how things are does not
    end with a traceback. Once `get_result` has seen the end, status and result are kept and nobody is asked again.

    Args:
        exec_env: where the job runs.
        job_id: its id there.

    Raises:
        ValueError: `exec_env` is None or `job_id` is empty.
    """

    def __init__(self, exec_env: ExecEnv, job_id: str) -> None:
        if exec_env is None:
            raise ValueError("exec_env is None: a run needs the environment that its job runs in")
        if not job_id:
            raise ValueError(f"job_id={job_id!r}: a run needs the id that deploy() returned")
        self.exec_env = exec_env
        self._job_id = job_id
        # Guards what follows, and is never held while waiting for the job: abort() must get through.
        self._lock = threading.Lock()
        self._ended = False
        self._status: str | None = None
        self._result: str | None = None

    def get_job_id(self) -> str:
        """The id of the job."""
        return self._job_id

    def get_status(self) -> str | None:
        """`running`, `completed`, `failed` or `aborted`; None when it cannot be found out."""
        with self._lock:
            if self._ended:
                return self._status
        try:
            return self.exec_env.get_job_status(self._job_id)
        except Exception:
            _log.exception("cannot get the status of job %s", self._job_id)
            return None

    def get_result(self, timeout: float = 0.0, clean_up: bool = True) -> str | None:
        """Wait for the end of the job, then let go of the environment.

        Args:
            timeout: seconds to wait; 0 for as long as it takes. After a timeout everything goes on as before, and
                this may be called again.
            clean_up: let the environment remove what it made for itself. A simulation keeps its run folder anyway.

        Returns:
            The folder that the job left, or None when it has not ended in time or on an error.
        """
        with self._lock:
            if self._ended:
                return self._result
        try:
            result = self.exec_env.get_job_result(self._job_id, timeout)
        except Exception:
            _log.exception("cannot get the result of job %s", self._job_id)
            return None
        if result is None:
            return None
        return self._settle(result, clean_up)

    def abort(self) -> None:
        """Ask the job to end; nothing happens once `get_result` has seen it end."""
        with self._lock:
            if self._ended:
                return
        try:
            self.exec_env.abort_job(self._job_id)
        except Exception:
            _log.exception("cannot abort job %s", self._job_id)

    def _settle(self, result: str, clean_up: bool) -> str | None:
        """Keep how it ended, once, whoever of several waiting threads comes first."""
        with self._lock:
            if self._ended:
                return self._result
            try:
                self._status = self.exec_env.get_job_status(self._job_id)
            except Exception:
                _log.exception("cannot get the status of job %s", self._job_id)
            self._result = result
            self._ended = True
            try:
                self.exec_env.stop(clean_up=clean_up)
            except Exception:
                _log.exception("cannot stop the environment of job %s", self._job_id)
            return self._result
