"""The algorithms that have a program: how their recipe is called, what the help says, which options they add.

All of them run on the frame of federated averaging, and the program around them is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import click

from workflows._options import Option, json_object, of_the_algorithm, site_names

__all__ = ["ALGORITHMS", "Algorithm"]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What a program has of its own.

    Args:
        workflow: the module `workflows.<workflow>`, and the workflow's name.
        recipe: the name of its recipe in `flarebus.recipe`.
        about: the first paragraph of the help.
        options: those that only its recipe takes, or the function that adds to it.
        adds: the name of a function in `flarebus.recipe` that adds something to the recipe; "" for none.
        min_clients: sites that it needs if nobody says; None: all that are asked.
    """

    workflow: str
    recipe: str
    about: str
    options: tuple[Option, ...] = ()
    adds: str = ""
    min_clients: int | None = None


def _order(text: str) -> str | list[str]:
    """One of the orders, or names of sites with commas between."""
    return list(site_names(text)) if "," in text else text


ALGORITHMS = {
    each.workflow: each
    for each in (
        Algorithm(
            "fedavg",
            "FedAvgRecipe",
            "Federated averaging: in every round each site trains the model on its own data, and the server averages.",
        ),
        Algorithm(
            "fedopt",
            "FedOptRecipe",
            "FedOpt: federated averaging whose server steps towards the mean with an optimizer of its own.",
            (
                of_the_algorithm(
                    "--server-optimizer",
                    type=click.Choice(["sgd", "adagrad", "adam", "yogi"]),
                    help="The server's optimizer. Default: adam.",
                ),
                of_the_algorithm(
                    "--optimizer-args",
                    type=json_object,
                    metavar="JSON",
                    help="Its parameters, such as '{\"lr\": 0.03}'.",
                ),
            ),
        ),
        Algorithm(
            "fedprox",
            "FedProxRecipe",
            "FedProx: federated averaging whose sites are held back from running far from the model they received.",
            (
                of_the_algorithm(
                    "--fedprox-mu",
                    type=float,
                    metavar="MU",
                    help="How strongly sites are held back, from 0. Default: 0.01.",
                ),
            ),
        ),
        Algorithm(
            "scaffold",
            "ScaffoldRecipe",
            "SCAFFOLD: federated averaging whose sites correct their gradients by how they differ from everybody's.",
        ),
        Algorithm(
            "cross_site_eval",
            "FedAvgRecipe",
            "Cross-site evaluation: after federated averaging, every site's model and the server's are evaluated at "
            "every site.",
            (
                of_the_algorithm(
                    "--submit-model-timeout",
                    type=float,
                    metavar="SECONDS",
                    help="How long sites have to come up with a model. Default: 600.",
                ),
                of_the_algorithm(
                    "--validation-timeout",
                    type=float,
                    metavar="SECONDS",
                    help="How long a site has to evaluate one model. Default: 6000.",
                ),
                of_the_algorithm(
                    "--participating-clients",
                    type=site_names,
                    metavar="NAMES",
                    help="Who takes part in the evaluation: a,b,c. Default: all.",
                ),
            ),
            adds="add_cross_site_evaluation",
        ),
        Algorithm(
            "cyclic",
            "CyclicRecipe",
            "Cyclic weight transfer: one site after the other trains the model on its own data, and hands it on.",
            (
                of_the_algorithm(
                    "--order",
                    type=_order,
                    metavar="ORDER|NAMES",
                    help="FIXED, RANDOM, RANDOM_WITHOUT_SAME_IN_A_ROW, or names of sites: b,a,c. Default: FIXED.",
                ),
                of_the_algorithm(
                    "--task-assignment-timeout",
                    type=float,
                    metavar="SECONDS",
                    help="How long a site that is not there has to come in its turn. Default: 10.",
                ),
                of_the_algorithm(
                    "--task-result-timeout", type=float, metavar="SECONDS", help="How long a site may train."
                ),
                of_the_algorithm(
                    "--allow-early-termination",
                    is_flag=True,
                    default=None,
                    help="A site may end the job with its update.",
                ),
            ),
            min_clients=2,
        ),
        Algorithm(
            "swarm",
            "SwarmRecipe",
            "Swarm learning: sites train, and aggregate by turns; no model is at the server until the end.",
            (
                of_the_algorithm(
                    "--max-concurrent-submissions",
                    type=int,
                    metavar="N",
                    help="Results that the aggregating site fetches at once. Default: 1.",
                ),
            ),
        ),
    )
}
