"""The model and the data that training and evaluation share."""

import torch
from sklearn.datasets import load_digits
from torch import nn


class DigitsCNN(nn.Sequential):
    """Two convolutions and a linear layer: 8 x 8 grey images to 10 logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 8, 8) in 0..1 and labels (N,) of the split ``train`` (the first 1,437) or ``test`` (the last 360)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    part = slice(None, 1437) if split == "train" else slice(1437, None)
    return images[part], labels[part]
