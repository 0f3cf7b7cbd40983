"""Archive: what a job leaves on disk, round by round, and when the disk fails it."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from flarebus.errors import ConfigError
from flarebus.job import checkpoint
from flarebus.job.journal import CommittedRound, Journal
from flarebus.job.kinds import FrameworkType
from flarebus.job.model_ref import ModelRef
from flarebus.job.site_config import SiteConfig
from flarebus.job.tensor_file import save_params
from flarebus.server import archive as server_archive
from flarebus.server.archive import Archive
from tests.server.played import LIMIT_S, a_job

GLOBAL, BEST = "FL_global_model.safetensors", "best_FL_global_model.safetensors"


def model(value: float) -> dict[str, Any]:
    return {"w": np.full(1000, value, np.float32)}


def begun(folder: Path, framework: FrameworkType = FrameworkType.NUMPY, **changes: Any) -> Archive:
    """An archive in a folder; the job begins with a model of ones below zero."""
    job = a_job(site_defaults=SiteConfig("client.py", framework=framework), **changes)
    return Archive(folder, job, model(-1))


def do_round(archive: Archive, number: int, best: bool = False, **metrics: Any) -> dict[str, Any]:
    """One round as a workflow does it: the new model is written to the pages; its weights are the number."""
    archive.sites_done({"a": {"loss": number}}, {"b": "boom"})
    params = archive.pages(archive.current_params())
    params["w"][:] = number
    archive.commit(number, params, metrics, best)
    return params


def value_of(path: Path) -> float:
    (value,) = set(safetensors.numpy.load_file(path)["w"].tolist())
    return float(value)


def models(folder: Path) -> dict[str, float]:
    return {path.name: value_of(path) for path in (folder / "models").glob("*.safetensors")}


def journal_of(folder: Path) -> tuple[list[CommittedRound], tuple[str, str | None]]:
    journal = Journal(folder / "rounds.sqlite")
    found = journal.rows(), journal.state()
    journal.close()
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- what is there


def test_a_round_leaves_a_model_a_row_and_a_line(tmp_path: Path) -> None:
    """Once a round is durable its model, its row and its line of metrics say the same, of all its broadcasts."""
    archive = begun(tmp_path)
    do_round(archive, 0, loss=0.5, many=np.arange(3))
    archive.sites_done({"c": {}}, {"a": "too late", "b": "boom"})
    do_round(archive, 1, loss=math.nan)
    archive.pages(model(0))

    rows, state = journal_of(tmp_path)
    assert [(row.number, row.accepted) for row in rows] == [(0, ["a"]), (1, ["a", "c"])]
    assert [row.metrics for row in rows] == [{"loss": 0.5, "many": "[0 1 2]"}, {"loss": None}]
    assert state == ("running", None)
    assert value_of(tmp_path / "models" / GLOBAL) == value_of(tmp_path / "models" / rows[1].model) == 1
    assert value_of(tmp_path / "models" / rows[0].model) == 0
    found = lines(tmp_path / "metrics.jsonl")
    assert [line.pop("seconds") >= 0 for line in found] == [True, True]
    assert found[0] == {
        "round": 0,
        "metrics": {"loss": 0.5, "many": "[0 1 2]"},
        "sites": {"a": {"loss": 0}},
        "accepted": ["a"],
        "refused": {"b": "boom"},
    }
    assert found[1]["metrics"] == {"loss": None}
    assert (found[1]["sites"], found[1]["refused"]) == ({"a": {"loss": 1}, "c": {}}, {"b": "boom"})
    archive.close("completed", None)


def test_the_committed_model_begins_the_next_round(tmp_path: Path) -> None:
    """The model is served from the pages of its file; facts about the round are at hand at once."""
    archive = begun(tmp_path)
    assert archive.current_params()["w"][0] == -1
    params = do_round(archive, 0)

    assert archive.current_params() is params
    assert archive.last_round_facts["model_path"] == str(tmp_path / "models" / "model-1.safetensors")
    assert archive.last_round_facts["seconds"] >= 0
    assert archive.pages(params)["w"] is not params["w"]
    archive.close("completed", None)


@pytest.mark.parametrize("state", ["completed", "failed", "aborted"])
def test_at_the_end_there_are_plain_files(tmp_path: Path, state: str) -> None:
    """However a job ends, its last committed model and its best one are left, and nothing half done."""
    archive = begun(tmp_path)
    do_round(archive, 0, best=True)
    do_round(archive, 1, best=True)
    do_round(archive, 2)
    archive.pages(model(0))["w"][:] = 77
    archive.close(state, "the reason")

    assert models(tmp_path) == {GLOBAL: 2, BEST: 0}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted([GLOBAL, BEST])
    assert not any(path.is_symlink() for path in (tmp_path / "models").iterdir())
    assert journal_of(tmp_path)[1] == (state, "the reason")
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_a_job_without_a_round_leaves_no_model(tmp_path: Path) -> None:
    """A job that fails in its first round says so and has no model to show."""
    archive = begun(tmp_path)
    archive.pages(model(0))
    archive.close("failed", "no site answered")

    assert models(tmp_path) == {}
    assert journal_of(tmp_path) == ([], ("failed", "no site answered"))
    assert lines(tmp_path / "metrics.jsonl") == []


def test_the_model_the_job_came_with_may_be_the_best(tmp_path: Path) -> None:
    """A best model of the first round is the initial one."""
    archive = begun(tmp_path)
    do_round(archive, 0, best=True)
    archive.close("completed", None)

    assert models(tmp_path) == {GLOBAL: 0, BEST: -1}


def test_for_pytorch_there_are_state_dicts(tmp_path: Path) -> None:
    """A PyTorch job also leaves its models as files that `torch.load` reads, under the name that was chosen."""
    archive = begun(tmp_path, FrameworkType.PYTORCH, best_model_filename="mine.pt")
    do_round(archive, 0, best=True)
    do_round(archive, 1)
    archive.close("failed", "later")

    folder = tmp_path / "models"
    assert {path.name for path in folder.iterdir()} == {
        GLOBAL,
        "FL_global_model.pt",
        "mine.safetensors",
        "mine.pt",
    }
    for name, value in (("FL_global_model.pt", 1.0), ("mine.pt", -1.0)):
        state = torch.load(folder / name, weights_only=True)
        assert state["w"].dtype == torch.float32
        assert state["w"].tolist() == [value] * 1000


def test_an_archive_knows_where_to_go_on(tmp_path: Path) -> None:
    """Rounds that a journal holds are not run again."""
    archive = begun(tmp_path)
    assert archive.next_round == 0
    do_round(archive, 0)
    archive.close("failed", "a crash")

    again = begun(tmp_path)
    assert again.next_round == 1
    again.close("completed", None)


# --- metrics of sites


def test_records_of_sites_are_lines(tmp_path: Path) -> None:
    """What scripts log is kept beside the metrics of the rounds."""
    archive = begun(tmp_path)
    archive.site_records([{"site": "a", "value": math.nan}, {"site": "a", "value": 1}])
    archive.site_records([{"site": "b", "value": np.zeros((1, 2))}])
    archive.close("completed", None)

    found = lines(tmp_path / "site_metrics.jsonl")
    assert found == [{"site": "a", "value": None}, {"site": "a", "value": 1}, {"site": "b", "value": [[0.0, 0.0]]}]


# --- when the disk fails


def test_the_disk_works_while_the_next_round_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit returns before it is durable; no row stands before that, and no page is given out for writing."""
    reached, ready, sync = threading.Event(), threading.Event(), checkpoint.CheckpointStore.sync

    def slow(store: checkpoint.CheckpointStore) -> None:
        reached.set()
        assert ready.wait(LIMIT_S)
        sync(store)

    monkeypatch.setattr(checkpoint.CheckpointStore, "sync", slow)
    archive = begun(tmp_path)
    do_round(archive, 0)
    assert reached.wait(LIMIT_S)
    assert archive.next_round == 0
    asking = threading.Thread(target=lambda: archive.pages(model(0)))
    asking.start()
    asking.join(0.01)
    assert asking.is_alive()

    ready.set()
    asking.join(LIMIT_S)
    assert archive.next_round == 1
    archive.close("completed", None)


