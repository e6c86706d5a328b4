"""Batches of inputs and targets, in the forms that people keep them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .binding import items


class Pairs:
    """Batches of (inputs, targets), which can be traversed again."""

    def __init__(self, data: Any, size: int):
        if isinstance(data, Dataset):
            data = DataLoader(data, size)
        elif isinstance(data, tuple):
            inputs, targets = data
            data = _split(inputs, targets, size)
        elif not isinstance(data, Mapping) and iter(data) is data:
            data = list(data)
        self.batches: Iterable[Any] = data

    def __len__(self) -> int:
        return len(self.batches) if isinstance(self.batches, Sized) else 0

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self.batches:
            if isinstance(batch, Mapping):
                inputs = dict(batch)
                targets = inputs.pop("labels", None)
            elif isinstance(batch, (tuple, list)) and len(batch) == 2:
                inputs, targets = batch
            else:
                inputs = targets = None
            if not isinstance(targets, Tensor):
                raise ValueError("needs pairs (inputs, targets), or mappings with 'labels'")
            yield inputs, targets


def _split(inputs: Any, targets: Tensor, size: int) -> list[tuple[Any, Tensor]]:
    """A pair of whole data sets, in batches."""
    lengths = {len(values) for _, values in items(inputs)} | {len(targets)}
    if len(lengths) > 1:
        raise ValueError(f"inputs and targets differ in length: {sorted(lengths)}")
    if not len(targets):
        return []
    parts = [[(name, part) for part in values.split(size)] for name, values in items(inputs)]
    rows = [dict(row) for row in zip(*parts, strict=True)]
    return [(row.get("", row), y) for row, y in zip(rows, targets.split(size), strict=True)]
