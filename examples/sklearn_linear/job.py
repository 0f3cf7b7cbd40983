"""Run client.py on simulated sites, and measure the model that comes out."""

import argparse
from pathlib import Path

from client import load_data
from sklearn.linear_model import SGDClassifier

from flarebus.recipe import SimEnv
from flarebus.recipe.sklearn import SklearnFedAvgRecipe, load_estimator


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=3)
    parser.add_argument("--num-rounds", type=int, default=10)
    parser.add_argument("--loss", default="log_loss", help="log_loss: logistic regression, hinge: a linear SVM, ...")
    args = parser.parse_args()

    recipe = SklearnFedAvgRecipe(
        name="sklearn-linear",
        model_params={
            "loss": args.loss,
            "penalty": "l2",
            "alpha": 0.001,
            "learning_rate": "constant",
            "eta0": 0.01,
        },
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    result = Path(run.get_result())
    print("status:", run.get_status())
    print("result:", result)

    model = load_estimator(result / "server" / "models" / "FL_global_model.safetensors", SGDClassifier(loss=args.loss))
    _, _, x_test, y_test = load_data("site-1", args.n_clients)
    print(f"accuracy: {model.score(x_test, y_test):.3f}")


if __name__ == "__main__":
    main()
