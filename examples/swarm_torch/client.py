"""A site that trains a small network on its share of scanned digits."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import flarebus.client as flare


class Net(nn.Sequential):
    """`(n, 64)` float32 in, `(n, 10)` logits out."""

    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_data(index, n_sites):
    """Images and labels of the site with this index for training, and the last fifth of all for testing."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    n_train = len(labels) * 4 // 5
    mine = slice(index, n_train, n_sites)
    return (images[mine], labels[mine]), (images[n_train:], labels[n_train:])


def evaluate(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


def train(model, images, labels, epochs=3, batch_size=32):
    """Return the number of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            steps += 1
    return steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    index = int(site.rpartition("-")[2]) - 1
    torch.manual_seed(index)
    train_data, test_data = load_data(index, args.n_sites)
    model = Net()

    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        accuracy = evaluate(model, *test_data)
        steps = train(model, *train_data)
        print(f"{site}, round {received.current_round}: received accuracy {accuracy:.3f}")
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": accuracy},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )


if __name__ == "__main__":
    main()
