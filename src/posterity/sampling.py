"""A posterior sample in the parameters; nothing here knows a setting beyond σ's."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from operator import attrgetter, ne
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import distributed
from .distributed import local
from .ops.fused import Tensors
from .ops.noise import Noise
from .ops.reference import curvature
from .slots import Run, Slot, Spare, mean_at_rest, runs, state_of

VERSION = attrgetter("_version")
PER_RANK = (
    'samples="per_rank" found no products of the ranks: wrap the model in DistributedDataParallel '
    "and call `ddp.register_comm_hook(opt, posterity.reduce_per_rank)`"
)


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
        self.parts: list[tuple[Run, Tensors]] | None = []  # that hold θ, and means; None: look

    def noise(self, run: Run) -> Noise:
        """The draw's standard normals for these slots."""
        return Noise(self.seed, self.number, self.sign, run.numbers, run.params, run.pieces)

    def enter(self, runs: Iterable[Run], store_mean: bool, spare: Spare | None) -> None:
        """Put θ into the parameters of ``runs`` and take them up; ``spare`` holds old means."""
        forget_copies()
        self.live = True
        try:
            for run in runs:
                self.drawn[id(run.group)] = run.slots[0], run.width
                kept = [store_mean or "rounded" in s.state for s in run.slots]
                for part, keep in run.parts(kept):
                    self._place(part, keep, spare)
        except BaseException:
            self.leave()
            raise

    def _place(self, run: Run, keep: bool, spare: Spare | None) -> None:
        apart = keep and not run.low
        means = run.rooms(spare) if apart else run.masters
        parts, self.parts = self.parts, None
        sampled = Written(run.params)
        try:
            kept = apart or run.low  # these may hold other weights than their mean's rounding
            run.ops.sample(run.params, means, run.hess, self.noise(run), kept, **run.width)
            sampled.whole = True
        finally:  # after an error the parameters that hold θ by then are to be restored
            now = sampled.each()
            self.slots.update(compress(zip(run.numbers, run.slots, strict=True), now))
            if apart:
                self.means.update(compress(zip(run.numbers, means, strict=True), now))
            touch(run)
        if parts is not None and not run.sharded:
            self.parts = [*parts, (run, means)]

    def width(self, slot: Slot) -> dict[str, Any]:
        """The settings that made σ when θ was drawn."""
        return self.drawn[id(slot.group)][1]

    def narrowed(self, slot: Slot) -> Tensor | float:
        """λ(h+δ) of the draw over what it is now, by which (2) would take the products for less."""
        if slot.group["hess_approx"] != "price":
            return 1.0
        h, then, now = local(slot.state["hess"]), dict(self.width(slot)), slot.width
        ess = then.pop("ess") / now.pop("ess")
        return ess * curvature(h, **then) / curvature(h, **now)

    @property
    def outdated(self) -> bool:
        """Whether σ's settings have changed since: the step's own can then not make σε again."""
        return any(width != slot.width for slot, width in self.drawn.values())

    def sources(self, run: Run) -> Tensors:
        """Where a step finds the means: kept, or at rest in the parameters, or there under σε."""
        if not self.live:
            return run.at_rest()
        for part, means in self.parts or ():
            if part.slots == run.slots:
                return run.params if means is part.params else means
        if run.low:
            return state_of(run.slots, "mean")
        return [self.means.get(n, p) for n, p in zip(run.numbers, run.params, strict=True)]

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

    def forget(self, run: Run, stepped: list[bool]) -> None:
        """Let go of the parameters that a step has brought to their new mean."""
        if all(stepped) and len(stepped) == len(self.slots):
            self.slots, self.means = {}, {}
        for number in compress(run.numbers, stepped) if self.slots else ():
            self.slots.pop(number, None)
            self.means.pop(number, None)
        left = [part for part in self.parts or () if part[0].slots != run.slots]
        whole = all(stepped) and len(left) < len(self.parts or ())
        self.parts = left if whole else None

    def leave(self) -> None:
        """Put the mean back."""
        if not self.live:
            return
        if not self.slots:  # a step has brought all to their new mean
            self.means, self.parts, self.live = {}, [], False
            return
        parts = self._standing() if self.parts is None else self.parts
        self.parts = None  # after an interrupt look again: nothing is restored twice
        for run, means in parts:
            if means is not run.params:
                run.ops.restore(run.params, means)
                continue
            width, restored = self.width(run.slots[0]), Written(run.params)
            try:
                run.ops.unsample(run.params, run.hess, self.noise(run), **width)
                restored.whole = True
            finally:
                for s, p in compress(zip(run.slots, run.params, strict=True), restored.each()):
                    s.state["rounded"] = True
                    self.means[s.number] = p
        for run, _ in parts:
            touch(run)
        self.means, self.parts, self.live = {}, [], False
        forget_copies()

    def _standing(self) -> list[tuple[Run, Tensors]]:
        """The parameters that hold θ, with their means; where these are lost, the parameters."""
        found = []
        for run in runs(self.slots.values()):
            kept = [run.low or n in self.means for n in run.numbers]
            for part, keep in run.parts(kept):
                means = [self.mean(s) for s in part.slots] if keep else part.params
                found.append((part, means))
        return found

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
        width, run = self.width(slot), Run(slot.ops, [slot])
        run.ops.unsample([mean], run.hess, self.noise(run), **width)
        return mean


class Written:
    """Which parameters a pass writes: all, once it is ``whole``; else those whose version moved."""

    def __init__(self, params: Tensors):
        self.params, self.before, self.whole = params, [*map(VERSION, params)], False

    def each(self) -> list[bool]:
        """Whether it has written each of them."""
        if self.whole:
            return [True] * len(self.before)
        return [*map(ne, map(VERSION, self.params), self.before)]


def touch(run: Run) -> None:
    """Tell autograd that DTensors were written: it watches them, not this rank's memory."""
    if run.sharded:
        increment_version([s.param for s in run.slots if s.pieces is not None])


def forget_copies() -> None:
    """Free the copies of the weights that autocast (in low precision) and FSDP2 (whole) keep."""
    torch.clear_autocast_cache()
    distributed.gathered.free()
