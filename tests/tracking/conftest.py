"""Fixtures of the tracking tests: small jobs, and nothing of the user's own settings of the libraries."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.recipe import FedAvgRecipe, FrameworkType, SimEnv
from flarebus.tracking import group
from tests.tracking.fake_tracker import FakeTracker, MadeTrackers

FAKE = "tests.tracking.fake_tracker:FakeTracker"
SCRIPT = """
import numpy as np
import flarebus.client as flare
from flarebus.client.tracking import MLflowWriter, SummaryWriter, WandBWriter

flare.init()
site = flare.get_site_name()
board, ml, wb = SummaryWriter(), MLflowWriter(), WandBWriter()
ml.log_params({"lr": 0.1, "layers": [1, 2]})
ml.set_tag("who", "ada")
while flare.is_running():
    model = flare.receive()
    round = model.current_round
    offset = 100 * int(site[-1])
    for step in range(3 * round, 3 * round + 3):
        board.add_scalar("loss", offset + step, global_step=step)
    board.add_scalar("counted", offset + round)
    board.add_text("note", f"{site} in round {round}", round)
    board.add_image("picture", np.full((3, 4, 5), 0.5), round)
    ml.log_text("words", "../../notes.txt")
    wb.log({"f1": np.float32(0.5), "words": "no number"}, step=round)
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"accuracy": offset + round}))
"""


@pytest.fixture(autouse=True)
def _settings_of_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The libraries find no settings, keys or caches of the user; and what is left at the end has all the time."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-own"))
    monkeypatch.setattr(group, "FLUSH_S", 90.0)


class Jobs:
    """Makes and runs a small job of two sites."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[tuple[str, dict[str, Any]]] = []
        folder.joinpath("client.py").write_text(SCRIPT)

    def recipe(self, **changes: Any) -> FedAvgRecipe:
        basic = {
            "name": "tracked",
            "model": {"w": np.zeros(4, np.float32)},
            "min_clients": 2,
            "train_script": str(self.folder / "client.py"),
            "framework": FrameworkType.NUMPY,
        }
        return FedAvgRecipe(**(basic | changes))

    def run(self, recipe: FedAvgRecipe, **changes: Any) -> Path:
        """Run it to its end; the run folder."""
        extra = {"on_event": lambda event, fields: self.events.append((event, fields))}
        basic = {"num_clients": 2, "workspace_root": self.folder / "runs", "debug": True, "extra": extra}
        found = recipe.execute(SimEnv(**(basic | changes))).get_result()
        assert found is not None
        return Path(found)

    def log(self, run_dir: Path) -> str:
        return (run_dir / "server/log.txt").read_text()


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    # The name of a socket may have little more than 100 bytes.
    with tempfile.TemporaryDirectory(prefix="fb-") as sockets:
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield Jobs(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> MadeTrackers:
    """The trackers that the test makes under the name `FAKE`."""
    found = MadeTrackers()
    monkeypatch.setattr(FakeTracker, "made", found)
    return found
