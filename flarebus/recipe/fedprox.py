"""FedProxRecipe: federated averaging whose sites are held back from running far away from the model."""

from __future__ import annotations

from typing import Any, ClassVar

from flarebus.job.checks import check_number
from flarebus.recipe.fedavg import FedAvgRecipe

__all__ = ["FedProxRecipe"]


class FedProxRecipe(FedAvgRecipe):
    """FedProx (Li et al. 2020): sites add mu/2 ||w - w_global||^2 to their loss; the server tells them mu.

    The training script adds the term: in PyTorch with `flarebus.client.algorithms.FedProxLoss`, elsewhere with mu from
    `received.meta["fedprox_mu"]`. A script that does not take part in that is averaged as ever.

    Args:
        fedprox_mu: mu, from 0. 0.001 to 1 are usual; the more sites differ, the more.
        name: name of the job, and of its run folder.
        fedavg: the parameters of `FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = "fedprox"
    _own_settings: ClassVar[tuple[str, ...]] = ("fedprox_mu",)

    def __init__(self, *, fedprox_mu: float = 0.01, name: str = "fedprox", **fedavg: Any) -> None:
        super().__init__(name=name, **fedavg)
        self._set(fedprox_mu=check_number("fedprox_mu", fedprox_mu, minimum=0.0))
