"""Residual networks (He et al., 2016)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import pad


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without weights (option A: zeros for new channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.new = stride, outputs - inputs
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            *(nn.BatchNorm2d(outputs), nn.ReLU()),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) → (batch, outputs, height/stride, width/stride)."""
        short = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return nn.functional.relu(self.path(x) + short)


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 for 32×32 colour images: 16, 32 and 64 channels, 270k weights."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = (Block(i, o, 1 if i == o else 2) for i, o in pairwise(widths))
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *blocks,
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
    )


def resnet50_shapes(classes: int = 1000) -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 tensors, for benchmarks."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                kernels.append((4 * width, inputs, 1, 1))  # the shortcut
            for kernel in kernels:
                shapes += [kernel, kernel[:1], kernel[:1]]  # with its normalisation
            inputs = 4 * width
    return [*shapes, (classes, inputs), (classes,)]
