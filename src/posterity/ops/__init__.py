"""The maths of IVON in every implementation, and the one place that chooses between them."""

from __future__ import annotations

from types import ModuleType

from . import noise, reference

__all__ = ["choose", "noise", "reference"]


def choose(fused: bool | None) -> tuple[ModuleType, str]:
    """The implementation to run and, in words, which one it is and why.

    Args:
        fused: None takes the best one there is, True insists on a fused one, False asks for the
            reference.

    Raises:
        RuntimeError: ``fused=True`` and this build holds no fused implementation.
    """
    if fused:
        raise RuntimeError(
            "fused=True, but this build of posterity holds no fused implementation: "
            "pass fused=None to take the best one there is (here the reference)"
        )
    why = "asked for by fused=False" if fused is False else "this build holds no fused one"
    return reference, f"reference ({why})"
