"""A site that trains a convolutional network on its share of scanned digits."""

import argparse

import torch
from net import Net
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flarebus.client as flare


def load_data(site, n_sites, batch_size):
    """This site's share for training, and the last fifth of all images for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    n_train = len(labels) * 4 // 5
    mine = slice(int(site.rpartition("-")[2]) - 1, n_train, n_sites)
    train_set = TensorDataset(images[mine], labels[mine])
    test_set = TensorDataset(images[n_train:], labels[n_train:])
    return DataLoader(train_set, batch_size=batch_size, shuffle=True), DataLoader(test_set, batch_size=256)


def evaluate(model, loader, device):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            predicted = model(images.to(device)).argmax(dim=1)
            correct += (predicted == labels.to(device)).sum().item()
            total += len(labels)
    return correct / total


def train(model, loader, optimizer, device, epochs):
    """Return the number of steps and the mean loss."""
    model.train()
    criterion = nn.CrossEntropyLoss()
    steps, loss_sum = 0, 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            steps += 1
            loss_sum += loss.item()
    return steps, loss_sum / steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Net().to(device)

    flare.init()
    site = flare.get_site_name()
    train_loader, test_loader = load_data(site, args.n_sites, args.batch_size)

    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        accuracy = evaluate(model, test_loader, device)

        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
        steps, loss = train(model, train_loader, optimizer, device, args.epochs)
        print(f"{site}, round {received.current_round}: received accuracy {accuracy:.3f}, training loss {loss:.3f}")

        flare.send(
            flare.FLModel(
                params=model.cpu().state_dict(),
                metrics={"accuracy": accuracy, "loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )
        model.to(device)


if __name__ == "__main__":
    main()
