"""Deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474) of whatever was trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from posterity import Mixture, Posterior
from posterity.binding import Samples


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


def together(
    members: Sequence[tuple[nn.Module, Samples | None]], samples: int
) -> tuple[Mixture, int]:
    """Runs as one: a mixture of their posteriors, or an ensemble where they have none.

    Returns:
        what predicts, and with how many samples: ``samples``, or each model once.
    """
    posteriors = [q for _, q in members if isinstance(q, Posterior)]
    if posteriors:
        return Mixture(posteriors), samples
    return ensemble(model for model, _ in members), len(members)
