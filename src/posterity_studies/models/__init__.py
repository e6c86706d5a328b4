"""The networks of the studies. To add one, write a function and name it in ``NETWORKS``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from posterity_studies.models.resnet import resnet20


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


def conv_colour(classes: int = 10) -> nn.Module:
    """Three convolutions (24, 48 and 64 channels) and two dense layers for 32×32 colour images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(48, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "conv_small": conv_small,
    "lenet5": lenet5,
    "conv_colour": conv_colour,
    "resnet20": resnet20,
}
