"""Residual and densely connected networks, with batch or filter-response normalisation.

Sources: He et al. 2016, arXiv 1512.03385 and 1603.05027; Huang et al. 2017, arXiv 1608.06993;
Singh and Krishnan 2020, arXiv 1911.09737.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Norm = Callable[[int], nn.Module]  # of so many channels


class FilterResponse(nn.Module):
    """max(γ x/√(mean x² + ε) + β, τ), the mean over an image's own pixels, all by channel.

    It normalises and thresholds: no ReLU follows it. An example does not depend on its batch.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))
        self.tau = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same."""
        size = x.square().mean((2, 3), keepdim=True) + self.eps
        return torch.maximum(self.gamma * x * size.rsqrt() + self.beta, self.tau)


NORMS: dict[str, tuple[Norm, Callable[[], nn.Module]]] = {  # with the activation that follows
    "batch": (nn.BatchNorm2d, nn.ReLU),
    "filter_response": (FilterResponse, nn.Identity),
}


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image's size, or divides it by its stride."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class Residual(nn.Module):
    """after(path(x) + shortcut(x))."""

    def __init__(self, path: nn.Module, shortcut: nn.Module, after: nn.Module):
        super().__init__()
        self.path, self.shortcut, self.after = path, shortcut, after

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) → (batch, outputs, height/stride, width/stride)."""
        return self.after(self.path(x) + self.shortcut(x))


class Subsampled(nn.Module):
    """A shortcut without weights: every so-many-th pixel, and zeros for new channels."""

    def __init__(self, stride: int, new: int):
        super().__init__()
        self.stride, self.new = stride, new

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, channels + new, …/stride, …/stride)."""
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))


def stages(first: int, widths: list[int], blocks: list[int]) -> Iterator[tuple[int, int, int]]:
    """Inputs, outputs and stride of each block; each stage but the first halves the image."""
    outputs = [w for w, n in zip(widths, blocks, strict=True) for _ in range(n)]
    begins = {sum(blocks[:k]) for k in range(1, len(blocks))}
    for k, (i, o) in enumerate(pairwise([first, *outputs])):
        yield i, o, 2 if k in begins else 1


def resnet20(classes: int = 10, norm: str = "batch") -> nn.Module:
    """ResNet-20 for 32×32 colour images: 16, 32 and 64 channels, 270k weights."""
    make, act = NORMS[norm]

    def block(i: int, o: int, stride: int) -> nn.Module:
        path = conv(i, o, 3, stride), make(o), act(), conv(o, o, 3), make(o)
        return Residual(nn.Sequential(*path), Subsampled(stride, o - i), act())

    blocks = (block(*shape) for shape in stages(16, [16, 32, 64], [3, 3, 3]))
    return nn.Sequential(conv(3, 16, 3), make(16), act(), *blocks, *_head(64, classes))


class Bf16(nn.Sequential):
    """Layers that autocast to bfloat16, on channels-last images, but for the last, in float32.

    Twice as fast as float32 on a CPU with AMX; on one without, much slower.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → what the last layer makes of it."""
        *layers, last = self
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            for layer in layers:
                x = layer(x)
        return last(x.float())


def resnet20_bf16(classes: int = 10) -> nn.Module:
    """:func:`resnet20` in bfloat16."""
    return Bf16(*resnet20(classes).children())


def resnet18(classes: int = 10, norm: str = "batch") -> nn.Module:
    """ResNet-18 for images of 32 or 64 pixels: 64 to 512 channels, 11M weights."""
    make, act = NORMS[norm]

    def block(i: int, o: int, stride: int) -> nn.Module:
        path = conv(i, o, 3, stride), make(o), act(), conv(o, o, 3), make(o)
        return Residual(nn.Sequential(*path), _projection(i, o, stride, make), act())

    blocks = (block(*shape) for shape in stages(64, [64, 128, 256, 512], [2, 2, 2, 2]))
    return nn.Sequential(conv(3, 64, 3), make(64), act(), *blocks, *_head(512, classes))


def resnet50(classes: int = 1000, norm: str = "batch") -> nn.Module:
    """ResNet-50 for 224×224 images, strides in the 3×3 convolutions: 25.6M weights."""
    make, act = NORMS[norm]

    def block(i: int, o: int, stride: int) -> nn.Module:
        narrow = o // 4
        path = (
            *(conv(i, narrow, 1), make(narrow), act()),
            *(conv(narrow, narrow, 3, stride), make(narrow), act()),
            *(conv(narrow, o, 1), make(o)),
        )
        return Residual(nn.Sequential(*path), _projection(i, o, stride, make), act())

    blocks = (block(*shape) for shape in stages(64, [256, 512, 1024, 2048], [3, 4, 6, 3]))
    stem = conv(3, 64, 7, 2), make(64), act(), nn.MaxPool2d(3, 2, padding=1)
    return nn.Sequential(*stem, *blocks, *_head(2048, classes))


def preresnet110(classes: int = 10, norm: str = "batch") -> nn.Module:
    """PreResNet-110 for images of 32 or 64 pixels, 16, 32 and 64 channels: 1.7M weights."""
    make, act = NORMS[norm]

    def block(i: int, o: int, stride: int) -> nn.Module:
        path = make(i), act(), conv(i, o, 3, stride), make(o), act(), conv(o, o, 3)
        short = nn.Identity() if (i, stride) == (o, 1) else conv(i, o, 1, stride)
        return Residual(nn.Sequential(*path), short, nn.Identity())

    blocks = (block(*shape) for shape in stages(16, [16, 32, 64], [18, 18, 18]))
    return nn.Sequential(conv(3, 16, 3), *blocks, make(64), act(), *_head(64, classes))


def densenet121(classes: int = 10, norm: str = "batch") -> nn.Module:
    """DenseNet-121 for images of 32 or 64 pixels, growth 32: 7M weights."""
    make, act = NORMS[norm]
    growth, width = 32, 64
    layers: list[nn.Module] = [conv(3, width, 3)]
    for stage, blocks in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [make(width), act(), conv(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(blocks):
            layers.append(_Dense(width, growth, make, act))
            width += growth
    return nn.Sequential(*layers, make(width), act(), *_head(width, classes))


class _Dense(nn.Module):
    """The input, and ``growth`` channels that are new."""

    def __init__(self, inputs: int, growth: int, make: Norm, act: Callable[[], nn.Module]):
        super().__init__()
        self.path = nn.Sequential(
            *(make(inputs), act(), conv(inputs, 4 * growth, 1)),
            *(make(4 * growth), act(), conv(4 * growth, growth, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) → (batch, inputs + growth, height, width)."""
        return torch.cat([self.path(x), x], 1)


def _projection(i: int, o: int, stride: int, make: Norm) -> nn.Module:
    """A shortcut with weights where shapes differ."""
    if (i, stride) == (o, 1):
        return nn.Identity()
    return nn.Sequential(conv(i, o, 1, stride), make(o))


def _head(width: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
