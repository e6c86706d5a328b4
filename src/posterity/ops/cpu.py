"""The fused CPU passes of ``_cpu.cpp``."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .fused import COLUMNS, SETTINGS, Fused, Settings, Tensors

LEVELS = ("baseline instructions", "AVX2", "AVX-512")

level: int | None = None  # of instructions; None takes the best that the machine has


@cache
def _library() -> ctypes.CDLL | str:
    """The extension, or why there is none."""
    spec = importlib.util.find_spec("posterity.ops._cpu")
    if spec is None or spec.origin is None:
        return (
            "this build holds no fused pass: no C++ compiler could build it when it was installed"
        )
    try:
        library = ctypes.CDLL(spec.origin)
        layout = library.posterity_layout()
    except (OSError, AttributeError) as error:
        return f"{spec.origin} cannot be used: {error}"
    if layout != 8 * COLUMNS << 16 | SETTINGS.size << 4 | 6:
        return f"{spec.origin} was built from other sources: install posterity again"
    library.posterity_run.restype = None
    library.posterity_run.argtypes = (
        *(ctypes.c_int, ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p),
        *(ctypes.c_int, ctypes.c_int),
    )
    return library


@cache
def levels() -> int:
    """How many instruction sets can run here beside the baseline."""
    library = _library()
    return 0 if isinstance(library, str) else library.posterity_levels()


def missing() -> str | None:
    """Why no fused pass runs here at all; None where one does."""
    library = _library()
    return library if isinstance(library, str) else None


class Cpu(Fused):
    """The passes on CPU tensors."""

    @property
    def name(self) -> str:
        """Which instructions run, on how many threads."""
        return f"fused CPU ({LEVELS[_level()]}, {torch.get_num_threads()} threads)"

    def run(
        self,
        kind: int,
        packed: bytes,
        settings: Settings,
        at: Tensor,
        done: Callable[[Sequence[int]], None],
        steps: Tensors,
    ) -> None:
        """One call for all rows."""
        library, noise = _library(), settings.noise
        assert isinstance(library, ctypes.CDLL)
        place = (0, 0, 1) if noise is None else (noise.key, int(noise.draw) % 2**64, noise.sign)
        how = SETTINGS.pack(*place, *map(float, settings[1:]))
        rows, threads = len(packed) // (8 * COLUMNS), torch.get_num_threads()
        try:
            library.posterity_run(kind, packed, rows, how, _level(), threads)
        finally:  # an interrupt comes after the pass, which has written then
            done(range(rows))


def _level() -> int:
    return levels() if level is None else level


passes = Cpu()
