"""Deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474) of whatever was trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from posterity import Mixture, Posterior


def point(model: nn.Module) -> Posterior:
    """A model's weights and buffers as a Gaussian too narrow to see."""
    mean = dict(model.named_parameters())
    # σ is below the spacing of numbers around any weight
    narrow = {name: torch.finfo(p.dtype).max ** 0.75 for name, p in mean.items()}
    precision = {name: torch.full_like(p, narrow[name]) for name, p in mean.items()}
    return Posterior(mean, precision, buffers=dict(model.named_buffers()))


def ensemble(models: Iterable[nn.Module]) -> Mixture:
    """Trained models, each as likely: predict with as many samples as there are models."""
    return Mixture([point(model) for model in models])
