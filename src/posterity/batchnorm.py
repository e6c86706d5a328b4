"""BatchNorm's statistics for a posterior: those that training leaves are of other samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .binding import Tensors, call, clean_name, evaluating
from .posterior import Posterior


def update_bn(
    model: nn.Module, posterior: Posterior, loader: Iterable[Any], samples: int = 8, seed: int = 0
) -> Posterior:
    """The posterior with BatchNorm statistics of ``loader``'s data, averaged over its samples.

    The running statistics that training leaves are averages over its last batches, each seen by a
    sample of what was then the posterior. These are averages over all batches and S samples of
    this one: of each channel's mean, and of its variance within a batch. (The variance between
    samples is no part of it: in training, too, each sample is normalised with its own.) They are
    one set of buffers, which every sample of :func:`predict` uses, so that the network is one
    function of θ; for the mean alone, ``samples=0`` gives what :func:`torch.optim.swa_utils.
    update_bn` gives there.

    Args:
        model: a module that the posterior fits; afterwards it is as it was. Only BatchNorm layers
            run in train mode, all others as in :func:`predict`.
        posterior: its other buffers stay. Of a mixture, pass each component.
        loader: batches of training inputs, or of (inputs, targets), as for :func:`predict`. It is
            traversed once per sample and may shuffle and augment; each batch counts the same.
        samples: S; sample s is ``posterior.sample(seed, s)``. 0 takes the mean instead.
        seed: of the stream of samples.

    Raises:
        ValueError: no BatchNorm layer keeps statistics, there are no data, ``samples`` is negative,
            or the posterior does not fit the model.

    Example:
        >>> import torch
        >>> from posterity import Posterior, update_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> mean = dict(model.named_parameters())
        >>> posterior = Posterior(mean, {name: torch.full_like(m, 9.0) for name, m in mean.items()})
        >>> posterior = update_bn(model, posterior, torch.randn(64, 2).split(16))
        >>> posterior.buffers["1.running_mean"].shape
        torch.Size([3])
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ValueError("the model has no BatchNorm layer that keeps running statistics")
    if isinstance(loader, torch.Tensor):
        raise TypeError("needs batches, not one tensor: pass x.split(64), or a loader")
    if samples < 0:
        raise ValueError(f"a negative number of samples: {samples}")
    kept = {
        clean_name(name): buffer
        for prefix, norm in norms.items()
        for name, buffer in norm.named_buffers(prefix)
    }
    bare = posterior._but(buffers={n: b for n, b in posterior.buffers.items() if n not in kept})
    loader = list(loader) if iter(loader) is loader else loader
    seen = 0
    with evaluating(model), torch.no_grad(), _gathering(norms.values()):
        for index in range(max(samples, 1)):
            here = bare.sampled(model, seed, index) if samples else bare.at_mean(model)
            with here:
                for seen, batch in enumerate(loader, 1):  # noqa: B007
                    call(model, batch[0] if isinstance(batch, (tuple, list)) else batch)
        if not seen:
            raise ValueError("there are no data")
        device = next(iter(posterior.mean.values())).device
        found: Tensors = {name: buffer.to(device, copy=True) for name, buffer in kept.items()}
    return posterior._but(buffers=posterior.buffers | found)


@contextmanager
def _gathering(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """BatchNorm layers average over all that they see from here on; then they are as before."""
    before = [(norm, norm.momentum, [b.clone() for b in norm.buffers()]) for norm in norms]
    for norm, _, _ in before:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    try:
        yield
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            for buffer, held in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(held)
