"""The transformer, and the data of a site."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification


def make_model():
    """A vision transformer of two layers over the 16 patches of an image of 8 by 8 pixels, with random weights."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            initializer_range=0.1,
            num_labels=10,
        )
    )


class Digits(Dataset):
    """Images of shape `(1, 8, 8)`, float32 from -1 to 1, with their labels."""

    def __init__(self, chosen):
        digits = load_digits()
        self.images = torch.tensor(digits.images[chosen] / 8 - 1, dtype=torch.float32).unsqueeze(1)
        self.labels = torch.tensor(digits.target[chosen])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


N_TRAIN = 1437


def load_data(site_index=0, n_sites=1):
    """A site's share for training, and the last fifth of all images for testing."""
    return Digits(slice(site_index, N_TRAIN, n_sites)), Digits(slice(N_TRAIN, None))
