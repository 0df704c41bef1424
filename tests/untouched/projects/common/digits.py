"""What these projects have in common: the digits of scikit-learn, and a small convolutional network."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class ConvNet(nn.Sequential):
    def __init__(self, width: int = 16) -> None:
        super().__init__(
            *block(1, width, 1),
            *block(width, 2 * width, 2),
            *block(2 * width, 2 * width, 1),
            *block(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )


def loaders(batch_size: int = 32) -> tuple[DataLoader, DataLoader]:
    """1,200 images to learn from and 597 to validate with, the same each time."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    split = torch.Generator().manual_seed(0)
    train, val = random_split(TensorDataset(pixels, torch.tensor(labels)), [1200, 597], split)
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(val, 199)
