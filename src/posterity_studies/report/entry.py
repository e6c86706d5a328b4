"""One row of a comparison, and the check that the rows fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posterity_studies.report.layers import Layer


@dataclass(frozen=True)
class Entry:
    """One row: metrics as fractions or natural units, `probs` (n, C) and `ood_probs` (m, C).

    `curve` maps epoch, train_loss, test_nll and test_accuracy to lists of equal length; leave it
    empty where the row shares another row's training. `layers` are of a row with a posterior.
    """

    label: str
    metrics: dict[str, float]
    curve: dict[str, list[float]]
    probs: torch.Tensor
    ood_probs: torch.Tensor
    layers: Sequence[Layer] = ()


def check(
    entries: Sequence[Entry],
    targets: torch.Tensor,
    class_names: Sequence[str],
    images: torch.Tensor,
) -> None:
    """Raise ValueError, naming the entry, where shapes, lengths or class indices disagree."""
    n, c = len(targets), len(class_names)
    if not entries or not n:
        raise ValueError("a comparison needs at least one entry and one test image")
    if len({e.label for e in entries}) < len(entries):
        raise ValueError(f"labels must differ: {[e.label for e in entries]}")
    _expect("targets", targets, torch.int64, (n,))
    grey = (n, *images.shape[1:3])
    _expect("images", images, torch.uint8, grey if images.dim() == 3 else (*grey, 3))
    if targets.min() < 0 or targets.max() >= c:
        raise ValueError(f"targets: class indices must lie in 0..{c - 1}, one per class name")
    for e in entries:
        name, m = f"entry {e.label!r}", max(len(e.ood_probs), 1)
        _expect(f"{name}: probs", e.probs, e.probs.dtype, (n, c))
        _expect(f"{name}: ood_probs", e.ood_probs, e.ood_probs.dtype, (m, c))
        lengths = {key: len(values) for key, values in e.curve.items()}
        missing = {"epoch", "train_loss", "test_nll"} - lengths.keys()
        if lengths and (missing or len({*lengths.values()}) > 1):
            raise ValueError(f"{name}: curve lists missing or of unequal length: {lengths}")


def _expect(name: str, found: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if found.dtype != dtype or found.shape != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {found.dtype} {(*found.shape,)}")
