"""A posterior sample in the parameters; nothing here knows a setting beyond σ's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import distributed
from .distributed import local
from .groups import Group, counter_device, low_precision, state_dtype
from .ops import Ops, choose
from .ops.noise import Noise

PER_RANK = (
    'samples="per_rank" found no products of the ranks: wrap the model in DistributedDataParallel '
    "and call `ddp.register_comm_hook(opt, posterity.reduce_per_rank)`"
)


class Slot:
    """A parameter, its group, its state, and its number: the third word of its noise."""

    __slots__ = ("dtype", "group", "low", "number", "param", "pieces", "state", "state_dtype")

    def __init__(self, param: Tensor, group: Group, state: dict[str, Any], number: int):
        self.param, self.group, self.state, self.number = param, group, state, number
        self.dtype, self.state_dtype = param.dtype, state_dtype(param)
        self.low, self.pieces = low_precision(param), distributed.pieces(param)

    @property
    def values(self) -> Tensor:
        """What all passes work on: this rank's part of a DTensor, else the parameter itself."""
        return self.param if self.pieces is None else local(self.param)

    def fits(self, p: Tensor, group: Group) -> bool:
        """Whether this is still that parameter in that group, where and as it was."""
        hess, count = self.state["hess"], self.state["step"]
        return (
            (self.param is p and self.group is group and self.dtype == p.dtype)
            and (count.device == counter_device(p, group) and count.dtype == torch.float32)
            and (hess.dtype == self.state_dtype and hess.device == p.device)
            and hess.shape == p.shape
        )

    @property
    def ops(self) -> Ops:
        """The implementation that runs for it now; the parameter may have moved since the draw."""
        scattered = self.pieces is not None and len(self.pieces) > 1
        return choose(self.values, self.group["fused"], self.group["capturable"], scattered)

    @property
    def width(self) -> dict[str, Any]:
        """The settings that make σ of the Hessian."""
        return {k: self.group[k] for k in ("ess", "hess_init", "weight_decay")}


def mean_at_rest(slot: Slot) -> Tensor:
    """The mean in the state's precision, of a parameter that no sample stands in."""
    p = slot.values
    if not slot.low:
        return p
    mean = local(slot.state["mean"])  # someone may have loaded other weights since: theirs count
    return mean.copy_(torch.where(mean.to(p.dtype) == p, mean, p.to(mean.dtype)))


Runs = list[tuple[Ops, list[Slot]]]
Spare = dict[int, tuple[Slot, Tensor]]  # memory for the means, by number


def runs(slots: Iterable[Slot]) -> Runs:
    """The slots of each implementation, group and device, in order."""
    found: dict[tuple[int, Ops, torch.device], list[Slot]] = {}
    for slot in slots:
        found.setdefault((id(slot.group), slot.ops, slot.param.device), []).append(slot)
    return [(ops, run) for (_, ops, _), run in found.items()]


def params_of(slots: list[Slot]) -> list[Tensor]:
    """The memory of the slots' parameters."""
    return [s.param if s.pieces is None else local(s.param) for s in slots]


def state_of(slots: list[Slot], name: str) -> list[Tensor]:
    """One tensor of each slot's state, its memory."""
    return [s.state[name] if s.pieces is None else local(s.state[name]) for s in slots]


