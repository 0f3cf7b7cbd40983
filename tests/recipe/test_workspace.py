"""The run folder: where it is, who may use it, what is removed from it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import flarebus
from flarebus.errors import ConfigError
from flarebus.recipe.workspace import ROOT_VARIABLE, RunFolder, default_root

HOLDER = """
import sys
from pathlib import Path
from flarebus.recipe.workspace import RunFolder
folder = RunFolder.open(Path(sys.argv[1]), "job", ["site-1"])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "deep" / "root"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_default_root_is_in_the_users_cache(monkeypatch, tmp_path):
    """Without a word from anybody, runs go to the cache folder of the user, never to a shared one."""
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root() == tmp_path / "xdg" / "flarebus" / "simulation"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == tmp_path / ".cache" / "flarebus" / "simulation"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_root() == tmp_path / "Library" / "Caches" / "flarebus" / "simulation"


def test_environment_variable_replaces_the_default(monkeypatch, tmp_path):
    """The environment variable decides where the default is."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "here"))

    assert default_root() == tmp_path / "here"


def test_new_folders_are_private(root):
    """What is made is for the user only, parents included; what exists keeps its mode."""
    before = _mode(root.parent.parent)

    folder = RunFolder.open(root, "job", ["site-1"])

    assert [_mode(path) for path in (root.parent, root, folder.path)] == [0o700] * 3
    assert _mode(root / "job.lock") == 0o600
    assert _mode(root.parent.parent) == before
    folder.close()


def test_old_run_is_emptied_of_its_own_entries_only(root):
    """Of the old run the folders of server and sites go, sites that are no more included; the rest stays."""
    RunFolder.open(root, "job", ["site-1", "site-2"]).close()
    for name in ("server", "site-1", "site-2", "mine"):
        root.joinpath("job", name, "deep").mkdir(parents=True)
    root.joinpath("job", "notes.txt").write_text("keep")

    RunFolder.open(root, "job", ["site-1"]).close()

    assert sorted(path.name for path in root.joinpath("job").iterdir()) == ["mine", "notes.txt", "run.json"]
    assert json.loads(root.joinpath("job", "run.json").read_text())["entries"] == ["server", "site-1"]


def test_entry_that_is_a_link_is_removed_as_a_link(root, tmp_path):
    """Emptying never follows a link out of the folder."""
    RunFolder.open(root, "job", ["site-1"]).close()
    tmp_path.joinpath("data").mkdir()
    tmp_path.joinpath("data", "precious").write_text("")
    root.joinpath("job", "site-1").symlink_to(tmp_path / "data")

    RunFolder.open(root, "job", ["site-1"]).close()

    assert tmp_path.joinpath("data", "precious").exists()
    assert not root.joinpath("job", "site-1").exists()


@pytest.mark.parametrize("mark", [None, "", "[]", '{"entries": ["../data"]}', '{"entries": 3}'])
def test_folder_of_somebody_else_is_refused(root, mark):
    """A folder that no run made, or whose mark is not sound, is left as it is."""
    root.joinpath("job", "server").mkdir(parents=True)
    if mark is not None:
        root.joinpath("job", "run.json").write_text(mark)

    with pytest.raises(ConfigError, match=r"was not made by a run; use another name"):
        RunFolder.open(root, "job", ["site-1"])

    assert root.joinpath("job", "server").is_dir()


def test_empty_folder_is_taken(root):
    """A folder that is there and empty is as good as none."""
    root.joinpath("job").mkdir(parents=True)

    RunFolder.open(root, "job", []).close()

    assert root.joinpath("job", "run.json").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_name_taken_by_something_else_is_refused(root, tmp_path, kind):
    """A run folder is a folder of its own, not a file and not a link to elsewhere."""
    root.mkdir(parents=True)
    if kind == "file":
        root.joinpath("job").write_text("")
    else:
        root.joinpath("job").symlink_to(tmp_path)

    with pytest.raises(ConfigError, match="is a link or a file"):
        RunFolder.open(root, "job", [])


def test_live_run_of_another_process_is_refused_by_its_pid(root):
    """Two processes never write to one folder: the second one is told who has it and what to do."""
    command = [sys.executable, "-c", HOLDER, str(root)]
    environment = os.environ | {"PYTHONPATH": str(Path(flarebus.__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        root.joinpath("job", "server").mkdir()

        with pytest.raises(ConfigError, match="use another name or workspace_root") as caught:
            RunFolder.open(root, "job", ["site-1"])

        assert f"process {holder.pid} " in str(caught.value)
        assert root.joinpath("job", "server").is_dir()
        other = RunFolder.open(root, "job2", ["site-1"])
        other.close()
        holder.kill()

    # The lock of a killed process is gone with it.
    RunFolder.open(root, "job", ["site-1"]).close()


def test_second_run_in_one_process_is_refused_until_the_first_is_closed(root):
    """The lock holds inside one process too, and closing twice is no mistake."""
    first = RunFolder.open(root, "job", [])
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        RunFolder.open(root, "job", [])

    first.close()
    second = RunFolder.open(root, "job", [])
    first.close()

    with pytest.raises(ConfigError, match="is running"):
        RunFolder.open(root, "job", [])
    second.close()


def test_folder_is_free_for_whoever_closed_it_though_another_thread_does_the_same(root, monkeypatch):
    """Who closes while another thread is about to give the lock back returns when that is done, not before."""
    folder = RunFolder.open(root, "job", [])
    other = threading.Thread(target=folder.close)
    waited = []
    close = os.close

    def slow(lock):
        monkeypatch.undo()
        other.start()
        other.join(0.1)
        waited.append(other.is_alive())
        close(lock)

    monkeypatch.setattr(os, "close", slow)
    folder.close()
    other.join()

    assert waited == [True]
    RunFolder.open(root, "job", []).close()


def test_refused_folder_is_not_left_locked(root):
    """After a refusal the name is free again."""
    root.joinpath("job", "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not made by a run"):
        RunFolder.open(root, "job", [])
    root.joinpath("job", "mine").rmdir()

    RunFolder.open(root, "job", []).close()


def test_root_that_cannot_be_written_says_so(tmp_path):
    """A root that cannot be made names itself, the cause, and how to choose another one."""
    tmp_path.joinpath("file").write_text("")

    with pytest.raises(ConfigError, match=rf"workspace_root=.*cannot write there.*{ROOT_VARIABLE}"):
        RunFolder.open(tmp_path / "file" / "root", "job", [])


def test_disk_error_says_so(root, monkeypatch):
    """A full disk is the user's to solve, not a traceback."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "run.json")

    monkeypatch.setattr(Path, "write_text", full)

    with pytest.raises(ConfigError, match="No space left on device"):
        RunFolder.open(root, "job", [])


def test_name_cannot_leave_the_root(root):
    """A job's name is checked before it becomes a path."""
    with pytest.raises(ConfigError, match=r"^name="):
        RunFolder.open(root, "../job", [])
