"""Distributions over weights that are no :class:`posterity.Posterior`, in files as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from posterity import Mixture, Posterior
from posterity.binding import Samples, fill, kept
from posterity.storage import loaded, save


class Saved:
    """A distribution whose attributes, tensors under their names, are a safetensors file."""

    FORMAT: ClassVar[str]
    forms: ClassVar[dict[str, Any]] = {c.FORMAT: c for c in (Posterior, Mixture)}  # of the files

    def __init_subclass__(cls) -> None:
        Saved.forms[cls.FORMAT] = cls

    def packed(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors and facts, such as the class is made of."""
        raise NotImplementedError

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Samples:
        """What :meth:`packed` took apart."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        save(path, self.FORMAT, *self.packed())

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what :meth:`save` wrote; errors as :meth:`posterity.Posterior.load`."""
        with loaded(path, cls.FORMAT) as found:
            return cls.unpacked(*found)

    def state(self, seed: int, index: int) -> dict[str, Tensor]:
        """All that sample ``index`` writes into a model."""
        raise NotImplementedError

    @contextmanager
    def sampled(self, model: nn.Module, seed: int, index: int) -> Iterator[nn.Module]:
        """A context in which the model holds sample ``index``; it then gets back what it held."""
        state = self.state(seed, index)
        with kept(model, state) as own, torch.no_grad():
            fill(own, state)
            yield model


def load(path: Path) -> Samples:
    """Whatever distribution over weights a file holds.

    Raises:
        ValueError: a truncated or foreign file; the message has the path.
    """
    try:
        with safe_open(path, "pt") as file:
            form = (file.metadata() or {}).get("format", "")
    except SafetensorError as error:
        raise ValueError(f"cannot load {path}: {error}") from None
    return Saved.forms.get(form, Posterior).load(path)  # Posterior's error names what it is not
