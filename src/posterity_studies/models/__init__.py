"""The networks of the studies. To add one, write a function and name it in ``NETWORKS``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from posterity_studies.models.resnet import (
    densenet121,
    preresnet110,
    resnet18,
    resnet20,
    resnet20_bf16,
    resnet50,
)


def conv_small(classes: int = 10) -> nn.Module:
    """Two convolutions (16 and 32 channels) and two dense layers for 28×28 images: 207k weights.

    Pooling before the ReLU gives the same values for a quarter of its work; channels-last memory
    is more than twice as fast on a CPU.
    """
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, classes)),
    )
    return nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)


def lenet5(classes: int = 10) -> nn.Module:
    """LeNet-5 for 28×28 images (LeCun et al., 1998), with ReLU and maxima: 62k weights."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, classes),
    )
    return nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)


def tiny(classes: int = 10) -> nn.Module:
    """Two dense layers on 28×28 images pooled to 7×7: 610 weights, few enough to sample exactly."""
    pooled = nn.AvgPool2d(4), nn.Flatten()
    return nn.Sequential(*pooled, nn.Linear(49, 10), nn.ReLU(), nn.Linear(10, classes))


def conv_colour(classes: int = 10) -> nn.Module:
    """Three convolutions (24, 48 and 64 channels) and two dense layers for 32×32 colour images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(48, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


def alexnet(classes: int = 10) -> nn.Module:
    """The AlexNet of the NeurIPS 2021 competition on approximate inference: 32×32 images, swish."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 256, 3, padding=1), nn.SiLU()),
        *(nn.Conv2d(256, 128, 3, padding=1), nn.SiLU()),
        *(nn.Conv2d(128, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 4 * 4, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()),
        nn.Linear(256, classes),
    )


class Regression(nn.Module):
    """The competition's MLP: features → (mean, log noise variance), one hidden layer of 50."""

    def __init__(self, features: int, hidden: int = 50):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, features) → two of (batch,)."""
        mean, noise = self.layers(x).unbind(-1)
        return mean, noise


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "conv_small": conv_small,
    "lenet5": lenet5,
    "conv_colour": conv_colour,
    "tiny": tiny,
    "alexnet": alexnet,
    "resnet20": resnet20,
    "resnet20-bf16": resnet20_bf16,
    "resnet20-frn": partial(resnet20, norm="filter_response"),
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet50-frn": partial(resnet50, norm="filter_response"),
    "preresnet110": preresnet110,
    "densenet121": densenet121,
}
