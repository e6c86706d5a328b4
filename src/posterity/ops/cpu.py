"""The fused CPU passes of ``_cpu.cpp``, with the reference's face. Noise must be a ``Noise``."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .noise import Noise
from .reference import floor

Tensors = Sequence[Tensor]

LEVELS = ("baseline instructions", "AVX2", "AVX-512")
SAMPLE, UNSAMPLE, ACCUMULATE, UPDATE, NORMALS = range(5)  # as in _cpu.cpp
ROW = struct.Struct("=7Q4qd")
SETTINGS = struct.Struct("=Q11d")
LOW, LOW_GRAD, REGENERATE, HELD = 1, 2, 4, 8  # flags of a row
DTYPES = (torch.float32, torch.bfloat16)

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
    if layout != ROW.size << 16 | SETTINGS.size << 4 | 1:
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


def unfit(p: Tensor, capturable: bool) -> str | None:
    """Why the fused passes do not run for a parameter; None where they do."""
    if capturable:
        return "counters that a graph can capture are not read on the host"
    if type(p) not in (Tensor, torch.nn.Parameter):  # its values may be elsewhere
        return f"there is no fused pass for {type(p).__name__}"
    if p.dtype not in DTYPES:
        return f"there is no fused pass for {p.dtype}"
    if p.device.type != "cpu":
        return f"there is no fused pass for {p.device.type} devices"
    return missing()


def name() -> str:
    """Which instructions run, on how many threads."""
    return f"fused CPU ({LEVELS[_level()]}, {torch.get_num_threads()} threads)"


def _level() -> int:
    return levels() if level is None else level


def _run(
    kind: int, rows: Sequence[bytes], settings: bytes, flat: _Flat, written: Iterable[Tensor]
) -> None:
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    try:
        threads = torch.get_num_threads()
        library.posterity_run(kind, b"".join(rows), len(rows), settings, _level(), threads)
    finally:  # an interrupt comes after the pass, which has written then
        flat.back(written)


class _Flat:
    """Tensors as row-major memory: their own, or a copy that :meth:`back` writes back."""

    def __init__(self):
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor) -> int:
        """The address of memory to read."""
        if t.is_contiguous() and not t.is_neg():
            return t.data_ptr()
        flat = t.resolve_neg().contiguous()
        self.copies.append((t, flat))
        return flat.data_ptr()

    def grad(self, t: Tensor) -> tuple[int, int]:
        """The address of a gradient, and the flag of its dtype."""
        if t.dtype not in DTYPES:
            t = t.to(torch.float32)
            self.copies.append((t, t))
        return self(t), LOW_GRAD * (t.dtype == torch.bfloat16)

    def back(self, written: Iterable[Tensor]) -> None:
        """Write back, and tell autograd what changed, which it does not see by itself."""
        written = list(written)
        ours = {id(t) for t in written}
        for t, flat in self.copies:
            if id(t) in ours:
                t.copy_(flat)
        increment_version(written)


def _settings(
    noise: Noise | None,
    *,
    ess: float,
    hess_init: float,
    weight_decay: float,
    lr: float | Tensor = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    clip_radius: float = math.inf,
    scale: float = 1.0,
    product_scale: float = 1.0,
    gradsq_scale: float = 0.0,
) -> bytes:
    key, sign = (0, 1) if noise is None else (noise.key, noise.sign)
    least = floor(hess_init, weight_decay)
    step = (lr, betas[0], 1 - betas[1], clip_radius, scale, product_scale, gradsq_scale)
    return SETTINGS.pack(key, sign, ess, weight_decay, least, *map(float, step))


def _row(
    t: Tensor,
    number: int,
    param: int = 0,
    mean: int = 0,
    grad: int = 0,
    sums: tuple[int, int] = (0, 0),
    momentum: int = 0,
    hess: int = 0,
    flags: int = 0,
    debias: float = 1.0,
    start: int = 0,
) -> bytes:
    return ROW.pack(
        *(param, mean, grad, *sums, momentum, hess), *(t.numel(), number, start, flags, debias)
    )


def sample(
    params: Tensors, means: Tensors, hess: Tensors, noise: Noise, keep: bool = False, **width: Any
):
    """θ ~ N(m, σ²); as :func:`.reference.sample`."""
    flat, rows = _Flat(), []
    for p, m, h, number in zip(params, means, hess, noise.numbers, strict=True):
        if not (keep or m is p or p.dtype == torch.bfloat16):
            p.copy_(m)
        at = flat(m) if m is not p and (keep or p.dtype == torch.bfloat16) else 0
        low = LOW * (p.dtype == torch.bfloat16)
        rows.append(_row(p, number, param=flat(p), mean=at, hess=flat(h), flags=low))
    written = [*params, *(means if keep else ())]
    _run(SAMPLE, rows, _settings(noise, **width), flat, written)


def unsample(params: Tensors, hess: Tensors, noise: Noise, **width: Any):
    """θ → m up to one rounding; as :func:`.reference.unsample`."""
    flat = _Flat()
    rows = [
        _row(p, number, param=flat(p), hess=flat(h))
        for p, h, number in zip(params, hess, noise.numbers, strict=True)
    ]
    _run(UNSAMPLE, rows, _settings(noise, **width), flat, params)


def accumulate(
    grad_sums: Tensors,
    product_sums: Tensors,
    grads: Tensors,
    means: Tensors,
    hess: Tensors,
    noise: Noise,
    hess_approx: str,
    **width: Any,
):
    """Add a sample to the sums over samples; as :func:`.reference.accumulate`."""
    flat = _Flat()
    rows = []
    for p, total, products, grad, m, h, number in zip(
        noise.like, grad_sums, product_sums, grads, means, hess, noise.numbers, strict=True
    ):
        at, flags = flat.grad(grad)
        flags |= LOW * (p.dtype == torch.bfloat16)
        sums = flat(total), flat(products)
        rows.append(
            _row(total, number, mean=flat(m), grad=at, sums=sums, hess=flat(h), flags=flags)
        )
    square = float(hess_approx == "gradsq")
    settings = _settings(noise, gradsq_scale=square, **width)
    _run(ACCUMULATE, rows, settings, flat, [*grad_sums, *product_sums])


def _update(
    flat: _Flat,
    row: Callable[[int, float], bytes],
    steps: Tensors,
    noise: Noise | None,
    written: Tensors,
    *,
    hess_approx: str,
    gradsq_scale: float | None,
    rescale_lr: bool,
    debias: bool,
    **s,
) -> None:
    for t in steps:
        t += 1
    counts = [float(t) for t in steps]
    factor = {t: 1 / (1 - s["betas"][0] ** t) if debias else 1.0 for t in set(counts)}  # (5)
    s["lr"] = float(s["lr"]) * (s["hess_init"] + s["weight_decay"] if rescale_lr else 1)
    square = (gradsq_scale or 0.0) if hess_approx == "gradsq" else 0.0
    rows = [row(i, factor[t]) for i, t in enumerate(counts)]
    _run(UPDATE, rows, _settings(noise, gradsq_scale=square, **s), flat, written)


def update(
    means: Tensors,
    grads: Tensors,
    products: Tensors,
    momentum: Tensors,
    hess: Tensors,
    steps: Tensors,
    **s,
):
    """Lines (2) to (6) from sums over samples; as :func:`.reference.update`."""
    flat = _Flat()

    def row(i: int, debias: float) -> bytes:
        sums = flat(grads[i]), flat(products[i])
        param, g, h = flat(means[i]), flat(momentum[i]), flat(hess[i])
        return _row(means[i], 0, param=param, sums=sums, momentum=g, hess=h, debias=debias)

    _update(flat, row, steps, None, [*means, *momentum, *hess], **s)


def step(
    params: Tensors,
    means: Tensors,
    grads: Tensors,
    momentum: Tensors,
    hess: Tensors,
    steps: Tensors,
    noise: Noise,
    live: bool,
    **s,
):
    """Lines (2) to (6) from one sample, in one pass; as :func:`.reference.step`."""
    flat = _Flat()

    def row(i: int, debias: float) -> bytes:
        p, m = params[i], means[i]
        grad, flags = flat.grad(grads[i])
        if p.dtype == torch.bfloat16:
            flags |= LOW
        elif live:
            flags |= REGENERATE if m is p else HELD
        return _row(
            *(p, noise.numbers[i]),
            param=flat(p),
            mean=0 if m is p else flat(m),
            grad=grad,
            momentum=flat(momentum[i]),
            hess=flat(hess[i]),
            flags=flags,
            debias=debias,
        )

    low = [m for p, m in zip(params, means, strict=True) if p.dtype == torch.bfloat16]
    _update(flat, row, steps, noise, [*params, *low, *momentum, *hess], **s)


def normals(noise: Noise, outs: Tensors, start: int = 0) -> None:
    """Write the draw's normals, from the element ``start`` on, into contiguous float32 tensors."""
    rows = [
        _row(out, number, hess=out.data_ptr(), start=start)
        for out, number in zip(outs, noise.numbers, strict=True)
    ]
    settings = _settings(noise, ess=1.0, hess_init=1.0, weight_decay=0.0)
    _run(NORMALS, rows, settings, _Flat(), outs)
