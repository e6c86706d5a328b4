"""Posterior samples in the parameters, and the window of those that wait for a step.

All three ways to train go through :class:`Window`; nothing here knows a setting beyond σ's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import distributed
from .distributed import local
from .groups import Group, low_precision, state_dtype
from .ops import Ops, choose
from .ops.noise import Noise

SUMS = ("grad_sum", "product_sum")  # of the window's finished samples, in the state until step()
CHANGED = (
    "a gradient changed after its sampling context was left, where it can no longer count. Clip, "
    "unscale and accumulate inside `with opt.sampled_params(train=True):`; only with a single "
    "sample before step() do changes in place after it count too."
)
PER_RANK = (
    'samples="per_rank" found no products of the ranks: wrap the model in DistributedDataParallel '
    "and call `ddp.register_comm_hook(opt, posterity.reduce_per_rank)`"
)
TWICE = (
    'samples="per_rank": a second backward pass with this sample would average its gradients '
    "twice: run all but the last inside `with ddp.no_sync():`"
)


class Slot:
    """A parameter, its group, its state, and its number: the third word of its noise."""

    __slots__ = ("dtype", "group", "number", "param", "pieces", "state", "state_dtype")

    def __init__(self, param: Tensor, group: Group, state: dict[str, Any], number: int):
        self.param, self.group, self.state, self.number = param, group, state, number
        self.dtype, self.state_dtype = param.dtype, state_dtype(param)
        self.pieces = distributed.pieces(param)

    @property
    def values(self) -> Tensor:
        """What all passes work on: this rank's part of a DTensor, else the parameter itself."""
        return self.param if self.pieces is None else local(self.param)

    def fits(self, p: Tensor, group: Group) -> bool:
        """Whether this is still that parameter in that group, where and as it was."""
        hess = self.state["hess"]
        return (self.param is p and self.group is group and self.dtype == p.dtype) and (
            hess.dtype == self.state_dtype and hess.device == p.device and hess.shape == p.shape
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
    if not low_precision(p):
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
    return [s.values for s in slots]


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
                    (low if low_precision(s.param) else kept if keep else lost).append(s)
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

    def source(self, slot: Slot, param: Tensor) -> Tensor:
        """Where a step finds the mean: kept, or at rest in the parameter, or there under σε."""
        if self.live and not low_precision(param):
            return self._kept(slot) if slot.number in self.means else param
        if self.live:
            return local(slot.state["mean"])
        return mean_at_rest(slot) if low_precision(param) else param

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
                found = low_precision(s.param) or s.number in self.means
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
        if low_precision(p):
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


class Window:
    """The training samples since the last step.

    The latest one (``draw``) is live, or left and held with its gradients by reference; the ones
    before it are summed up in the state, and their gradients sealed: a change would be lost.
    """

    def __init__(self):
        self.draw: Draw | None = None
        self.sealed: list[tuple[Tensor, Tensor | None, int]] = []
        self.aside: dict[int, Tensor] = {}  # the means, while an evaluation sample stands
        self.spare: Spare = {}
        self._last: tuple[list[Slot], Any, Runs] = [], None, []

    def runs(self, slots: list[Slot]) -> Runs:
        """As :func:`runs`, of slots that fit; mostly the same ones as the last time."""
        fused = slots[0].group["fused"] if slots else None
        if (slots, fused) != self._last[:2]:
            self._last = slots, fused, runs(slots)
        return self._last[2]

    def renew(self, slot: Slot) -> None:
        """Know a parameter that has moved since its sample was drawn as it is now."""
        draw = self.draw
        if draw is not None and (old := draw.slots.get(slot.number)) and old.param is slot.param:
            draw.slots[slot.number] = slot

    def prune(self, numbers: Iterable[int]) -> None:
        """Keep memory for the means of these parameters alone."""
        self.spare = {n: self.spare[n] for n in numbers if n in self.spare}
        self._last = [], None, []

    def mean(self, slot: Slot) -> Tensor:
        """The mean in the state's precision, whatever stands in the parameter."""
        if slot.number in self.aside:
            return self.aside[slot.number]
        draw = self.draw
        return draw.mean(slot) if draw is not None and draw.live else mean_at_rest(slot)

    @contextmanager
    def evaluating(self, draw: Draw, slots: list[Slot]) -> Iterator[None]:
        """An evaluation sample, around the mean; then again what stood there, if a live sample."""
        with torch.no_grad():
            live = self.draw is not None and self.draw.live
            means = {s.number: self.mean(s).clone() for s in slots}
            standing = [
                (p, p.clone() if live or low_precision(p) else mean)
                for p, mean in zip(params_of(slots), means.values(), strict=True)
            ]
        self.aside = means
        try:
            with torch.no_grad():
                forget_copies()
                for ops, run in self.runs(slots):
                    mine = [means[s.number] for s in run]
                    hess, noise = state_of(run, "hess"), draw.noise(run)
                    ops.sample(params_of(run), mine, hess, noise, **run[0].width)
                touch(slots)
            yield
        finally:
            with torch.no_grad():
                for p, value in standing:
                    p.copy_(value)
                touch(slots)
            self.aside = {}
            forget_copies()

    def open(self, draw: Draw, slots: list[Slot], store_mean: bool) -> None:
        """Begin a sample."""
        self.draw, self.sealed = draw, []
        try:
            self.enter(slots, store_mean)
        except BaseException:
            self.draw = None
            raise

    def enter(self, slots: list[Slot], store_mean: bool) -> None:
        """Put the sample into the parameters of ``slots``."""
        assert self.draw is not None
        self.draw.enter(self.runs(slots), store_mean, self.spare if store_mean else {})

    def hold(self) -> None:
        """Restore the mean and hold the sample's gradients."""
        if draw := self.draw:
            draw.leave()
            grads = ((number, s.param.grad) for number, s in draw.slots.items())
            draw.held = {number: (g, g._version) for number, g in grads if g is not None}

    def drop(self) -> None:
        """Restore the mean and forget the latest sample with its gradients."""
        if draw := self.draw:
            draw.leave()
            for s in draw.slots.values():
                s.param.grad = None
            self.draw = None

    def end(self, states: Iterable[dict[str, Any]]) -> None:
        """Restore the mean and forget all samples."""
        if self.draw is not None:
            self.draw.leave()
        for state in states:
            for name in SUMS:
                state.pop(name, None)
        self.draw, self.sealed = None, []

    def close(self, *, last: bool, checked: bool = False) -> bool:
        """Restore the mean and let the latest sample join the sums; whether it had a gradient.

        Args:
            last: no sample follows before the step, so that changes in place since it was left
                count (clipping, unscaling).
            checked: GradScaler looked for overflows, which multiplies gradients by one in place.
        """
        draw = self.draw
        slots, grads = self.gradients(last=last, checked=checked)
        if draw is None:
            return False
        draw.leave()
        again = [s for s in slots if SUMS[0] in s.state]
        for slot in slots:
            if SUMS[0] not in slot.state:
                slot.state.update(_no_sums(slot))
        self._add(slots, grads, [s.state for s in slots])
        for slot in again:
            if slot.param.grad is not None:  # GradScaler must see any sample's overflow
                for name in SUMS:
                    slot.param.grad.add_(slot.state[name] * 0)
        self.draw = None
        held = [(s.param, s.param.grad) for s in draw.slots.values()]
        self.sealed = [(p, grad, 0 if grad is None else grad._version) for p, grad in held]
        return bool(slots)

    def _verify(self, allowed: int) -> None:
        """Raise where a gradient that was summed up already has changed since."""
        sealed, self.sealed = self.sealed, []
        for p, grad, version in sealed:
            same = p.grad is grad and (grad is None or grad._version <= version + allowed)
            if not same and p.grad is not None and local(p.grad).any():
                raise RuntimeError(CHANGED)

    def gradients(self, *, last: bool, checked: bool = False) -> tuple[list[Slot], list[Tensor]]:
        """The slots that have a gradient of the latest sample, and these gradients."""
        self._verify(int(checked))
        slots, grads = [], []
        if (draw := self.draw) is None:
            return slots, grads
        for number, slot in draw.slots.items():
            p = slot.param
            grad = p.grad
            if draw.way == "context":
                held, version = draw.held.get(number, (None, 0))
                replaced = grad is not None and grad is not held and bool(local(grad).any())
                if replaced or (not last and held is not None and held._version != version):
                    raise RuntimeError(CHANGED)
                grad = held
            if grad is None:
                continue
            if grad.shape != p.shape or grad.device != p.device:
                raise RuntimeError(
                    f"parameter {number}, {tuple(p.shape)} on {p.device}, has a gradient "
                    f"{tuple(grad.shape)} on {grad.device}: its data was replaced since"
                )
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"IVON needs dense gradients, but parameter {number} of shape "
                    f"{tuple(p.shape)} got a {grad.layout} one: pass sparse=False to nn.Embedding"
                )
            slots.append(slot)
            grads.append(grad if slot.pieces is None else local(distributed.placed(grad, p)))
        return slots, grads

    def contribution(self) -> Iterator[tuple[Slot, dict[str, Any]]]:
        """The latest sample's sums of each parameter, as they would be after :meth:`close`."""
        slots, grads = self.gradients(last=True)
        for slot, grad in zip(slots, grads, strict=True):  # one at a time: little memory
            sums = _no_sums(slot)
            self._add([slot], [grad], [sums])
            yield slot, sums

    def _add(self, slots: list[Slot], grads: list[Tensor], sums: list[dict[str, Any]]) -> None:
        """Add the latest sample to the sums of each parameter."""
        assert self.draw is not None
        totals, products = ([local(s[name]) for s in sums] for name in SUMS)
        found = self.draw.rank_products(slots)
        if found is None:
            self._accumulate(slots, grads, totals, products)
            return
        for grad, total, product, mine in zip(grads, totals, products, found, strict=True):
            total += grad
            product += mine

    def rank_products(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        """The products of this rank's gradients with its own displacement, one after another."""
        draw = self.draw
        if draw is None or draw.products is None or not draw.live:
            raise RuntimeError(
                "posterity.reduce_per_rank is for backward passes at a training sample of "
                'IVON(..., samples="per_rank")'
            )
        dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        sizes, places = [g.numel() for g in grads], {id(s.param): s for s in draw.slots.values()}
        total, products = (
            torch.zeros(sum(sizes), dtype=dtype, device=grads[0].device) for _ in range(2)
        )
        known = []
        columns = params, grads, total.split(sizes), products.split(sizes)
        for p, *column in zip(*columns, strict=True):
            if (slot := places.get(id(p))) is None:  # not trained by this optimizer
                continue
            if slot.number in draw.products:
                raise RuntimeError(TWICE)
            known.append((slot, *(t.view(p.shape) for t in column)))
        if known:
            self._accumulate(*map(list, zip(*known, strict=True)))
        return products

    def keep_products(self, params: list[Tensor], products: Tensor) -> None:
        """The averages over ranks of what :meth:`rank_products` made."""
        if self.draw is None or self.draw.products is None:
            return
        places = {id(s.param): s.number for s in self.draw.slots.values()}
        for p, product in zip(params, products.split([p.numel() for p in params]), strict=True):
            if id(p) in places:
                self.draw.products[places[id(p)]] = product.view(p.shape)

    def _accumulate(
        self,
        slots: list[Slot],
        grads: list[Tensor],
        totals: list[Tensor],
        products: list[Tensor],
    ) -> None:
        """Add gradients at the latest sample, and their products with θ−m, to sums."""
        assert self.draw is not None
        place = {s.number: i for i, s in enumerate(slots)}
        for ops, run in runs(slots):
            at = [place[s.number] for s in run]
            mine, means = [grads[i] for i in at], [self.mean(s) for s in run]
            sums = [totals[i] for i in at], [products[i] for i in at]
            hess, approx = state_of(run, "hess"), run[0].group["hess_approx"]
            noise = self.draw.noise(run)
            width = self.draw.width(run[0])
            ops.accumulate(*sums, mine, means, hess, noise, approx, **width)


def _no_sums(slot: Slot) -> dict[str, Any]:
    return {name: torch.zeros_like(slot.state["hess"]) for name in SUMS}
