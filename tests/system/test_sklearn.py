"""A support vector machine of scikit-learn from recipe to model file, with the script of docs/sklearn.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from flarebus.recipe import SimEnv
from flarebus.recipe.sklearn import SVMFedAvgRecipe, load_estimator
from tests.docs.pages import blocks

pytestmark = pytest.mark.usefixtures("checked_out_workflows")

# The script of the documentation, as it stands there.
(SCRIPT,) = (block for block in blocks("sklearn.md", "python") if "flare.init()" in block)


def test_machines_of_sites_become_one(tmp_path: Path) -> None:
    """A new process in every round is told numbers and text, and the model decides as one of all data does."""
    (tmp_path / "client.py").write_text(SCRIPT)
    args = {"C": 2.0, "gamma": 0.02}
    recipe = SVMFedAvgRecipe(
        svc_args=args,
        min_clients=2,
        train_script=str(tmp_path / "client.py"),
        launch_external_process=True,
        launch_once=False,
    )

    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))

    server = Path(run.get_result() or "") / "server"
    model = load_estimator(server / "models" / "FL_global_model.safetensors", SVC(**args))
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    pooled = SVC(**args).fit(x[:400], y[:400])
    assert (model.predict(x[400:]) == pooled.predict(x[400:])).mean() >= 0.97

    rounds = [json.loads(line) for line in (server / "metrics.jsonl").read_text().splitlines()]
    assert rounds[1]["metrics"]["AUC"] > 0.98
    best = load_estimator(server / "models" / "best_FL_global_model.safetensors", SVC(**args))
    assert np.array_equal(best.support_vectors_, model.support_vectors_)
