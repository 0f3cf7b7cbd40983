"""Run client.py on simulated sites, and look at the clusters that come out."""

import argparse
from pathlib import Path

from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.metrics import homogeneity_score

from flarebus.recipe import SimEnv
from flarebus.recipe.sklearn import KMeansFedAvgRecipe, load_estimator


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=3)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--n-clusters", type=int, default=3)
    args = parser.parse_args()

    recipe = KMeansFedAvgRecipe(
        name="sklearn-kmeans",
        n_clusters=args.n_clusters,
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
        key_metric="homogeneity",
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    result = Path(run.get_result())
    print("status:", run.get_status())
    print("result:", result)

    model = load_estimator(result / "server" / "models" / "FL_global_model.safetensors", KMeans())
    x, y = load_iris(return_X_y=True)
    print(f"homogeneity: {homogeneity_score(y, model.predict(x)):.3f}")
    print(f"inertia: {-model.score(x):.2f}")


if __name__ == "__main__":
    main()
