"""What a training script does for an algorithm whose sites do more than train: FedProx.

    from flarebus.client.algorithms import FedProxLoss

    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        proximal = FedProxLoss(model, received)
        for x, y in loader:
            loss = criterion(model(x), y) + proximal()
            ...

The recipe decides whether the algorithm is on: under another one the same script runs, and these calls change nothing.
PyTorch is not imported here: whoever has a module has it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flarebus.errors import ClientApiError
from flarebus.model import FLModel, MetaKey

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FedProxLoss"]


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


def _mu(received: FLModel) -> float:
    mu = received.meta.get(MetaKey.FEDPROX_MU, 0.0)
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu < math.inf:
        raise ClientApiError(f"the server's {MetaKey.FEDPROX_MU} is {mu!r}; it must be a number from 0")
    return float(mu)
