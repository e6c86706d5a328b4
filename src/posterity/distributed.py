"""Ranks: what they must share, which part of a tensor is theirs, and a sample for each."""

import gc
import math
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore

Pieces = Sequence[tuple[int, int]]  # first row-major index and length of each contiguous part


def alone() -> bool:
    """Whether there are no other ranks to agree with."""
    return world() == 1


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return 0 if alone() else dist.get_rank()


def broadcast(words: list[int]) -> list[int]:
    """Rank 0's integers on every rank."""
    message: list[Any] = [words]
    dist.broadcast_object_list(message, src=0)  # finds the device that the backend needs
    return message[0]


def total(t: Tensor) -> Tensor:
    """The sum over ranks."""
    summed = t.clone()
    dist.all_reduce(summed)
    return summed


def largest(t: Tensor) -> Tensor:
    """The element-wise maximum over ranks."""
    found = t.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


class Fingerprint(NamedTuple):
    """The sizes of a rank's whole parameters, and of their gradients."""

    params: list[float]
    grads: list[float]


def fingerprint(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Fingerprint | None:
    """Of those that are not sharded; None where a gradient is not finite."""
    mine = [(p, g) for p, g in zip(params, grads, strict=True) if not is_sharded(p)]
    found = Fingerprint([_size(p) for p, _ in mine], [_size(g) for _, g in mine])
    return found if all(map(math.isfinite, found.grads)) else None


def _size(t: Tensor) -> float:
    """The norm, in the tensor's precision or float32: another one takes a copy."""
    return float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)))


def unaveraged(own: Fingerprint | None) -> bool | None:
    """Whether ranks with the same parameters have gradients of their own; all must call this.

    None where no rank has any. Ranks that train other parameters than each other (pipelines,
    experts) may have gradients of their own; they are told by their parameters' sizes.
    """
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, own)
    first, *others = [each for each in every if each] or [None]
    if first is None:
        return None
    return any(_close(o.params, first.params) and not _close(o.grads, first.grads) for o in others)


def _close(ours: list[float], theirs: list[float]) -> bool:
    """Up to rounding, which is all there is of a gradient that should be zero."""
    near = partial(math.isclose, rel_tol=1e-5, abs_tol=1e-5 * max(theirs, default=0.0))
    return len(ours) == len(theirs) and all(map(near, ours, theirs))


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor (told by its face: importing the class takes seconds)."""
    return type(t) is not nn.Parameter and type(t) is not Tensor and hasattr(t, "device_mesh")


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor: its memory; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t  # pyright: ignore


def like(values: Tensor, t: Tensor) -> Tensor:
    """This rank's values as a tensor of the same parts as ``t``."""
    if not is_sharded(t):
        return values
    from torch.distributed.tensor import DTensor

    where = t.device_mesh, t.placements  # pyright: ignore
    return DTensor.from_local(values, *where, run_check=False, shape=t.shape, stride=t.stride())


@torch.no_grad()
def placed(t: Tensor, p: Tensor) -> Tensor:
    """A DTensor's gradient in the parts of its parameter; all ranks must call this."""
    if not is_sharded(t):
        raise RuntimeError(f"a sharded parameter {tuple(p.shape)} has a gradient that is not")
    if t.placements == p.placements:  # pyright: ignore
        return t
    return t.redistribute(p.device_mesh, p.placements)  # pyright: ignore


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """A tensor from the parts of all ranks, which must all call this."""
    return t.full_tensor() if is_sharded(t) else t  # pyright: ignore


def pieces(p: Tensor) -> Pieces | None:
    """Where this rank's part of a DTensor lies in the whole; None for any other tensor.

    Raises:
        ValueError: a placement other than Shard and Replicate.
    """
    if not is_sharded(p):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements  # pyright: ignore
    if any(type(placement) not in (Replicate, Shard) for placement in placements):
        raise ValueError(
            f"IVON knows the placements Shard and Replicate; a parameter of global shape "
            f"{tuple(p.shape)} has {placements}. For tensor parallelism inside FSDP, shard "
            "another dimension: fully_shard(..., shard_placement_fn=...)"
        )
    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    return boxes(tuple(p.shape), tuple(shape), tuple(offset))


def boxes(whole: Sequence[int], shape: Sequence[int], offset: Sequence[int]) -> Pieces:
    """The contiguous parts of a box in a row-major tensor.

    >>> boxes((4, 6), (2, 6), (2, 0))
    [(12, 12)]
    >>> boxes((4, 6), (4, 3), (0, 3))
    [(3, 3), (9, 3), (15, 3), (21, 3)]
    """
    if not math.prod(shape):
        return [(0, 0)]
    cut = max((d for d in range(len(whole)) if shape[d] != whole[d]), default=0)
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    length = math.prod(shape[cut:])
    first = sum(o * s for o, s in zip(offset, strides, strict=True))
    outer = product(*(range(n) for n in shape[:cut]))
    return [(first + sum(map(int.__mul__, at, strides)), length) for at in outer]


class _Gathered:
    """The modules of FSDP2, which may hold whole parameters that a write to a shard misses.

    After a forward pass without a backward pass the root stays gathered.
    """

    def __init__(self):
        self.modules: list[weakref.ref[Any]] = []

    def find(self) -> None:
        """Look for modules: they are wrapped before the optimizer is built, and not known to it."""
        from torch.distributed.fsdp import FSDPModule

        found = [o for o in gc.get_objects() if issubclass(type(o), FSDPModule)]
        self.modules = [weakref.ref(module) for module in found]

    def free(self) -> None:
        """Let the next forward pass gather anew."""
        for ref in self.modules:
            if (module := ref()) is not None:
                module.reshard()


gathered = _Gathered()


def reduce_per_rank(optimizer: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The hook of DistributedDataParallel that ``samples="per_rank"`` needs.

    Every rank draws a sample of its own, so W ranks are W Monte Carlo samples. The estimator of
    the Hessian needs the product of each rank's own gradient and displacement, before gradients
    are averaged: this hook makes it and averages both, while the backward pass goes on. That is
    twice the words of plain data parallelism. Both are averaged over all ranks: a
    DistributedDataParallel over some of them only (``process_group=``) is not for this hook.

    Example::

        ddp = DistributedDataParallel(model)
        opt = IVON(ddp.parameters(), lr, ess=ess, samples="per_rank")
        ddp.register_comm_hook(opt, posterity.reduce_per_rank)
    """
    buffer, window, params = bucket.buffer(), optimizer._window, bucket.parameters()
    if alone():
        ready: torch.futures.Future[Tensor] = torch.futures.Future()
        ready.set_result(buffer)
        return ready
    products = window.rank_products(params, bucket.gradients())
    grads, both = (dist.all_reduce(t, async_op=True) for t in (buffer, products))
    assert grads is not None
    assert both is not None

    def share(_: Any) -> Tensor:
        grads.wait()
        window.keep_products(params, products.div_(world()))
        return buffer.div_(world())

    return both.get_future().then(share)