class Draw:
    """One training sample θ = m + σε. While it is live θ stands in the parameters, else the mean.

    While live, ``means`` keeps the mean (for low-precision parameters the state does that). σε is
    never kept: it is made again where it is needed. Without ``store_mean`` that restores the mean
    too, up to a rounding; so the state notes it (``rounded``), and until the parameter's next step
    every sample keeps its mean: it is rounded once a step at most.
    """

    def __init__(self, seed: int, number: int | Tensor, sign: int, way: str, counted: int = 0):
        self.seed, self.number, self.sign = seed, number, sign
        self.way = way  # "context" or "train": who drew it
        self.counted = counted  # by how much it advanced the number of draws
        self.products: dict[int, Tensor] | None = None  # averaged over ranks, if each has its own
        self.slots: dict[int, Slot] = {}  # by number, as are means and held
        self.live = False
        self.drawn: dict[int, tuple[Slot, dict[str, Any]]] = {}  # σ's settings then, by group
        self.means: dict[int, Tensor] = {}
        self.held: dict[int, tuple[Tensor, int]] = {}  # gradients and their versions

    def noise(self, slots: list[Slot]) -> Noise:
        """The draw's standard normals for these slots."""
        numbers, like, pieces = [s.number for s in slots], params_of(slots), None
        if any(s.pieces is not None for s in slots):
            pieces = [s.pieces for s in slots]
        return Noise(self.seed, self.number, self.sign, numbers, like, pieces)

    def enter(self, runs: Runs, store_mean: bool, spare: Spare) -> None:
        """Put θ into the parameters of ``runs`` and take them up; ``spare`` holds old means."""
        forget_copies()
        self.live = True
        try:
            for ops, run in runs:
                self.drawn[id(run[0].group)] = run[0], run[0].width
                low, kept, lost = [], [], []
                for s in run:
                    keep = store_mean or "rounded" in s.state
                    (low if s.low else kept if keep else lost).append(s)
                for part in (low, kept, lost):
                    if part:
                        self._place(ops, part, part is low, part is kept, spare)
        except BaseException:
            self.leave()
            raise

    def _place(self, ops: Ops, slots: list[Slot], low: bool, keep: bool, spare: Spare) -> None:
        params = params_of(slots)
        if low:
            means = [mean_at_rest(s) for s in slots]
        elif keep:
            means = [_room(spare, s) for s in slots]
        else:
            means = params
        hess, before = state_of(slots, "hess"), [p._version for p in params]
        try:
            ops.sample(params, means, hess, self.noise(slots), keep, **slots[0].width)
        finally:  # after an error the parameters that hold θ by then are to be restored
            for s, p, m, version in zip(slots, params, means, before, strict=True):
                if p._version != version:
                    self.slots[s.number] = s
                    if keep:
                        self.means[s.number] = m
            touch(slots)

    def width(self, slot: Slot) -> dict[str, Any]:
        """The settings that made σ when θ was drawn."""
        return self.drawn[id(slot.group)][1]

    @property
    def outdated(self) -> bool:
        """Whether σ's settings have changed since: the step's own can then not make σε again."""
        return any(width != slot.width for slot, width in self.drawn.values())

    def sources(self, slots: list[Slot], params: list[Tensor]) -> list[Tensor]:
        """Where a step finds the means: kept, or at rest in the parameters, or there under σε."""
        if not self.live:
            return [mean_at_rest(s) for s in slots]
        kept = self.means
        return [
            local(s.state["mean"]) if s.low else kept.get(s.number, p)
            for s, p in zip(slots, params, strict=True)
        ]

    def renew(self, slot: Slot) -> None:
        """Know a parameter that has moved since it was drawn as it is now."""
        if (old := self.slots.get(slot.number)) and old.param is slot.param:
            self.slots[slot.number] = slot
            if slot.number not in self.means:
                return
            if slot.low:  # of the parameter, the state was given θ
                local(slot.state["mean"]).copy_(self.means.pop(slot.number))
            else:
                self.means[slot.number] = self._kept(slot)

    def rank_products(self, slots: list[Slot]) -> list[Tensor] | None:
        """The slots' products, averaged over ranks; None where all ranks have the same sample."""
        if self.products is None:
            return None
        if any(s.number not in self.products for s in slots):
            raise RuntimeError(PER_RANK)
        return [self.products[s.number] for s in slots]

    def forget(self, slots: list[Slot]) -> None:
        """Let go of parameters that a step has brought to their new mean."""
        for s in slots:
            self.slots.pop(s.number, None)
            self.means.pop(s.number, None)

    def leave(self) -> None:
        """Put the mean back."""
        if not self.live:
            return
        if not self.slots:  # a step has brought all to their new mean
            self.means, self.live = {}, False
            return
        for ops, run in runs(self.slots.values()):
            kept, lost = [], []
            for s in run:
                found = s.low or s.number in self.means
                (kept if found else lost).append(s)
            if kept:
                ops.restore(params_of(kept), [self.mean(s) for s in kept])
            if not lost:
                continue
            params, width = params_of(lost), self.width(lost[0])
            before = [p._version for p in params]
            try:
                ops.unsample(params, state_of(lost, "hess"), self.noise(lost), **width)
            finally:  # after an interrupt too: nothing is restored twice
                for s, p, version in zip(lost, params, before, strict=True):
                    if p._version != version:
                        s.state["rounded"] = True
                        self.means[s.number] = p
        touch(self.slots.values())
        self.means, self.live = {}, False
        forget_copies()

    def _kept(self, slot: Slot) -> Tensor:
        p = slot.values
        return self.means[slot.number].to(p.device, p.dtype)  # it may have moved since

    def mean(self, slot: Slot) -> Tensor:
        """The mean while the sample is live."""
        p = slot.values
        if slot.number not in self.slots:
            return mean_at_rest(slot)
        if slot.low:
            return local(slot.state["mean"])
        if slot.number in self.means:
            return self._kept(slot)
        mean = p.detach().clone()
        width = self.width(slot)
        slot.ops.unsample([mean], state_of([slot], "hess"), self.noise([slot]), **width)
        return mean


def touch(slots: Iterable[Slot]) -> None:
    """Tell autograd that DTensors were written: it watches them, not this rank's memory."""
    if parts := [s.param for s in slots if s.pieces is not None]:
        increment_version(parts)


def forget_copies() -> None:
    """Free the copies of the weights that autocast (in low precision) and FSDP2 (whole) keep."""
    torch.clear_autocast_cache()
    distributed.gathered.free()


def _room(spare: Spare, slot: Slot) -> Tensor:
    """Memory for a parameter's mean, kept between steps: fresh pages cost more than the pass."""
    owner, room = spare.get(slot.number, (None, slot.param))
    if owner is not slot:
        p = slot.values
        room = torch.empty(p.shape, dtype=p.dtype, device=p.device)  # row-major
        spare[slot.number] = slot, room
    return room
