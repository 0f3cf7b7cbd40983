"""What scripts do for FedProx and SCAFFOLD, against values worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flarebus.client.algorithms import FedProxLoss, Scaffold
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


def test_the_gradient_can_be_added_without_the_loss() -> None:
    """Where the loss is out of reach, what is added to gradients is the gradient of the term; only of those asked for,
    and of those that have one."""
    by_loss, by_hand, in_part = line(), line(), line()
    for model in (by_loss, by_hand, in_part):
        proximal = FedProxLoss(model, with_mu(0.5))
        with torch.no_grad():
            model.weight += 3.0
        (model.weight.square().sum() + (proximal() if model is by_loss else 0)).backward()
        if model is by_hand:
            proximal.add_gradients()
        elif model is in_part:
            proximal.add_gradients([model.bias])

    found = [None if model.weight.grad is None else model.weight.grad.item() for model in (by_loss, by_hand, in_part)]
    assert found == [11.5, 11.5, 10.0]
    assert by_hand.bias.grad is None


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


# --- SCAFFOLD


def with_control(**control: Any) -> FLModel:
    return FLModel(optimizer_params={"scaffold_c": control})


def corrected(scaffold: Scaffold, gradient: float) -> float:
    """One step with this gradient of `w`: what the optimizer would be given."""
    gradients = {"w": np.array([gradient])}
    scaffold.correct(gradients)
    return float(gradients["w"][0])


def changes(scaffold: Scaffold) -> float:
    found = scaffold.finish()
    assert found is not None
    return float(found["scaffold_c"]["w"][0])


def test_two_rounds_by_hand() -> None:
    """Gradients are corrected by c - c_i, and c_i becomes the mean of those that were not."""
    scaffold = Scaffold()
    scaffold.begin(with_control(w=np.array([0.0])))
    assert scaffold.is_on
    assert [corrected(scaffold, 2.0), corrected(scaffold, 6.0)] == [2.0, 6.0]
    assert changes(scaffold) == 4.0

    scaffold.begin(with_control(w=np.array([-1.0])))
    assert [corrected(scaffold, 5.0), corrected(scaffold, 2.0)] == [0.0, -3.0]  # less 4, less 1
    assert changes(scaffold) == -0.5  # from 4 to 3.5

    scaffold.begin(with_control(w=np.array([10.0])))
    assert corrected(scaffold, 0.0) == 6.5
    assert changes(scaffold) == -3.5


def test_it_is_the_second_option_of_the_paper() -> None:
    """With plain gradient descent the new c_i is c_i - c + (x - y) / (K lr)."""
    torch.manual_seed(2)
    model, scaffold, rate = nn.Linear(3, 2, dtype=torch.float64), Scaffold(), 0.05
    data, goal = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    own = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for steps in (3, 5):
        server = {name: torch.randn_like(value) for name, value in model.named_parameters()}
        begun = {name: value.detach().clone() for name, value in model.named_parameters()}
        scaffold.begin(with_control(**server))
        for _ in range(steps):
            optimizer.zero_grad()
            (model(data) - goal).square().mean().backward()
            scaffold.correct(model)
            optimizer.step()
        found = scaffold.finish()
        assert found is not None
        for name, y in model.named_parameters():
            new = own[name] - server[name] + (begun[name] - y.detach()) / (steps * rate)
            torch.testing.assert_close(found["scaffold_c"][name], new - own[name])
            own[name] = new


def test_the_server_may_send_arrays_to_a_script_with_tensors() -> None:
    """What format the model comes in makes no difference."""
    model, scaffold = line(), Scaffold()
    scaffold.begin(with_control(weight=np.full((1, 1), 3.0, np.float32), bias=np.zeros(1, np.float32)))
    model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    scaffold.correct(model)

    assert model.weight.grad is not None
    assert model.weight.grad.item() == 4.0


def test_under_another_recipe_it_does_nothing() -> None:
    """Without a control variate from the server gradients stay, and there is nothing to send."""
    scaffold = Scaffold()
    for received in (FLModel(), FLModel(optimizer_params={"momentum": {}})):
        scaffold.begin(received)
        assert not scaffold.is_on
        assert corrected(scaffold, 2.0) == 2.0
        assert scaffold.finish() is None


def test_an_empty_control_variate_is_zero_everywhere() -> None:
    """In a job that begins without a model the server knows no names yet, and SCAFFOLD is on all the same."""
    scaffold = Scaffold()
    scaffold.begin(with_control())
    assert corrected(scaffold, 2.0) == 2.0
    assert changes(scaffold) == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_single_precision(dtype: torch.dtype) -> None:
    """The mean of thousands of small gradients is right, though their own dtype could not hold the sum."""
    scaffold, gradient = Scaffold(), torch.full((1,), 0.25, dtype=dtype)
    scaffold.begin(with_control(w=torch.zeros(1)))
    for _ in range(20_000):
        scaffold.correct({"w": gradient})
    found = scaffold.finish()

    assert found is not None
    assert (found["scaffold_c"]["w"].dtype, found["scaffold_c"]["w"].item()) == (torch.float32, 0.25)
    assert gradient.dtype is dtype


def test_parameters_without_a_gradient() -> None:
    """Frozen parameters are left alone; one that had no part in the loss has a gradient of zero, and is corrected."""
    model, scaffold = nn.ModuleDict({"used": line(), "unused": line(), "frozen": line()}), Scaffold()
    for each in model["frozen"].parameters():
        each.requires_grad = False
    control = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    scaffold.begin(with_control(**control))
    model["used"](torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    scaffold.correct(model)
    found = scaffold.finish()

    assert found is not None
    assert {name: value.item() for name, value in found["scaffold_c"].items()} == {
        "used.weight": 1.0,
        "used.bias": 1.0,
        "unused.weight": 0.0,
        "unused.bias": 0.0,
    }
    grads = [each.grad for each in model.parameters()]
    assert [None if grad is None else grad.item() for grad in grads] == [2.0, 2.0, 1.0, 1.0, None, None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_out_of_bounds_does_not_stay(bad: float) -> None:
    """After a round with such a gradient c_i is what it was, and nothing is said to have changed."""
    scaffold = Scaffold()
    scaffold.begin(with_control(w=np.array([0.0])))
    corrected(scaffold, 2.0)
    scaffold.finish()

    scaffold.begin(with_control(w=np.array([0.0])))
    corrected(scaffold, bad)
    assert scaffold.finish() == {"scaffold_c": {}}

    scaffold.begin(with_control(w=np.array([0.0])))
    assert corrected(scaffold, 5.0) == 3.0


def test_a_round_without_a_step_changes_nothing() -> None:
    """A site without data this time answers with no change."""
    scaffold = Scaffold()
    scaffold.begin(with_control(w=np.array([1.0])))

    assert scaffold.finish() == {"scaffold_c": {}}


def test_names_that_the_server_does_not_have_are_refused() -> None:
    """A module inside a wrapper has other names than the model that is sent; the error shows both."""
    scaffold = Scaffold()
    scaffold.begin(with_control(weight=np.zeros((1, 1)), bias=np.zeros(1)))
    wrapped = nn.Sequential(line())
    wrapped(torch.ones(1, 1, dtype=torch.float64)).sum().backward()

    with pytest.raises(ClientApiError, match=r"no parameter '0\.weight'; it has 'weight', 'bias'"):
        scaffold.correct(wrapped)