FAULTS = {
    "file": ("flarebus.job.tensor_file.MappedFile.sync", full),
    "links": ("flarebus.job.checkpoint.CheckpointStore._link", full),
    "folder": ("flarebus.job.checkpoint.sync_folder", full),
    "row": ("flarebus.job.journal.Journal.commit", full),
}


@pytest.mark.parametrize("next_call", ["pages", "commit", "close"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_that_cannot_be_made_durable_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, next_call: str
) -> None:
    """A full disk surfaces at the next call; model, journal and metrics are those of the round before."""
    archive = begun(tmp_path)
    do_round(archive, 0, best=True)
    archive.pages(model(0))
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        params = do_round(archive, 1)
        assert archive._committing is not None
        assert isinstance(archive._committing.exception(LIMIT_S), OSError)
    calls = {"pages": (params,), "commit": (2, params, {}, False), "close": ("completed", None)}
    with pytest.raises(OSError, match="No space left"):
        getattr(archive, next_call)(*calls[next_call])
    if next_call != "close":
        archive.close("failed", "No space left on device")

    assert models(tmp_path) == {GLOBAL: 0, BEST: -1}
    rows, (state, reason) = journal_of(tmp_path)
    assert [row.number for row in rows] == [0]
    assert state == "failed"
    assert "No space left" in (reason or "")
    assert [line["round"] for line in lines(tmp_path / "metrics.jsonl")] == [0]


def test_a_first_round_that_cannot_be_made_durable_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If not even the first round could be committed there is no model, and no dangling link."""
    archive = begun(tmp_path)
    monkeypatch.setattr(*FAULTS["row"])
    do_round(archive, 0)
    with pytest.raises(OSError, match="No space left"):
        archive.close("completed", None)

    assert models(tmp_path) == {}
    assert list((tmp_path / "models").iterdir()) == []
    assert journal_of(tmp_path)[0] == []


def test_a_line_that_cannot_be_written_is_an_error_of_a_committed_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row decides: a round whose metrics could not be noted is committed all the same, and the error is told."""
    archive = begun(tmp_path)
    do_round(archive, 0)
    archive.pages(model(0))
    monkeypatch.setattr(server_archive, "append_metrics", full)
    do_round(archive, 1)
    with pytest.raises(OSError, match="No space left"):
        archive.close("completed", None)

    assert models(tmp_path) == {GLOBAL: 1}
    assert [row.number for row in journal_of(tmp_path)[0]] == [0, 1]


def test_everything_is_let_go_though_the_end_cannot_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the journal refuses the end the models are there as plain files nevertheless."""
    archive = begun(tmp_path)
    do_round(archive, 0)
    monkeypatch.setattr(Journal, "end", full)
    with pytest.raises(OSError, match="No space left"):
        archive.close("completed", None)

    assert models(tmp_path) == {GLOBAL: 0}
    assert not (tmp_path / "models" / GLOBAL).is_symlink()


# --- models for evaluation


def weights_of(archive: Archive) -> dict[str, list[float]]:
    """The first array of each model."""
    return {name: next(iter(params.values()))[:3].tolist() for name, params in archive.models().items()}


def test_models_are_the_last_and_the_best_by_the_names_of_their_files(tmp_path: Path) -> None:
    """As far as there are any."""
    archive = begun(tmp_path)
    assert weights_of(archive) == {}
    do_round(archive, 0)
    assert weights_of(archive) == {GLOBAL: [0.0] * 3}
    do_round(archive, 1, best=True)
    do_round(archive, 2)

    assert weights_of(archive) == {GLOBAL: [2.0] * 3, BEST: [0.0] * 3}
    archive.close("completed", None)
    assert models(tmp_path) == {GLOBAL: 2.0, BEST: 0.0}


def test_models_that_the_job_brings_lie_in_no_memory(tmp_path: Path) -> None:
    """Whatever their format; of a file that this takes nothing is left. With PyTorch the others have its suffix."""
    np.save(tmp_path / "a.npy", np.arange(3.0))
    save_params({"w": np.arange(4.0)}, tmp_path / "b.safetensors")
    refs = {"a.npy": ModelRef(tmp_path / "a.npy"), "b": ModelRef(tmp_path / "b.safetensors", True)}
    (tmp_path / "server").mkdir()
    archive = begun(tmp_path / "server", FrameworkType.PYTORCH, models=refs)
    do_round(archive, 0)
    archive.models()
    before = set(tmp_path.rglob("*"))

    assert weights_of(archive) == {"a.npy": [0, 1, 2], "b": [0, 1, 2], "FL_global_model.pt": [0.0] * 3}
    assert set(tmp_path.rglob("*")) == before
    archive.close("completed", None)


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """As the job calls it."""
    (tmp_path / "a.npy").write_bytes(b"no array")
    archive = begun(tmp_path, models={"first": ModelRef(tmp_path / "a.npy")})

    with pytest.raises(ConfigError, match=r"models\['first'\].*is damaged"):
        archive.models()
    archive.close("failed", None)
