"""What the fused implementations share: the face of the reference, over rows of addresses.

A pass takes a table, of one row for each tensor, and the settings of their group, and goes once
over memory.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .noise import Noise
from .reference import floor

Tensors = Sequence[Tensor]
Words = Iterable[int]  # 64 bits of each tensor; an array packs by itself
Number = float | Tensor  # a tensor where the host must not read it

SAMPLE, UNSAMPLE, ACCUMULATE, UPDATE, NORMALS, RESTORE = range(6)  # passes
COLUMNS = 12  # of a table: the words of _cpu.cpp's Row, one after another
SETTINGS = struct.Struct("=QQ12d")  # key of the seed, number of the draw, sign, Settings
LOW, LOW_GRAD, REGENERATE, HELD, APART = 1, 2, 4, 8, 16  # flags of a row
DTYPES = (torch.float32, torch.bfloat16)
DTYPE = attrgetter("dtype")


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


class Placed(list[Tensor]):
    """Tensors in row-major memory of their own, apart from that of others, and its addresses.

    For whoever takes steps over the same tensors and would see them move: to ask each of them
    every time takes Python longer than the pass takes.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__(tensors)
        self.at = array("q", map(Tensor.data_ptr, self))
        self.sizes = array("q", map(Tensor.numel, self))
        self.low = [LOW * (t.dtype == torch.bfloat16) for t in self]


def placed(tensors: list[Tensor]) -> Tensors:
    """The tensors with their addresses, where a pass can go over their own memory."""
    return Placed(tensors) if all(map(Tensor.is_contiguous, tensors)) else tensors


class Flat:
    """Tensors as row-major memory: their own, or a copy that :meth:`back` writes back."""

    def __init__(self):
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensors: Tensors) -> array[int]:
        """The addresses of memory to read."""
        if isinstance(tensors, Placed):
            return tensors.at
        if not all(map(Tensor.is_contiguous, tensors)):
            given, tensors = tensors, [t.contiguous() for t in tensors]
            both = zip(given, tensors, strict=True)
            self.copies += ((t, copy) for t, copy in both if copy is not t)
        return array("q", [*map(Tensor.data_ptr, tensors)])

    def means(self, params: Tensors, means: Tensors) -> array[int]:
        """The addresses of means; 0 where the mean's place is the parameter."""
        if means is params:
            return array("q", bytes(8 * len(params)))
        if isinstance(means, Placed):
            return means.at
        apart = [m is not p for p, m in zip(params, means, strict=True)]
        found = iter(self([*compress(means, apart)]))
        return array("q", (next(found) if is_apart else 0 for is_apart in apart))

    def grads(self, grads: Tensors) -> tuple[array[int], list[int]]:
        """The addresses of gradients, and the flags of their dtypes."""
        kinds = {*map(DTYPE, grads)}
        if not kinds <= {*DTYPES} or any(map(Tensor.is_neg, grads)):
            grads = [g if g.dtype in DTYPES else g.float() for g in map(Tensor.resolve_neg, grads)]
            self.copies += ((g, g) for g in grads)
        if torch.bfloat16 not in kinds:
            return self(grads), [0] * len(grads)
        return self(grads), [LOW_GRAD * (kind is torch.bfloat16) for kind in map(DTYPE, grads)]

    def back(self, written: Tensors) -> None:
        """Write back, and tell autograd what changed, which it does not see by itself."""
        ours = {id(t) for t in written} if self.copies else ()
        for t, flat in self.copies:
            if id(t) in ours:
                t.copy_(flat)
        increment_version(written)


def table(
    like: Tensors,
    noise: Noise | None = None,
    *,
    param: Words = (),
    mean: Words = (),
    grad: Words = (),
    sums: tuple[Words, Words] = ((), ()),
    momentum: Words = (),
    hess: Words = (),
    flags: Words = (),
    steps: Words = (),
) -> bytes:
    """What a pass needs to know of each tensor, column by column; 0 where it has no use for it.

    Raises:
        ValueError: columns of different lengths.
    """
    numbers, starts = ((), ()) if noise is None else (noise.numbers, noise.starts)
    sizes = like.sizes if isinstance(like, Placed) else map(Tensor.numel, like)
    columns = param, mean, grad, *sums, momentum, hess, sizes, numbers, starts, flags, steps
    nothing = array("q", bytes(8 * len(like)))
    given = (nothing if column == () else column for column in columns)
    packed = [column if isinstance(column, array) else array("q", column) for column in given]
    if {*map(len, packed)} != {len(like)}:
        raise ValueError("a pass takes lists of as many tensors each")
    return b"".join(packed)


