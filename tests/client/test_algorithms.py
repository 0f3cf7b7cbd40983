"""What PyTorch scripts do for FedProx, against values worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from flarebus.client.algorithms import FedProxLoss
from flarebus.errors import ClientApiError
from flarebus.model import FLModel


def line(slope: float = 2.0) -> nn.Linear:
    """y = slope * x, with float64 weights."""
    made = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        made.weight.fill_(slope)
        made.bias.zero_()
    return made


def with_mu(mu: Any) -> FLModel:
    return FLModel(meta={"fedprox_mu": mu})


# --- FedProx


def test_the_proximal_term_and_its_gradient() -> None:
    """The term is mu/2 times the squared distance from the received model; its gradient is mu times the distance."""
    model = line()
    proximal = FedProxLoss(model, with_mu(0.5))
    assert proximal().item() == 0.0

    with torch.no_grad():
        model.weight += 3.0
        model.bias -= 1.0
    term = proximal()
    term.backward()

    assert term.item() == 0.5 / 2 * (9 + 1)
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    assert (model.weight.grad.item(), model.bias.grad.item()) == (1.5, -0.5)


@pytest.mark.parametrize("received", [FLModel(), with_mu(0), with_mu(0.0)], ids=["none sent", "0", "0.0"])
def test_without_mu_the_term_is_nothing(received: FLModel) -> None:
    """Under a recipe that sends no mu the loss and its gradient stay what they are."""
    model = line()
    proximal = FedProxLoss(model, received)
    with torch.no_grad():
        model.weight += 3.0
    (model.weight.square().sum() + proximal()).backward()

    assert proximal().item() == 0.0
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 10.0


def test_what_is_not_trained_is_not_held_back() -> None:
    """Frozen parameters do not count, and nothing but parameters does."""
    model = nn.Sequential(line(), nn.BatchNorm1d(1), line())
    for each in model[2].parameters():
        each.requires_grad = False
    proximal = FedProxLoss(model, with_mu(2.0))
    with torch.no_grad():
        model[2].weight += 5.0  # type: ignore[operator]
        model[1].running_mean += 5.0  # type: ignore[operator]
        model[0].weight += 1.0  # type: ignore[operator]

    assert proximal().item() == 1.0


@pytest.mark.parametrize("mu", [-0.1, math.nan, math.inf, "0.1", True, None], ids=str)
def test_a_silly_mu_is_refused(mu: Any) -> None:
    """What the server sends is looked at before it spoils a gradient."""
    with pytest.raises(ClientApiError, match="fedprox_mu"):
        FedProxLoss(line(), with_mu(mu))


def test_pytorch_is_not_needed_to_import_it() -> None:
    """A script that uses something else can import the module without loading PyTorch."""
    code = "import sys, flarebus.client.algorithms\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
