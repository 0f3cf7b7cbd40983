"""FedOptRecipe: federated averaging whose server steps towards the mean with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flarebus.job.checks import check_regex
from flarebus.recipe.fedavg import FedAvgRecipe
from flarebus.workflow.server_optimizer import BATCH_STATISTICS, check_optimizer_args

__all__ = ["FedOptRecipe"]


class FedOptRecipe(FedAvgRecipe):
    """FedOpt (Reddi et al. 2021): the mean of what the sites changed is a gradient for an optimizer at the server.

    Training scripts stay as they are. The server holds one more model in memory for `sgd`, two for the others.

    Args:
        server_optimizer: `adam`, `yogi`, `adagrad`, or `sgd` (with momentum, also known as FedAvgM).
        optimizer_args: what differs from the defaults, which are `{"lr": 0.03, "betas": [0.9, 0.99], "tau": 0.001}` for
            `adam` and `yogi`, `{"lr": 0.03, "beta": 0.0, "tau": 0.001}` for `adagrad`, and `{"lr": 1.0, "momentum":
            0.6}` for `sgd`. With a tau, lr is about the most that a number of the model changes in a round, and tau the
            size of change below which it is taken for noise.
        average_vars: regular expression searched in each parameter's name; what it finds takes the mean, as in
            federated averaging. By default that is what batch normalisation counts; None for nothing.
        name: name of the job, and of its run folder.
        fedavg: the parameters of `FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = "fedopt"
    _own_settings: ClassVar[tuple[str, ...]] = ("server_optimizer", "optimizer_args", "average_vars")

    def __init__(
        self,
        *,
        server_optimizer: str = "adam",
        optimizer_args: Mapping[str, Any] | None = None,
        average_vars: str | None = BATCH_STATISTICS,
        name: str = "fedopt",
        **fedavg: Any,
    ) -> None:
        super().__init__(name=name, **fedavg)
        self._set(
            server_optimizer=server_optimizer,
            optimizer_args=check_optimizer_args(server_optimizer, optimizer_args),
            average_vars=None if average_vars is None else check_regex("average_vars", average_vars),
        )
