"""BatchNorm's running statistics under a posterior."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn as update_at

from .binding import clean_name
from .posterior import Posterior

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def update_bn(
    model: nn.Module, posterior: Posterior, loader: Iterable[Any], samples: int = 8, seed: int = 0
) -> None:
    r"""Make BatchNorm's running statistics anew: averages over data and posterior samples.

    While training, every forward pass ran at a sample of its own, so the running statistics are
    averages over batches, samples and the recent past of the posterior. This takes the last away.
    With S samples and B batches they become (1/SB) Σ of each batch's mean and of its variance; all
    samples are then evaluated with the same statistics, as they were in training.

    Args:
        model: whose statistics are written.
        posterior: over its parameters. Its own copy of the statistics, in ``posterior.buffers``, is
            written too, so that a saved posterior predicts the same.
        loader: batches of inputs, or of tuples that begin with them; traversed once per sample.
        samples: S.
        seed: of the stream of samples; sample s is ``posterior.sample(seed, s)``.

    The model's other buffers, parameters and flags stay as they are. Momentum plays no part.

    Raises:
        ValueError: the model has no BatchNorm with running statistics, no data, or no sample.

    Example:
        >>> import torch
        >>> from posterity import Posterior, update_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> mean = {name: p.detach() for name, p in model.named_parameters()}
        >>> precision = {name: 100 * torch.ones_like(p) for name, p in mean.items()}
        >>> update_bn(model, Posterior(mean, precision), [torch.randn(8, 2), torch.randn(8, 2)])
        >>> model[1].num_batches_tracked
        tensor(2)

    Source: Izmailov et al. 2018, arXiv 1803.05407, for a point estimate.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not norms or samples < 1:
        raise ValueError("needs a model with BatchNorm that tracks statistics, and a sample")
    names = [f"{name}.{kind}" for name in norms for kind in STATISTICS]
    own = {name: t for name, t in model.named_buffers() if name in names}
    held = {name: t.clone() for name, t in own.items()}
    totals = {name: torch.zeros_like(t) for name, t in held.items()}
    try:
        for index in range(samples):
            with posterior.sampled(model, seed, index):
                update_at(loader, model)
                for name, total in totals.items():
                    total += own[name]
                if not all(own[f"{name}.num_batches_tracked"] for name in norms):
                    raise ValueError("there are no data: a loader must give them for each sample")
    except BaseException:
        for name, value in held.items():
            own[name].copy_(value)
        raise
    for name, total in totals.items():
        own[name].copy_(total / samples)  # the number of batches is the same in each
        if (its := posterior.buffers.get(clean_name(name))) is not None:
            its.copy_(own[name])
