"""What scoring and generation share: samples in the model, and averages over them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..binding import Samples
from ..prediction import entropy


class Average:
    """Running totals over samples: class probabilities, and their entropies."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.entropies = torch.zeros(())

    def add(self, log_probs: Tensor) -> None:
        """One sample's log-probabilities (…, classes)."""
        probs = log_probs.exp()
        self.count += 1
        self.entropies = entropy(probs) + self.entropies
        self.total = probs.add_(self.total)

    @property
    def probs(self) -> Tensor:
        """p̄, the mean over the samples."""
        return self.total / self.count

    def uncertainty(self) -> tuple[Tensor, Tensor]:
        """H[p̄] and H[p̄] − mean_s H[p_s], in nats."""
        total = entropy(self.probs)
        return total, (total - self.entropies / self.count).clamp_(min=0)


def number(posterior: Samples | None, samples: int) -> int:
    """How many forward passes so many samples take; ValueError for none."""
    if samples < 1:
        raise ValueError(f"needs at least one sample, not {samples}")
    return 1 if posterior is None else samples


def takes_places(model: nn.Module) -> bool:
    """Whether a model wants ``position_ids`` where padding on the left would shift its tokens.

    Those that find the places themselves, or have none, do not; wrappers pass them on.
    """
    inner: Any = model
    while isinstance(
        wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module
    ):
        inner = wrapped
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in inner.modules()):
        return False
    taken = signature(inner.forward).parameters
    anything = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken.values())
    return anything or "position_ids" in taken


def places(mask: Tensor) -> Tensor:
    """The places of tokens that a mask shows, from 0 on."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def placing(model: nn.Module, batch: Any) -> Any:
    """A batch with its tokens' places, where the model wants them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or "position_ids" in batch or bool(mask[:, 0].all()):
        return batch
    return {**batch, "position_ids": places(mask)} if takes_places(model) else batch


def holding(
    model: nn.Module, posterior: Samples | None, seed: int, index: int
) -> AbstractContextManager[Any]:
    """A context in which the model holds sample ``index``."""
    return nullcontext() if posterior is None else posterior.sampled(model, seed, index)
