"""What the fused implementations share: the face of the reference, over rows of addresses.

A pass takes one row for each tensor and the settings of their group, and goes once over memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .noise import Noise
from .reference import floor

Tensors = Sequence[Tensor]
Number = float | Tensor  # a tensor where the host must not read it

SAMPLE, UNSAMPLE, ACCUMULATE, UPDATE, NORMALS = range(5)  # passes
ROW = struct.Struct("=7Q4qQ")
SETTINGS = struct.Struct("=QQ12d")  # key of the seed, number of the draw, sign, Settings
LOW, LOW_GRAD, REGENERATE, HELD, APART = 1, 2, 4, 8, 16  # flags of a row
DTYPES = (torch.float32, torch.bfloat16)


class Settings(NamedTuple):
    """A group's settings for one pass, in the order in which they are packed."""

    noise: Noise | None
    ess: float
    delta: float
    floor: float
    lr: Number = 0.0
    rate: float = 1.0  # 1−β1, as ρ is 1−β2
    rho: float = 1.0
    clip: float = math.inf
    debias: float = 0.0  # β1 where the momentum is debiased (5)
    grad_scale: Number = 1.0
    product_scale: Number = 1.0
    square_scale: float = 0.0  # > 0: "gradsq"


class Flat:
    """Tensors as row-major memory: their own, or a copy that :meth:`back` writes back."""

    def __init__(self):
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor) -> int:
        """The address of memory to read."""
        if t.is_contiguous():
            return t.data_ptr()
        flat = t.contiguous()
        self.copies.append((t, flat))
        return flat.data_ptr()

    def grad(self, t: Tensor) -> tuple[int, int]:
        """The address of a gradient, and the flag of its dtype."""
        if t.dtype not in DTYPES or t.is_neg():
            t = t.to(torch.float32).resolve_neg()
            self.copies.append((t, t))
        return self(t), LOW_GRAD * (t.dtype == torch.bfloat16)

    def back(self, written: Iterable[Tensor]) -> None:
        """Write back, and tell autograd what changed, which it does not see by itself."""
        written = list(written)
        ours = {id(t) for t in written} if self.copies else ()
        for t, flat in self.copies:
            if id(t) in ours:
                t.copy_(flat)
        increment_version(written)


def row(
    t: Tensor,
    number: int,
    param: int = 0,
    mean: int = 0,
    grad: int = 0,
    sums: tuple[int, int] = (0, 0),
    momentum: int = 0,
    hess: int = 0,
    flags: int = 0,
    step: int = 0,
    start: int = 0,
) -> bytes:
    """What a pass needs to know of one tensor; addresses of 0 where it has no use for them."""
    return ROW.pack(
        *(param, mean, grad, *sums, momentum, hess), *(t.numel(), number, start, flags, step)
    )


def _settings(
    noise: Noise | None,
    *,
    ess: float,
    hess_init: float,
    weight_decay: float,
    lr: Number = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    clip_radius: float = math.inf,
    debias: bool = False,
    scale: Number = 1.0,
    product_scale: Number = 1.0,
    gradsq_scale: float = 0.0,
) -> Settings:
    least, rates = floor(hess_init, weight_decay), (1 - betas[0], 1 - betas[1], clip_radius)
    scales = (betas[0] if debias else 0.0, scale, product_scale, gradsq_scale)
    return Settings(noise, ess, weight_decay, least, lr, *rates, *scales)


