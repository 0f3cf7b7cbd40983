"""Formats and transfer types, through receive and send."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import flarebus.client as flare
from flarebus.errors import ClientApiError, Closed
from tests.client.fake_engine import LIMIT_S, FakeEngine

Sit = Callable[..., FakeEngine]


def test_pytorch_script_gets_tensors_and_the_server_arrays(sit_down: Sit) -> None:
    """Both ways without a copy, with bfloat16 and what is no tensor."""
    engine = sit_down(exchange_format="pytorch")
    flare.init()
    array = np.ones((2, 2), np.float32)
    half = np.ones(2, ml_dtypes.bfloat16)
    engine.give(flare.FLModel(params={"w": array, "h": half, "k": "x", "n": None}, optimizer_params={"m": array}))
    model = flare.receive()
    assert model is not None
    assert model.params is not None
    assert model.optimizer_params is not None
    assert isinstance(model.optimizer_params["m"], torch.Tensor)
    model.params["w"] += 1
    assert array[0, 0] == 2
    net = {"w": torch.nn.Parameter(model.params["w"] * 2), "h": model.params["h"], "k": "x", "n": None}
    flare.send(flare.FLModel(params=net, optimizer_params={"m": torch.ones(1)}))
    answer = engine.next_answer()

    assert answer.params is not None
    assert answer.params["w"].tolist() == [[4, 4], [4, 4]]
    assert answer.params["h"].dtype == ml_dtypes.bfloat16
    assert (answer.params["k"], answer.params["n"]) == ("x", None)
    assert isinstance((answer.optimizer_params or {})["m"], np.ndarray)


def test_tensors_stay_tensors_for_a_server_that_wants_them(sit_down: Sit) -> None:
    """With server_expected_format pytorch nothing is made an array."""
    engine = sit_down(exchange_format="pytorch", server_expected_format="pytorch")
    flare.init()
    engine.give(flare.FLModel(params={"w": torch.ones(2)}))
    flare.receive()
    sent = torch.zeros(2)
    flare.send(flare.FLModel(params={"w": sent}))

    assert (engine.next_answer().params or {})["w"] is sent


@pytest.mark.parametrize("exchange", ["numpy", "raw"])
def test_arrays_are_untouched(sit_down: Sit, exchange: str) -> None:
    """What comes is what was given, what goes is what was sent."""
    engine = sit_down(exchange_format=exchange)
    flare.init()
    array, keras = np.ones(2), [np.ones(1)]
    engine.give(flare.FLModel(params={"w": array, "k": keras}))
    model = flare.receive()
    assert model is not None
    assert model.params is not None
    assert model.params["w"] is array
    assert model.params["k"] is keras
    flare.send(flare.FLModel(params={"w": array}), clear_cache=False)

    assert (engine.next_answer().params or {})["w"] is array


def test_raw_script_may_send_tensors(sit_down: Sit) -> None:
    """RAW turns conversion off; a script of arrays that sends a tensor has it made an array."""
    for exchange, kind in (("raw", torch.Tensor), ("numpy", np.ndarray)):
        engine = sit_down(exchange_format=exchange)
        flare.init()
        engine.give(flare.FLModel(params={}))
        flare.receive()
        flare.send(flare.FLModel(params={"w": torch.ones(1)}))

        assert isinstance((engine.next_answer().params or {})["w"], kind)


def test_missing_pytorch_is_explained(sit_down: Sit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyTorch the error names the setting and what to install."""
    engine = sit_down(exchange_format="pytorch")
    monkeypatch.setitem(sys.modules, "torch", None)
    flare.init()
    engine.give(flare.FLModel(params={"w": np.ones(1)}))

    with pytest.raises(ClientApiError, match="pip install"):
        flare.receive()


