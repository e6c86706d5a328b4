"""The posterior tensor by tensor: where the data have spoken, and where the noise is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posterity import Posterior
from posterity_studies.report import figures

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Layer(NamedTuple):
    """One tensor; weight and noise are root mean squares of m and σ, ratios are |m|/σ."""

    name: str
    shape: tuple[int, ...]
    weight: float
    noise: float
    quantiles: tuple[float, ...]  # of log10 |m|/σ, at SHARES
    lost: float  # share of the weights with |m| < σ
    prior: float  # the prior's precision over the posterior's, on average; NaN if it is unknown

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def layers(posterior: Posterior, names: Sequence[str]) -> list[Layer]:
    """One of each tensor that has any elements, of these names in this order."""
    std, priors = posterior.std(), posterior.prior_precision or {}
    return [
        layer(name, posterior.mean[name].double(), std[name].double(), priors.get(name))
        for name in names
        if name in std and std[name].numel()
    ]


def layer(name: str, mean: Tensor, std: Tensor, prior: Tensor | None) -> Layer:
    """One tensor's, from values in float64."""
    ratio = mean.abs() / std
    logs = ratio.clamp(1e-9, 1e9).log10().flatten().sort().values
    places = torch.tensor(SHARES, dtype=logs.dtype) * (len(logs) - 1)
    return Layer(
        name,
        tuple(mean.shape),
        float(mean.square().mean().sqrt()),
        float(std.square().mean().sqrt()),
        tuple(logs[places.round().long()].tolist()),
        float((ratio < 1).double().mean()),
        math.nan if prior is None else float((prior.double() * std.square()).mean()),
    )


def table(found: Sequence[Layer]) -> Mapping[str, Any]:
    """What the template takes: rows with their strips on one axis, and all weights together."""
    low = math.floor(min(layer.quantiles[0] for layer in found))
    high = max(math.ceil(max(layer.quantiles[-1] for layer in found)), low + 1)
    size = sum(layer.size for layer in found)
    return {
        "axis": figures.strip_axis(low, high),
        "rows": [(layer, figures.strip(low, high, layer.quantiles, 0.0)) for layer in found],
        "size": size,
        "lost": sum(layer.lost * layer.size for layer in found) / size,
        "noisiest": max(found, key=lambda layer: layer.noise / (layer.weight or math.inf)),
    }