class Fused:
    """An implementation that runs each pass once over memory: :meth:`run` is what it must have.

    The other methods are the functions of :mod:`.reference`; the noise must be a ``Noise``, the
    parameters float32 or bfloat16.
    """

    name: str

    def run(
        self,
        kind: int,
        rows: list[bytes],
        settings: Settings,
        at: Tensor,
        done: Callable[[Iterable[int]], None],
        steps: Tensors,
    ) -> None:
        """One pass.

        Args:
            kind: which one.
            rows: as :func:`row` packs them.
            settings: of their group.
            at: a tensor of the device where they are.
            done: to be told which rows have been written, also where an error follows.
            steps: the counters t of an update, which it advances.
        """
        raise NotImplementedError

    def _run(
        self,
        kind: int,
        rows: list[bytes],
        settings: Settings,
        flat: Flat,
        written: Sequence[Tensors],
        steps: Tensors = (),
    ) -> None:
        """One pass, which writes ``written`` of each row and advances ``steps``."""

        def done(which: Iterable[int]) -> None:
            flat.back([t for i in which for t in written[i]])

        if rows:
            self.run(kind, rows, settings, written[0][0], done, steps)

    def sample(
        self,
        params: Tensors,
        means: Tensors,
        hess: Tensors,
        noise: Noise,
        keep: bool = False,
        **width: Any,
    ):
        """θ ~ N(m, σ²); as :func:`.reference.sample`."""
        flat, rows = Flat(), []
        for p, m, h, number in zip(params, means, hess, noise.numbers, strict=True):
            at = 0 if m is p else flat(m)
            flags = LOW * (p.dtype == torch.bfloat16) | APART * (m is not p and not keep)
            rows.append(row(p, number, param=flat(p), mean=at, hess=flat(h), flags=flags))
        written = [(p, m) if keep else (p,) for p, m in zip(params, means, strict=True)]
        self._run(SAMPLE, rows, _settings(noise, **width), flat, written)

    def unsample(self, params: Tensors, hess: Tensors, noise: Noise, **width: Any):
        """θ → m up to one rounding; as :func:`.reference.unsample`."""
        flat = Flat()
        rows = [
            row(p, number, param=flat(p), hess=flat(h))
            for p, h, number in zip(params, hess, noise.numbers, strict=True)
        ]
        self._run(UNSAMPLE, rows, _settings(noise, **width), flat, [(p,) for p in params])

    def accumulate(
        self,
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
        flat, rows = Flat(), []
        for p, total, products, grad, m, h, number in zip(
            noise.like, grad_sums, product_sums, grads, means, hess, noise.numbers, strict=True
        ):
            at, flags = flat.grad(grad)
            flags |= LOW * (p.dtype == torch.bfloat16)
            sums = flat(total), flat(products)
            rows.append(
                row(total, number, mean=flat(m), grad=at, sums=sums, hess=flat(h), flags=flags)
            )
        square = float(hess_approx == "gradsq")
        settings = _settings(noise, gradsq_scale=square, **width)
        written = [*zip(grad_sums, product_sums, strict=True)]
        self._run(ACCUMULATE, rows, settings, flat, written)

    def _update(
        self,
        flat: Flat,
        rows: list[bytes],
        steps: Tensors,
        noise: Noise | None,
        written: Sequence[Tensors],
        *,
        hess_approx: str,
        gradsq_scale: float | None,
        rescale_lr: bool,
        **s,
    ) -> None:
        s["lr"] = s["lr"] * (s["hess_init"] + s["weight_decay"] if rescale_lr else 1)
        square = (gradsq_scale or 0.0) if hess_approx == "gradsq" else 0.0
        settings = _settings(noise, gradsq_scale=square, **s)
        self._run(UPDATE, rows, settings, flat, written, steps)

    def update(
        self,
        means: Tensors,
        grads: Tensors,
        products: Tensors,
        momentum: Tensors,
        hess: Tensors,
        steps: Tensors,
        **s,
    ):
        """Lines (2) to (6) from sums over samples; as :func:`.reference.update`."""
        flat, rows = Flat(), []
        for m, ghat, gd, g, h, t in zip(means, grads, products, momentum, hess, steps, strict=True):
            sums, at = (flat(ghat), flat(gd)), {"momentum": flat(g), "hess": flat(h)}
            rows.append(row(m, 0, param=flat(m), sums=sums, step=t.data_ptr(), **at))
        self._update(flat, rows, steps, None, [*zip(means, momentum, hess, strict=True)], **s)

    def step(
        self,
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
        flat, rows, written = Flat(), [], []
        for p, m, ghat, g, h, t, number in zip(
            params, means, grads, momentum, hess, steps, noise.numbers, strict=True
        ):
            grad, flags = flat.grad(ghat)
            low = p.dtype == torch.bfloat16
            if low:
                flags |= LOW
            elif live:
                flags |= REGENERATE if m is p else HELD
            at = flat(p), 0 if m is p else flat(m), grad, 0, 0, flat(g), flat(h)
            rows.append(ROW.pack(*at, p.numel(), number, 0, flags, t.data_ptr()))
            written.append((p, g, h, m) if low else (p, g, h))
        self._update(flat, rows, steps, noise, written, **s)

    def normals(self, noise: Noise, outs: Tensors, start: int = 0) -> None:
        """Write the draw's normals, from element ``start`` on, into contiguous float32 tensors."""
        rows = [
            row(out, number, hess=out.data_ptr(), start=start)
            for out, number in zip(outs, noise.numbers, strict=True)
        ]
        settings = _settings(noise, ess=1.0, hess_init=1.0, weight_decay=0.0)
        self._run(NORMALS, rows, settings, Flat(), [(out,) for out in outs])
