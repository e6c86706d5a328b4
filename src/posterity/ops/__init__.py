"""The maths of IVON in every implementation, and the one place that chooses between them.

An implementation is a module with the functions ``sample``, ``unsample``, ``accumulate``,
``update`` and ``step`` of :mod:`.reference`, over lists of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from torch import Tensor

from . import cpu, noise, reference

__all__ = ["choose", "cpu", "describe", "noise", "reference"]


def choose(p: Tensor, fused: bool | None, capturable: bool = False) -> ModuleType:
    """The implementation that runs for a parameter.

    Args:
        p: the parameter.
        fused: None takes the best one there is, True insists on a fused one, False asks for the
            reference.
        capturable: whether counters are tensors that the host must not read.

    Raises:
        RuntimeError: ``fused=True`` and no fused implementation runs for it.
    """
    if fused is False:
        return reference
    if why := cpu.unfit(p, capturable):
        if fused:
            raise RuntimeError(
                f"fused=True, but {why}: pass fused=None to take the best implementation there is"
            )
        return reference
    return cpu


def describe(params: Iterable[Tensor], fused: bool | None, capturable: bool = False) -> str:
    """Which implementations run for these parameters, and why, in words."""
    if fused is False:
        return "reference (asked for by fused=False)"
    reasons = [cpu.unfit(p, capturable) for p in params] or [cpu.missing()]
    found = [] if all(reasons) else [cpu.name()]
    for why in dict.fromkeys(filter(None, reasons)):
        number = reasons.count(why)
        some = "" if number == len(reasons) else f" for {number} of {len(reasons)} parameters"
        found.append(f"reference{some} ({why})")
    return "; ".join(found)
