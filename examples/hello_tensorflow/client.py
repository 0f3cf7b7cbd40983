"""A site that trains a convolutional network on its share of scanned digits."""

import argparse

from net import make_net
from sklearn.datasets import load_digits

import flarebus.client as flare


def load_data(site, n_sites):
    """This site's share for training, and the last fifth of all images for testing."""
    digits = load_digits()
    images = digits.images[..., None].astype("float32") / 16
    n_train = len(images) * 4 // 5
    mine = slice(int(site.rpartition("-")[2]) - 1, n_train, n_sites)
    return (images[mine], digits.target[mine]), (images[n_train:], digits.target[n_train:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    model = make_net()

    flare.init()
    site = flare.get_site_name()
    (train_x, train_y), (test_x, test_y) = load_data(site, args.n_sites)

    while flare.is_running():
        received = flare.receive()
        for name, weights in received.params.items():
            model.get_layer(name).set_weights(weights)
        _, accuracy = model.evaluate(test_x, test_y, batch_size=256, verbose=0)

        history = model.fit(train_x, train_y, batch_size=args.batch_size, epochs=args.epochs, verbose=0)
        loss = history.history["loss"][-1]
        print(f"{site}, round {received.current_round}: received accuracy {accuracy:.3f}, training loss {loss:.3f}")

        flare.send(
            flare.FLModel(
                params={layer.name: layer.get_weights() for layer in model.layers},
                metrics={"accuracy": accuracy, "loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": args.epochs * history.params["steps"]},
            )
        )


if __name__ == "__main__":
    main()
