"""Run: asks its environment, keeps the end, survives a broken environment, and may be used from many threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flarebus.recipe import Run


@pytest.mark.parametrize(("env_given", "job_id"), [(False, "job-1"), (True, ""), (True, None)])
def test_needs_environment_and_id(env, env_given, job_id):
    """Without an environment or an id there is no run."""
    with pytest.raises(ValueError, match=r"exec_env|job_id"):
        Run(env if env_given else None, job_id)


def test_status_is_asked_until_the_end_and_then_kept(env):
    """Status and result are those of the end, and the environment is stopped once and not asked again."""
    run = Run(env, "job-1")
    assert run.get_status() == "running"
    env.end("completed")

    results = [run.get_result(clean_up=False), run.get_result()]

    env.state = "forgotten"
    assert run.get_job_id() == "job-1"
    assert results == ["/runs/job-1"] * 2
    assert run.get_status() == "completed"
    assert env.calls == ["status", "result", "status", "stop False"]


def test_timeout_gives_none_and_changes_nothing(env):
    """A wait that is too short ends with None; the run goes on and can be waited for again."""
    run = Run(env, "job-1")

    assert run.get_result(timeout=0.001) is None
    assert run.get_status() == "running"

    env.end("failed")
    assert run.get_result() == "/runs/job-1"
    assert env.calls.count("stop True") == 1


def test_abort_gets_through_while_another_thread_waits(env):
    """Waiting holds no lock: an abort ends the wait."""
    run = Run(env, "job-1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run.get_result)
        assert env.waiting.acquire(timeout=10)

        run.abort()

        assert waiting.result(timeout=10) == "/runs/job-1"
    assert run.get_status() == "aborted"


def test_abort_after_the_end_does_nothing(env):
    """Once the end has been seen, abort does not reach the environment."""
    run = Run(env, "job-1")
    env.end("completed")
    run.get_result()

    run.abort()

    assert "abort" not in env.calls


def test_many_threads_settle_once(env):
    """However many threads wait, all get the same answer and the environment is stopped once."""
    run = Run(env, "job-1")
    start = threading.Barrier(8)

    def wait() -> str | None:
        start.wait(10)
        return run.get_result()

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(wait) for _ in range(8)]
        assert all(env.waiting.acquire(timeout=10) for _ in range(8))
        env.end("completed")

        assert {each.result(timeout=10) for each in waiting} == {"/runs/job-1"}
    assert env.calls.count("stop True") == 1


def test_broken_environment_is_logged_and_answered_with_none(env, caplog):
    """Errors of the environment do not reach the caller, and can be read in the log."""
    run = Run(env, "job-1")
    env.broken = True

    assert run.get_status() is None
    assert run.get_result() is None
    run.abort()

    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "cannot get the status of job job-1",
        "cannot get the result of job job-1",
        "cannot abort job job-1",
    ]
    assert all("the environment is broken" in str(record.exc_info) for record in caplog.records)


def test_error_is_not_kept(env):
    """After an error the environment is asked again."""
    run = Run(env, "job-1")
    env.broken = True
    run.get_result()
    env.broken = False
    env.end("completed")

    assert run.get_result() == "/runs/job-1"
