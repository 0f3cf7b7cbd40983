"""FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020).

Federated averaging in which a site is held back from running far away from the model w that it received. Instead of its
own objective F_k alone, site k minimises

    h_k(w_k; w)  =  F_k(w_k) + mu/2 ||w_k - w||^2

The server's part is to tell mu; `flarebus.client.algorithms.FedProxLoss` adds the term in a PyTorch script.

`python -m workflows.fedprox` trains a small network on handwritten digits; with arguments, anybody's training script.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flarebus.model import MetaKey
from flarebus.workflow.controller import Task
from workflows.fedavg import FedAvg

__all__ = ["FedProx"]


class FedProx(FedAvg):
    """The server side of FedProx.

    Args:
        fedprox_mu: how strongly sites are held back, from 0; 0 is federated averaging. Scripts find it in the meta of
            the received model, as `fedprox_mu`.
        settings: those of `FedAvg`.
    """

    def __init__(self, *, fedprox_mu: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.fedprox_mu = fedprox_mu

    def new_task(self, number: int, model: dict[str, Any]) -> Task:
        """What the sites are given: model and mu."""
        return replace(super().new_task(number, model), meta={MetaKey.FEDPROX_MU: self.fedprox_mu})


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main(workflow="fedprox"))
