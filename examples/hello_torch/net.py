"""The model: a small convolutional network for images of 8 by 8 pixels."""

import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions and a linear layer; `(n, 1, 8, 8)` float32 in, `(n, 10)` logits out."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1)
        self.linear = nn.Linear(2 * channels * 2 * 2, 10)

    def forward(self, images):
        x = nn.functional.max_pool2d(torch.relu(self.conv1(images)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.linear(x.flatten(start_dim=1))
