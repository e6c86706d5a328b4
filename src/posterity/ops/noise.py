"""Counter-based standard normals: a pure function of (seed, draw, parameter, element).

Nothing is stored, any element can be regenerated alone, and every implementation gives the same
numbers. Threefry-2x32 with 13 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) makes the bits; Box–Muller makes the normals.

Layout. A tensor is cut into chunks of 256 elements in row-major order. Counter ``128·chunk + i``
(two 32-bit words) gives two normals: the cosine one is element ``i`` of the chunk, the sine one is
element ``128 + i``. The key is ``fold(fold(fold(0, seed), draw), parameter)``. All integers
are taken modulo 2^64; draws made for evaluation count down from -1, so they never meet those of
training, which count up from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice

import torch
from torch import Tensor

CHUNK = 256  # elements; half of them are cosine, half sine
HALF = CHUNK // 2
ROUNDS = 13  # the fewest of which the authors knew no statistical fault
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
BLOCK = 2048  # chunks per pass: bounds the working memory, changes no value
MASK = (1 << 32) - 1
SIGN = -(1 << 31)

Key = tuple[Tensor, Tensor]  # two int32 words


def _signed(word: int, bits: int) -> int:
    """The signed integer with the low bits of a word (torch has no full unsigned arithmetic)."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def threefry(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-13 of counters ``c`` under keys ``k``: int32 tensors that broadcast."""
    key = (k0, k1, k0 ^ k1 ^ PARITY)
    x0, x1 = (x.contiguous() for x in torch.broadcast_tensors(c0 + k0, c1 + k1))  # our own
    high = torch.empty_like(x1)
    for i in range(1, ROUNDS + 1):
        r = ROTATIONS[(i - 1) % 8]
        x0 += x1
        torch.bitwise_right_shift(x1, 32 - r, out=high)  # arithmetic: mask the sign bits off
        torch.add(high.bitwise_and_((1 << r) - 1), x1, alpha=1 << r, out=x1)  # rotated by r
        x1 ^= x0
        if i % 4 == 0:
            x0 += key[i // 4 % 3]
            x1 += key[(i // 4 + 1) % 3] + i // 4
    return x0, x1


def fold(key: Key, data: Tensor) -> Key:
    """New keys from a key and 64 bits of data (int64 tensor): as many as there are data."""
    return threefry(*key, data.to(torch.int32), (data >> 32).to(torch.int32))


@lru_cache(maxsize=64)
def fold_int(key: tuple[int, int], data: int) -> tuple[int, int]:
    """:func:`fold` of Python integers, unsigned: what takes some eighty operations, at once."""
    words = (*key, key[0] ^ key[1] ^ PARITY)
    x0, x1 = (data + words[0]) & MASK, ((data >> 32) + words[1]) & MASK
    for i in range(1, ROUNDS + 1):
        r = ROTATIONS[(i - 1) % 8]
        x0 = (x0 + x1) & MASK
        x1 = (x1 << r & MASK | x1 >> (32 - r)) ^ x0
        if i % 4 == 0:
            x0 = (x0 + words[i // 4 % 3]) & MASK
            x1 = (x1 + words[(i // 4 + 1) % 3] + i // 4) & MASK
    return x0, x1


def draw_key(seed: int, draw: int | Tensor, device: torch.device | str = "cpu") -> Key:
    """The key of one draw. ``draw`` may be an int64 tensor, so that a CUDA graph can advance it."""
    words = fold_int((0, 0), int(seed))
    if not isinstance(draw, Tensor):
        words = fold_int(words, int(draw))
    k0, k1 = (  # filled on the device: nothing to copy there
        torch.full((), _signed(word, 32), dtype=torch.int32, device=device) for word in words
    )
    return fold((k0, k1), draw.to(device)) if isinstance(draw, Tensor) else (k0, k1)


def box_muller(x0: Tensor, x1: Tensor, first: Tensor, second: Tensor) -> None:
    """Two independent standard normals from 64 bits, written to ``first`` and ``second``.

    31 bits of ``x0`` make u in (0, 1], so |z| < 6.7. The angle is a half turn (the top bit of
    ``x1``), a quarter turn (the next) and an offset within ±π/4 (the other 30), which keeps its
    full relative precision. Up to the conversion of both to float32 (and the .5 added there) every
    implementation has the same bits; after it the last few may differ.
    """
    u = (x0.bitwise_right_shift(1) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    radius = u.log_().mul_(-2).sqrt_()
    radius.view(torch.int32).bitwise_xor_(x1 & SIGN)  # half a turn: the other sign
    offset = x1.bitwise_left_shift(2).float().mul_(math.pi / 4 * 2.0**-31)
    torch.cos(offset, out=first).mul_(radius)
    torch.sin(offset, out=second).mul_(radius)
    # A quarter turn, (cos, sin) → (-sin, cos), by masks: torch.where costs more than the cosine.
    cos, sin = first.view(torch.int32), second.view(torch.int32)
    quarter = (x1 << 1) >> 31  # all ones or all zeros
    swap = (cos ^ sin).bitwise_and_(quarter)
    sin ^= swap
    cos ^= swap.bitwise_xor_(quarter.bitwise_and_(SIGN))


def normals(
    key: Key, parameters: Sequence[int], counts: Sequence[int], starts: Sequence[int] | None = None
) -> list[Tensor]:
    """Standard normals for several tensors of one draw.

    Args:
        key: of the draw, from :func:`draw_key`; the normals are made on its device.
        parameters: number of each tensor (position in the optimizer, or a hash of its name).
        counts: how many elements of each tensor to make.
        starts: row-major index of the first element of each; default 0.

    Returns:
        One flat float32 tensor of ``counts[i]`` elements for each tensor, in order; they are views
        of one storage.

    The chunks of all tensors run through the same few vector operations, :data:`BLOCK` chunks at
    a time so that they stay in cache: many small tensors cost no more than one large one.
    """
    device = key[0].device
    starts = starts or [0] * len(counts)
    first = [start // CHUNK for start in starts]  # the chunk that holds each tensor's first element
    chunks = [
        (start + count - 1) // CHUNK - base + 1 if count else 0
        for start, count, base in zip(starts, counts, first, strict=True)
    ]
    last = list(accumulate(chunks))
    shifts = [base + size - end for base, size, end in zip(first, chunks, last, strict=True)]
    table = [[_signed(p, 64) for p in parameters], shifts, last]
    words, shift, ends = torch.tensor(table, dtype=torch.int64, device=device)
    keys = fold(key, words)
    total, lane = sum(chunks), torch.arange(HALF, dtype=torch.int32, device=device)
    out = torch.empty(total, 2, HALF, dtype=torch.float32, device=device)
    for begin in range(0, total, BLOCK):  # row: a chunk's place in `out`; its tensor owns it
        row = torch.arange(begin, min(begin + BLOCK, total), device=device)
        owner = torch.searchsorted(ends, row, right=True)
        counter = ((row + shift[owner]) * HALF)[:, None]
        low, high = counter.int() + lane, (counter >> 32).int()  # the lane never carries
        k0, k1 = (k[owner, None] for k in keys)
        x0, x1 = threefry(k0, k1, low, high)
        block = out[begin : begin + BLOCK]
        box_muller(x0, x1, block[:, 0], block[:, 1])
    pieces = out.view(-1, CHUNK).split(chunks)
    return [
        piece.flatten()[start - base * CHUNK :][:count]
        for piece, start, base, count in zip(pieces, starts, first, counts, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Noise:
    """The standard normals of one draw for several tensors, made when they are asked for.

    Args:
        seed: of the optimizer.
        draw: number of the draw; an int64 tensor where a CUDA graph advances it.
        sign: −1 for the second of an antithetic pair.
        numbers: of each tensor.
        like: tensors of each one's number of elements and device.
        pieces: where each lies in the tensor whose noise it takes, as first row-major index and
            length of its contiguous parts; None for a whole tensor.

    Iterating gives one flat float32 tensor for each, on its device.
    """

    seed: int
    draw: int | Tensor
    sign: int
    numbers: Sequence[int]
    like: Sequence[Tensor]
    pieces: Sequence[Sequence[tuple[int, int]] | None] | None = None

    @property
    def starts(self) -> Sequence[int]:
        """The first index of each, where it is one piece; empty where all are whole."""
        if self.pieces is None:
            return ()
        return [0 if parts is None else parts[0][0] for parts in self.pieces]

    @property
    def key(self) -> int:
        """The seed's key as 64 bits, the first word low."""
        low, high = fold_int((0, 0), int(self.seed))
        return low | high << 32

    def __iter__(self) -> Iterator[Tensor]:
        made: dict[int, Tensor] = {}
        for device in dict.fromkeys(t.device for t in self.like):
            here = [i for i, t in enumerate(self.like) if t.device == device]
            key = draw_key(self.seed, self.draw, device)
            parts = [self._pieces(i) for i in here]
            numbers = [self.numbers[i] for i, mine in zip(here, parts, strict=True) for _ in mine]
            starts, counts = zip(*(piece for mine in parts for piece in mine), strict=True)
            flat = iter(normals(key, numbers, counts, starts))
            for i, mine in zip(here, parts, strict=True):
                made[i] = torch.cat([*islice(flat, len(mine))]) if len(mine) > 1 else next(flat)
        for i in range(len(self.like)):
            yield made[i] if self.sign > 0 else -made[i]

    def _pieces(self, i: int) -> Sequence[tuple[int, int]]:
        return (self.pieces[i] if self.pieces else None) or [(0, self.like[i].numel())]
