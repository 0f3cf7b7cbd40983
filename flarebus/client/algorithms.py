"""What a training script does for an algorithm whose sites do more than train: FedProx and SCAFFOLD.

    from flarebus.client.algorithms import FedProxLoss, Scaffold

    scaffold = Scaffold()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        proximal = FedProxLoss(model, received)
        scaffold.begin(received)
        for x, y in loader:
            optimizer.zero_grad()
            (criterion(model(x), y) + proximal()).backward()
            scaffold.correct(model)
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict(), optimizer_params=scaffold.finish()))

The recipe decides which algorithm is on, if any; under another one the same script runs, and these calls do nothing.
PyTorch is not imported here: whoever has a module has it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flarebus.errors import ClientApiError
from flarebus.model import FLModel, MetaKey

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SCAFFOLD_CONTROL", "FedProxLoss", "Scaffold"]

SCAFFOLD_CONTROL = "scaffold_c"
"""Where, in the `optimizer_params` of a model, the server's control variate travels, and back what a site changes in
its own: dotted name of a parameter -> array."""


class FedProxLoss:
    """The proximal term of FedProx, mu/2 ||w - w_global||^2, over the parameters that are trained.

    Args:
        model: with the received parameters loaded, on the device it is trained on. Its parameters as they are now are
            kept, in a copy, as w_global.
        received: what came with them; the server's mu is in its meta.

    Raises:
        ClientApiError: mu is not a number from 0.
    """

    def __init__(self, model: nn.Module, received: FLModel) -> None:
        self.mu = _mu(received)
        self._zero_like = next(model.parameters())
        trained = [each for each in model.parameters() if each.requires_grad]
        self._pairs = [(each, each.detach().clone()) for each in trained] if self.mu else []

    def __call__(self) -> Tensor:
        """The term for the parameters as they are now, to be added to the loss; 0 where mu is 0 or was not sent."""
        total = self._zero_like.new_zeros(())
        for parameter, received in self._pairs:
            total = total + (parameter - received).square().sum()
        return self.mu / 2 * total

    def add_gradients(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Add the gradient of the term, mu (w - w_global), to the gradients, in place: for loops whose loss is out of
        reach. After `backward` (and unscaling) and before the optimizer. What has no gradient gets none.

        Args:
            parameters: only for these; None: all that are trained.
        """
        chosen = None if parameters is None else {id(each) for each in parameters}
        for parameter, received in self._pairs:
            if parameter.grad is not None and (chosen is None or id(parameter) in chosen):
                parameter.grad.add_(parameter.detach() - received, alpha=self.mu)


def _mu(received: FLModel) -> float:
    mu = received.meta.get(MetaKey.FEDPROX_MU, 0.0)
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu < math.inf:
        raise ClientApiError(f"the server's {MetaKey.FEDPROX_MU} is {mu!r}; it must be a number from 0")
    return float(mu)


class Scaffold:
    """The site's part of SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II). With g the gradient of each step:

        g    <-  g - c_i + c                                     correct, before the optimizer uses it
        c_i  <-  c_i - c + (x - y) / (K lr)                      finish, after K steps from x to y

    With plain gradient descent the new c_i is the mean of the K gradients before they were corrected, and so it is
    computed here: that asks for no learning rate, and stays a mean of gradients under schedules, momentum and weight
    decay.

    c_i lives in this object, on the device of the gradients: make it once, before the loop, in a process that lives as
    long as the job. It takes the memory of three models. Gradients in half precision are added up in float32.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] = {}
        self._server: Mapping[str, Any] | None = None
        self._offsets: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}
        self._n_steps = 0

    @property
    def is_on(self) -> bool:
        """Whether there is a round, and the server sent its control variate with the model of it."""
        return self._server is not None

    def begin(self, received: FLModel) -> None:
        """Start a round with the model as it was received; without a control variate in it SCAFFOLD is off."""
        self._server = (received.optimizer_params or {}).get(SCAFFOLD_CONTROL)
        self._offsets, self._sums, self._n_steps = {}, {}, 0

    def correct(self, gradients: nn.Module | Mapping[str, Any]) -> None:
        """Correct the gradients of one step in place, after `backward` (and unscaling) and before the optimizer.

        Args:
            gradients: the module whose parameters are sent, not a wrapper around it; or dotted name -> gradient, an
                array or a tensor.

        Raises:
            ClientApiError: the server's model has no such parameter.
        """
        if self._server is None:
            return
        self._n_steps += 1
        for name, gradient in _named_gradients(gradients):
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = _wide_copy(gradient)
                self._offsets[name] = self._offset(name, gradient)
            gradient += self._offsets[name]

    def finish(self) -> dict[str, Any] | None:
        """End the round; return the `optimizer_params` of the answer, what changed in c_i. None if SCAFFOLD is off.

        After a round with gradients that were NaN or infinite, c_i is what it was before.
        """
        if self._server is None:
            return None
        means = {name: total / self._n_steps for name, total in self._sums.items()}
        self._server, self._offsets, self._sums = None, {}, {}
        if not all(bool((abs(mean) < math.inf).all()) for mean in means.values()):
            return {SCAFFOLD_CONTROL: {}}
        changes = {name: mean - self._own.get(name, 0.0) for name, mean in means.items()}
        self._own.update(means)
        return {SCAFFOLD_CONTROL: changes}

    def _offset(self, name: str, gradient: Any) -> Any:
        """c - c_i, of the kind of the gradient."""
        assert self._server is not None
        if self._server and name not in self._server:
            known = ", ".join(map(repr, list(self._server)[:3]))
            raise ClientApiError(
                f"the server's model has no parameter {name!r}; it has {known} and so on. Hand over the module whose "
                "state_dict() is sent"
            )
        server, own = self._server.get(name, 0.0), self._own.get(name, 0.0)  # one that is missing is zero everywhere
        if not _is_tensor(gradient):
            return np.asarray(server - own, gradient.dtype)
        return (_tensor_like(gradient, server) - own).to(gradient.dtype)


def _named_gradients(gradients: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(gradients, Mapping):
        yield from gradients.items()
        return
    for name, parameter in gradients.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # it had no part in the loss: that is a gradient of zero
                parameter.grad = parameter.new_zeros(parameter.shape)
            yield name, parameter.grad.detach()


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _tensor_like(gradient: Any, value: Any) -> Any:
    """`value`, an array, a tensor or a number, on the device of the gradient, in its dtype or a wider one."""
    torch = sys.modules["torch"]
    return torch.as_tensor(value, dtype=torch.promote_types(gradient.dtype, torch.float32), device=gradient.device)


def _wide_copy(gradient: Any) -> Any:
    """A copy to add up in: in half precision a sum of many gradients would stand still."""
    if _is_tensor(gradient):
        return _tensor_like(gradient, gradient.clone())
    return gradient.astype(np.promote_types(gradient.dtype, np.float32))
