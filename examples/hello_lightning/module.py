"""The network as a LightningModule, and the data of a site."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class DigitsModule(pl.LightningModule):
    """Two convolutions and a linear layer; `(n, 1, 8, 8)` float32 in, `(n, 10)` logits out."""

    def __init__(self, channels=16, lr=0.1):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * 2 * 2, 10),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        accuracy = (self(images).argmax(dim=1) == labels).float().mean()
        # The metric that chooses the best model. With several ranks it is the mean over all of them.
        self.log("accuracy", accuracy, on_epoch=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class DigitsData(pl.LightningDataModule):
    """A site's share for training, and the last fifth of all images for testing."""

    def __init__(self, site_index=0, n_sites=1, batch_size=32):
        super().__init__()
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target)
        n_train = len(labels) * 4 // 5
        mine = slice(site_index, n_train, n_sites)
        self.batch_size = batch_size
        self.train_set = TensorDataset(images[mine], labels[mine])
        self.test_set = TensorDataset(images[n_train:], labels[n_train:])

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test_set, batch_size=256)
