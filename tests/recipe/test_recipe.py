"""What all recipes do: start, execute, export on request."""

from __future__ import annotations

import sys

import pytest

from flarebus.errors import ConfigError, JobAborted, JobFailed
from flarebus.recipe import FedAvgRecipe, Recipe


def test_start_returns_at_once(make, env):
    """`start` deploys the definition and does not wait."""
    recipe = make()

    run = recipe.start(env)

    assert (run.get_job_id(), run.get_status()) == ("job-1", "running")
    assert env.jobs == [recipe.definition]


def test_execute_waits_for_the_end(make, env):
    """`execute` returns a run that has ended, and keeps the folders."""
    env.end("completed")

    run = make().execute(env)

    assert run.get_result() == "/runs/job-1"
    assert env.calls == ["deploy", "result", "status", "stop False"]


def test_failed_job_raises_with_reason_and_folder(make, env):
    """A job that fails is an error that says why and where to look."""
    env.end("failed", "round 1: 0 usable results, 1 needed")

    with pytest.raises(JobFailed, match="0 usable results") as caught:
        make().execute(env)

    assert caught.value.run_dir == "/runs/job-1"


@pytest.mark.parametrize("reason", ["user", "aborted by user"])
def test_aborted_job_raises_by_whom(make, env, reason):
    """A job that was aborted is an error that says by whom, once."""
    env.end("aborted", reason)

    with pytest.raises(JobAborted, match=r"^aborted by user$"):
        make().execute(env)


def test_end_that_cannot_be_seen_is_no_success(make, env, monkeypatch):
    """When the environment breaks while the job runs, `execute` does not pass for a success."""

    def broken(job_id: str, timeout: float = 0.0) -> str | None:
        raise OSError("gone")

    monkeypatch.setattr(env, "get_job_result", broken)

    with pytest.raises(JobFailed, match="could not be seen"):
        make().execute(env)


def test_interrupt_aborts_waits_and_passes_on(make, env, monkeypatch):
    """Ctrl-C ends the job in an orderly way before it reaches the caller."""
    asked = env.get_job_result

    def interrupted(job_id: str, timeout: float = 0.0) -> str | None:
        monkeypatch.setattr(env, "get_job_result", asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "get_job_result", interrupted)

    with pytest.raises(KeyboardInterrupt):
        make().execute(env)

    assert env.calls == ["deploy", "abort", "result", "status", "stop False", "stop False"]


def test_second_interrupt_does_not_wait(make, env, monkeypatch):
    """A second Ctrl-C cuts the orderly end short, and the environment is stopped all the same."""

    def interrupted(job_id: str, timeout: float = 0.0) -> str | None:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "get_job_result", interrupted)

    with pytest.raises(KeyboardInterrupt):
        make().execute(env)

    assert env.calls == ["deploy", "abort", "stop False"]


@pytest.mark.parametrize("env", [None, "sim", object()])
def test_needs_an_environment(make, env):
    """What is no environment is refused by name."""
    with pytest.raises(ConfigError, match=r"^env="):
        make().start(env)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--export"], "fl_job"),
        (["--export", "--export-dir", "out"], "out"),
        (["--rounds", "3", "--export-dir=out/deep", "--export"], "out/deep"),
    ],
)
def test_export_on_request_of_the_command_line(make, env, monkeypatch, tmp_path, capsys, arguments, folder):
    """With `--export` the job is written, nothing runs, and the process ends well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    recipe = make()

    with pytest.raises(SystemExit) as caught:
        recipe.execute(env)

    assert caught.value.code == 0
    assert env.calls == []
    assert str(tmp_path / folder) in capsys.readouterr().out
    assert FedAvgRecipe.load(tmp_path / folder) == recipe
    assert sys.argv == ["job.py", *arguments]


def test_export_folder_must_be_named(make, env, monkeypatch):
    """`--export-dir` without a folder is a mistake, not a default."""
    monkeypatch.setattr(sys, "argv", ["job.py", "--export", "--export-dir"])

    with pytest.raises(ConfigError, match="--export-dir"):
        make().execute(env)


def test_loading_as_another_recipe_is_refused(make, tmp_path):
    """A job is read back only by its own recipe, or by `Recipe`."""

    class OtherRecipe(Recipe):
        workflow = "other"

        @classmethod
        def _parameters_of(cls, job):
            return {}

    target = make().export(tmp_path / "job")
    try:
        with pytest.raises(ConfigError, match=r"not a job of OtherRecipe; use FedAvgRecipe\.load"):
            OtherRecipe.load(target)
    finally:
        Recipe._by_workflow.pop("other")


def test_subclass_with_defaults_reads_its_own_kind(make, tmp_path):
    """A subclass that only adds defaults loads as itself, and equals the plain recipe of the same job."""

    class MyRecipe(FedAvgRecipe):
        pass

    target = make().export(tmp_path / "job")

    assert type(MyRecipe.load(target)) is MyRecipe
    assert type(Recipe.load(target)) is FedAvgRecipe
    assert MyRecipe.load(target) == make()


def test_recipe_is_compared_with_recipes_only(make):
    """A recipe equals no other thing and is not hashable: arrays and files take part."""
    assert make() != "fedavg"
    with pytest.raises(TypeError, match="unhashable"):
        hash(make())