def _low(params: Tensors) -> list[int]:
    if isinstance(params, Placed):
        return params.low
    return [LOW * (p.dtype == torch.bfloat16) for p in params]


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
        packed: bytes,
        settings: Settings,
        at: Tensor,
        done: Callable[[Sequence[int]], None],
        steps: Tensors,
    ) -> None:
        """One pass.

        Args:
            kind: which one.
            packed: the rows, as :func:`table` makes them.
            settings: of their group.
            at: a tensor of the device where they are.
            done: to be told which rows have been written, also where an error follows.
            steps: the counters t of an update, which it advances.
        """
        raise NotImplementedError

    def _run(
        self,
        kind: int,
        packed: bytes,
        settings: Settings,
        flat: Flat,
        written: Sequence[Tensors],
        steps: Tensors = (),
    ) -> None:
        """One pass, which writes ``written``, lists of a tensor for each row."""

        def done(which: Sequence[int]) -> None:
            some = len(which) < len(written[0])
            columns = [[column[i] for i in which] for column in written] if some else written
            flat.back([*chain(*columns)])

        if packed:
            self.run(kind, packed, settings, written[0][0], done, steps)

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
        flat = Flat()
        at, flags = flat.means(params, means), _low(params)
        if not keep:
            flags = [flag | APART * (mean > 0) for flag, mean in zip(flags, at, strict=True)]
        rows = table(*(params, noise), param=flat(params), mean=at, hess=flat(hess), flags=flags)
        written = [params, means] if keep else [params]
        self._run(SAMPLE, rows, _settings(noise, **width), flat, written)

    def restore(self, params: Tensors, means: Tensors):
        """θ → m, which was kept; as :func:`.reference.restore`."""
        flat = Flat()
        rows = table(params, param=flat(params), mean=flat(means), flags=_low(params))
        settings = Settings(None, ess=1.0, delta=0.0, floor=1.0)
        self._run(RESTORE, rows, settings, flat, [params])

    def unsample(self, params: Tensors, hess: Tensors, noise: Noise, **width: Any):
        """θ → m up to one rounding; as :func:`.reference.unsample`."""
        flat = Flat()
        rows = table(params, noise, param=flat(params), hess=flat(hess))
        self._run(UNSAMPLE, rows, _settings(noise, **width), flat, [params])

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
        flat = Flat()
        at, flags = flat.grads(grads)
        rows = table(
            *(grad_sums, noise),
            mean=flat(means),
            grad=at,
            sums=(flat(grad_sums), flat(product_sums)),
            hess=flat(hess),
            flags=map(or_, flags, _low(noise.like)),
        )
        square = float(hess_approx == "gradsq")
        settings = _settings(noise, gradsq_scale=square, **width)
        self._run(ACCUMULATE, rows, settings, flat, [grad_sums, product_sums])

    def _update(
        self,
        flat: Flat,
        packed: bytes,
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
        self._run(UPDATE, packed, settings, flat, written, steps)

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
        flat = Flat()
        rows = table(
            means,
            param=flat(means),
            sums=(flat(grads), flat(products)),
            momentum=flat(momentum),
            hess=flat(hess),
            steps=map(Tensor.data_ptr, steps),
        )
        self._update(flat, rows, steps, None, [means, momentum, hess], **s)

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
        flat = Flat()
        at, (grad, flags), low = flat.means(params, means), flat.grads(grads), _low(params)
        held = [0 if not live else HELD if mean else REGENERATE for mean in at]
        rows = table(
            *(params, noise),
            param=flat(params),
            mean=at,
            grad=grad,
            momentum=flat(momentum),
            hess=flat(hess),
            flags=[flag | (low or held) for flag, low, held in zip(flags, low, held, strict=True)],
            steps=flat(steps),
        )
        written = [params, momentum, hess, *([means] if any(low) else ())]
        self._update(flat, rows, steps, noise, written, **s)

    def normals(self, noise: Noise, outs: Tensors) -> None:
        """Write the draw's normals into contiguous float32 tensors."""
        rows = table(outs, noise, hess=map(Tensor.data_ptr, outs))
        settings = _settings(noise, ess=1.0, hess_init=1.0, weight_decay=0.0)
        self._run(NORMALS, rows, settings, Flat(), [outs])
