"""The maths of IVON in every implementation, and the one place that chooses between them.

An implementation has the functions ``sample``, ``unsample``, ``accumulate``, ``update`` and
``step`` of :mod:`.reference`, over lists of tensors of one device.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from ..distributed import is_sharded, local, pieces
from . import cpu, fused, noise, reference

__all__ = ["Ops", "choose", "cpu", "describe", "fused", "noise", "reference"]

Ops = ModuleType | fused.Fused


def _triton() -> fused.Fused | str:
    """The fused CUDA passes, or why there are none. Imported only where a parameter needs them."""
    try:
        from .triton import passes
    except ImportError as error:
        return f"the fused pass for CUDA needs Triton: {error}"
    return passes


@cache
def _fused(
    kind: type, dtype: torch.dtype, device: str, capturable: bool, scattered: bool
) -> fused.Fused | str:
    """The fused implementation for a kind of parameter, or why there is none."""
    if scattered:
        return "a part that is sharded along another dimension than the first has no fused pass"
    if kind not in (Tensor, nn.Parameter):  # its values may be elsewhere
        return f"there is no fused pass for {kind.__name__}"
    if dtype not in fused.DTYPES:
        return f"there is no fused pass for {dtype}"
    if device == "cuda":
        return _triton()
    if device != "cpu":
        return f"there is no fused pass for {device} devices"
    if capturable:
        return "the host does not read counters that a graph can capture"
    return cpu.missing() or cpu.passes


def _best(p: Tensor, capturable: bool, scattered: bool | None = None) -> fused.Fused | str:
    if scattered is None:
        scattered = is_sharded(p) and len(pieces(p) or ()) > 1
    return _fused(type(local(p)), p.dtype, p.device.type, capturable, scattered)


def choose(
    p: Tensor, fused: bool | None, capturable: bool = False, scattered: bool | None = None
) -> Ops:
    """The implementation that runs for a parameter.

    Args:
        p: the parameter.
        fused: None takes the best one there is, True insists on a fused one, False asks for the
            reference.
        capturable: whether counters are tensors that the host must not read.
        scattered: whether this rank's part of a DTensor is in several pieces; None finds out.

    Raises:
        RuntimeError: ``fused=True`` and no fused implementation runs for it.
    """
    if fused is False:
        return reference
    found = _best(p, capturable, scattered)
    if not isinstance(found, str):
        return found
    if fused:
        raise RuntimeError(
            f"fused=True, but {found}: pass fused=None to take the best implementation there is"
        )
    return reference


def describe(params: Iterable[Tensor], fused: bool | None, capturable: bool = False) -> str:
    """Which implementations run for these parameters, and why, in words."""
    if fused is False:
        return "reference (asked for by fused=False)"
    each = [_best(p, capturable) for p in params] or [cpu.missing() or cpu.passes]
    words = [f"reference ({e})" if isinstance(e, str) else e.name for e in each]
    found = sorted(dict.fromkeys(words), key=lambda w: w.startswith("reference"))  # fused first
    if len(found) == 1:
        return words[0]
    return "; ".join(f"{w} for {words.count(w)} of {len(words)} parameters" for w in found)
