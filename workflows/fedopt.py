"""FedOpt (Reddi et al., "Adaptive Federated Optimization", ICLR 2021; with `sgd`, the FedAvgM of Hsu et al., "Measuring
the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019).

Federated averaging in which the server does not take the mean of the answers for the next model, but for the direction
to it, and steps there with an optimizer of its own:

    d  =  sum_k (n_k / n) w_k  -  w
    w  <-  w + ServerOptimizer(d)

Sites train as ever and may send models or differences. The formulas are in `flarebus.workflow.server_optimizer`.

`python -m workflows.fedopt` trains a small network on handwritten digits; with arguments, anybody's training script.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flarebus.workflow.aggregator import RoundMean
from flarebus.workflow.controller import Job
from flarebus.workflow.server_optimizer import ServerOptimizer
from workflows.fedavg import FedAvg

__all__ = ["FedOpt"]


class FedOpt(FedAvg):
    """The server side of FedOpt. The optimizer's state lives as long as this object.

    Args:
        server_optimizer: `sgd`, `adagrad`, `adam` or `yogi`.
        optimizer_args: its parameters, where they are not the defaults.
        average_vars: regular expression; parameters in whose name it is found take the mean, as in `FedAvg`.
        settings: those of `FedAvg`.
    """

    def __init__(
        self,
        *,
        server_optimizer: str,
        optimizer_args: Mapping[str, Any] | None,
        average_vars: str | None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.server_optimizer = server_optimizer
        self.optimizer_args = optimizer_args
        self.average_vars = average_vars
        self.optimizer = ServerOptimizer(server_optimizer, optimizer_args, average_vars)

    def update_model(self, job: Job, model: dict[str, Any], mean: RoundMean) -> dict[str, Any]:
        """A step of the optimizer towards the mean. The first model of all, of which nobody had one, is the mean."""
        pages = job.pages(model)
        return self.optimizer.step(model, mean.apply_to(model, out=pages), pages)


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main(workflow="fedopt"))