def test_script_of_arrays_never_imports_pytorch() -> None:
    """A whole round of arrays leaves torch alone."""
    code = (
        "import sys, numpy as np, flarebus.client as flare\n"
        "from flarebus.client.engine import Seat, sit\n"
        "from tests.client.fake_engine import FakeEngine\n"
        "engine = FakeEngine(config={'TASK_EXCHANGE': {'transfer_type': 'DIFF'}})\n"
        "with sit(Seat(engine), globals()):\n"
        "    flare.init(); engine.give(flare.FLModel(params={'w': np.ones(2)})); m = flare.receive()\n"
        "    flare.send(flare.FLModel(params={'w': np.zeros(2)}, metrics={'a': 1}))\n"
        "print(engine.next_answer().params['w'].tolist(), 'torch' in sys.modules, 'ml_dtypes' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)

    assert done.stdout.strip() == "[-1.0, -1.0] False False"


@pytest.mark.parametrize("exchange", ["numpy", "pytorch"])
def test_diff_is_right_for_a_script_that_trains_in_place(sit_down: Sit, exchange: str) -> None:
    """The received model is kept aside, so changing it in place does not make the difference zero."""
    engine = sit_down(exchange_format=exchange, transfer_type="DIFF")
    flare.init()
    engine.give(flare.FLModel(params={"w": np.ones(3, np.float32)}))
    model = flare.receive()
    assert model is not None
    assert model.params is not None
    model.params["w"] += 2
    flare.send(flare.FLModel(params=model.params))
    answer = engine.next_answer()

    assert answer.params_type is flare.ParamsType.DIFF
    assert answer.params is not None
    assert answer.params["w"].dtype == np.float32
    assert answer.params["w"].tolist() == [2, 2, 2]


def test_diff_leaves_the_scripts_model_alone(sit_down: Sit) -> None:
    """With the cache kept, the model that was sent is FULL and whole."""
    engine = sit_down(transfer_type="DIFF")
    flare.init()
    engine.give(flare.FLModel(params={"w": np.ones(1)}))
    flare.receive()
    sent = flare.FLModel(params={"w": np.full(1, 5.0)})
    flare.send(sent, clear_cache=False)

    assert sent.params_type is flare.ParamsType.FULL
    assert sent.params is not None
    assert sent.params["w"].tolist() == [5]
    assert (engine.next_answer().params or {})["w"].tolist() == [4]


def test_own_difference_is_left_alone(sit_down: Sit) -> None:
    """A script that subtracts by itself is not corrected, and may send fewer keys."""
    engine = sit_down(transfer_type="DIFF")
    flare.init()
    engine.give(flare.FLModel(params={"w": np.ones(1), "v": np.ones(1)}))
    flare.receive()
    flare.send(flare.FLModel(params_type="DIFF", params={"w": np.full(1, 7.0)}))

    assert (engine.next_answer().params or {})["w"].tolist() == [7]


def test_diff_names_the_keys_that_differ(sit_down: Sit) -> None:
    """A renamed key is an error with both names, and the send can be corrected."""
    engine = sit_down(transfer_type="DIFF")
    flare.init()
    engine.give(flare.FLModel(params={"w": np.ones(1)}))
    flare.receive()
    with pytest.raises(ClientApiError, match=r"not sent: 'w'; sent but not received: 'module\.w'"):
        flare.send(flare.FLModel(params={"module.w": np.ones(1)}))
    flare.send(flare.FLModel(params={"w": np.ones(1)}))

    assert (engine.next_answer().params or {})["w"].tolist() == [0]


def test_diff_concerns_only_training(sit_down: Sit) -> None:
    """A submitted model is whole whatever the transfer type; metrics alone need no model."""
    engine = sit_down(transfer_type="DIFF")
    flare.init()
    engine.give(flare.FLModel(), "submit_model")
    flare.receive()
    flare.send(flare.FLModel(params={"w": np.ones(1)}))
    assert engine.next_answer().params_type is flare.ParamsType.FULL

    engine.give(flare.FLModel(params={"w": np.ones(1)}))
    flare.receive()
    flare.send(flare.FLModel(metrics={"a": 1}))
    answer = engine.next_answer()
    assert (answer.params, answer.params_type) == (None, None)


@pytest.mark.parametrize("failed_before", [False, True])
def test_diff_without_a_base_is_an_error(sit_down: Sit, failed_before: bool) -> None:
    """Nothing received, or used up by a send that failed: never a wrong difference."""
    engine = sit_down(transfer_type="DIFF")
    flare.init()
    engine.give(flare.FLModel(params={"w": np.ones(1)} if failed_before else {}))
    flare.receive()
    model: Any = flare.FLModel(params={"w": np.ones(1)})
    if failed_before:
        engine.refusal = Closed("no way")
        with pytest.raises(Closed):
            flare.send(model)

    with pytest.raises(ClientApiError, match="DIFF"):
        flare.send(model)
