"""ScaffoldRecipe: federated averaging whose sites correct their gradients by how they differ from everybody's."""

from __future__ import annotations

from typing import Any, ClassVar

from flarebus.errors import ConfigError
from flarebus.recipe.fedavg import FedAvgRecipe

__all__ = ["ScaffoldRecipe"]


class ScaffoldRecipe(FedAvgRecipe):
    """SCAFFOLD (Karimireddy et al. 2020): control variates keep sites with different data from pulling apart.

    The training script does its part with `flarebus.client.algorithms.Scaffold`; an answer without a control variate is
    refused. Each round carries two models each way, and the server holds about twice as much as in federated averaging.

    Args:
        name: name of the job, and of its run folder.
        fedavg: the parameters of `FedAvgRecipe`, except that `launch_once=False` is refused: a site's control variate
            lives in its script from round to round.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = "scaffold"

    def __init__(self, *, name: str = "scaffold", **fedavg: Any) -> None:
        super().__init__(name=name, **fedavg)
        for config in (self._definition.site_defaults, *self._definition.sites.values()):
            if not config.launch_once:
                allowed = "True: a site's control variate lives in its script from round to round"
                raise ConfigError("launch_once", config.launch_once, allowed)
