"""Read back what trackers wrote, with the libraries' own readers: series -> key -> [(step, value)]."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.system.observed import wait_until

__all__ = ["Found", "read"]

Series = dict[str, dict[str, list[tuple[int, float]]]]


class Found(NamedTuple):
    """All that a tracker has of one run."""

    scalars: Series
    params: dict[str, dict[str, str]]
    """series -> name -> value as text, tags among them."""
    texts: dict[str, dict[str, str]]
    images: dict[str, list[str]]
    artefacts: list[str]


def read(tracker: str, folder: Path) -> Found:
    """What `tracker` wrote to its default place in `folder`."""
    return {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}[tracker](folder)


def _tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = Found({}, {}, {}, {}, [])
    for place in sorted((folder / "tb_events").iterdir()):
        events = EventAccumulator(str(place), {"scalars": 0, "tensors": 0, "images": 0})
        events.Reload()
        series = "" if place.name == "server" else place.name
        tags = events.Tags()
        found.scalars[series] = {
            key: [(event.step, event.value) for event in events.Scalars(key)] for key in tags["scalars"]
        }
        found.images[series] = tags["images"]
        for key in tags["tensors"]:
            name = key.removesuffix("/text_summary")
            text = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(key)]
            if name in ("parameters", "tags", "artefacts"):
                rows = dict(line.strip("|").split("|") for part in text for line in part.splitlines()[2:])
                if name == "artefacts":
                    found.artefacts.extend(Path(path).name for path in rows)
                else:
                    found.params.setdefault(series, {}).update(rows)
            else:
                found.texts.setdefault(series, {})[name] = text[-1]
    return found


def _mlflow(folder: Path) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    found = Found({}, {}, {}, {}, [])
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs} - {None}
    for run in runs:
        series = run.data.tags["flarebus.series"].replace("aggregate", "")
        assert run.info.run_id in parents or len(runs) == 1 or "mlflow.parentRunId" in run.data.tags
        found.scalars[series] = {
            key: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        found.params[series] = {**run.data.params, **run.data.tags, "status": run.info.status}
        for path in _files(client, run.info.run_id):
            if path.startswith("images/"):
                found.images.setdefault(series, []).append(path.split("/")[1])
            elif series:
                text = Path(client.download_artifacts(run.info.run_id, path)).read_text()
                found.texts.setdefault(series, {})[path] = text
            else:
                found.artefacts.append(path.rpartition("/")[2])
    return found


def _files(client: Any, run_id: str, path: str = "") -> Iterator[str]:
    for each in client.list_artifacts(run_id, path):
        if each.is_dir:
            yield from _files(client, run_id, each.path)
        else:
            yield each.path


def _wandb(folder: Path) -> Found:
    found = Found({}, {}, {}, {}, [])
    groups = set()
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        records = _whole(file)
        (run,) = [record.run for record in records if record.HasField("run")]
        groups.add(run.run_group)
        config = {each.key: json.loads(each.value_json) for each in run.config.update}
        for record in records:
            if record.HasField("config"):
                config |= {each.key: json.loads(each.value_json) for each in record.config.update}
        series = config["series"].replace("aggregate", "")
        scalars = found.scalars.setdefault(series, {})
        for record in records:
            if record.HasField("history"):
                row = _row(record.history.item)
                _take_row(row, scalars, found, series)
            elif record.HasField("artifact") and not record.artifact.type.startswith("wandb-"):
                found.artefacts.extend(each.path for each in record.artifact.manifest.contents)
            elif record.HasField("exit"):
                config["exit_code"] = record.exit.exit_code
        found.params[series] = {name: str(value) for name, value in config.items()}
    assert len(groups) == 1
    return found


def _row(items: Any) -> dict[str, Any]:
    return {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items}


def _take_row(row: dict[str, Any], scalars: dict[str, list[tuple[int, float]]], found: Found, series: str) -> None:
    step = row.get("global_step")
    if step is None:
        return
    images = [key.removesuffix("/_type") for key, value in row.items() if value == "image-file"]
    found.images.setdefault(series, []).extend(images)
    for key, value in row.items():
        if key in ("global_step", "_step", "_timestamp", "_runtime") or key.partition("/")[0] in images:
            continue
        if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
            found.texts.setdefault(series, {})[key] = value
        else:
            scalars.setdefault(key, []).append((step, float(value)))


def _whole(file: Path) -> list[Any]:
    """The records of a run that was finished; a process of the library may still be writing the last ones."""
    wait_until(lambda: any(each.HasField("exit") for each in _records(file)), f"the end of {file}")
    return _records(file)


def _records(file: Path) -> list[Any]:
    """The records of a run, those that a process of the library has written by now."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(data) for data in _log_records(file.read_bytes())]


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records in a file of W&B: a header of 7 bytes, then a LevelDB log in blocks of 32 KiB."""
    block, place, parts = 32768, 7, []
    while place + 7 <= len(data):
        left = block - place % block
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []
