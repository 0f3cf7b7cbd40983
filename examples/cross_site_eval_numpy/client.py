"""A hospital that learns when to call a patient back: logistic regression in NumPy, on data made from a stated seed.

Hospitals see different patients, so a model that is good in one need not be good in another. Besides training, the
script answers two more tasks: it submits the best model it has trained, and measures models of others.
"""

import argparse

import numpy as np

import flarebus.client as flare

N_PATIENTS = 400
N_FEATURES = 8


def load_data(number, n_sites, seed):
    """Patients of hospital `number` from 0: what decides is half the same everywhere, half the hospital's own."""
    common = np.random.default_rng(seed).normal(size=N_FEATURES)
    random = np.random.default_rng((seed, number))
    weights = common + random.normal(size=N_FEATURES)
    x = random.normal(loc=number / n_sites, size=(N_PATIENTS, N_FEATURES))
    y = (1 / (1 + np.exp(-3 * (x @ weights))) > random.random(N_PATIENTS)).astype(np.float64)
    n_test = N_PATIENTS // 4
    return (x[n_test:], y[n_test:]), (x[:n_test], y[:n_test])


def predict(params, x):
    return 1 / (1 + np.exp(-(x @ params["weights"] + params["bias"])))


def evaluate(params, data):
    x, y = data
    p = np.clip(predict(params, x), 1e-12, 1 - 1e-12)
    return {
        "accuracy": float(np.mean((p > 0.5) == y)),
        "loss": float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))),
    }


def train(params, data, steps=20, rate=0.5):
    x, y = data
    weights, bias = params["weights"].copy(), params["bias"].copy()
    for _ in range(steps):
        error = predict({"weights": weights, "bias": bias}, x) - y
        weights -= rate * x.T @ error / len(y)
        bias -= rate * error.mean()
    return {"weights": weights, "bias": bias}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    flare.init()
    number = int(flare.get_site_name().rpartition("-")[2]) - 1
    train_data, test_data = load_data(number, args.n_sites, args.seed)
    best, best_loss = None, np.inf

    while flare.is_running():
        received = flare.receive()
        if flare.is_submit_model():
            flare.send(flare.FLModel(params=best))
        elif flare.is_evaluate():
            flare.send(flare.FLModel(metrics=evaluate(received.params, test_data)))
        else:
            metrics = evaluate(received.params, test_data)
            trained = train(received.params, train_data)
            loss = evaluate(trained, test_data)["loss"]
            if loss < best_loss:
                best, best_loss = trained, loss
            flare.send(
                flare.FLModel(params=trained, metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": len(train_data[1])})
            )


if __name__ == "__main__":
    main()
