"""Run client.py on simulated sites, with a workflow that was plugged in."""

import argparse

import numpy as np

from flarebus.recipe import SimEnv, WorkflowRecipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workflow", default="tournament", help="name of an installed workflow, or path of a class")
    parser.add_argument("--n-clients", type=int, default=3)
    parser.add_argument("--num-rounds", type=int, default=5)
    args = parser.parse_args()

    recipe = WorkflowRecipe(
        workflow=args.workflow,
        settings={"num_rounds": args.num_rounds, "min_clients": args.n_clients},
        name="custom-workflow",
        model={"slope": np.zeros(()), "offset": np.zeros(())},
        train_script="client.py",
        executors=[({"class_path": "data.SquaredError"}, ["score"])],
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    print("status:", run.get_status())
    print("result:", run.get_result())


if __name__ == "__main__":
    main()
