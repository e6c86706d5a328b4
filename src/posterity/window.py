"""The window of samples that wait for a step; all three ways to train go through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .distributed import local
from .sampling import Draw, forget_copies, touch
from .slots import Run, Slot, Spare, mean_at_rest, runs

MEMORY = attrgetter("shape", "device", "layout")
SUMS = ("grad_sum", "product_sum")  # of the window's finished samples, in the state until step()
CHANGED = (
    "a gradient changed after its sampling context was left, where it can no longer count. Clip, "
    "unscale and accumulate inside `with opt.sampled_params(train=True):`; only with a single "
    "sample before step() do changes in place after it count too."
)
TWICE = (
    'samples="per_rank": a second backward pass with this sample would average its gradients '
    "twice: run all but the last inside `with ddp.no_sync():`"
)


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
        self._last: list[tuple[list[Slot], list[Run], list[Any]]] = []

    def _known(self, slots: list[Slot]) -> tuple[list[Slot], list[Run], list[Any]]:
        """The slots with their runs and memory; mostly those drawn or stepped the last time."""
        for known in self._last:
            if known[0] == slots and not any(run.sharded for run in known[1]):
                return known
        new = slots, runs(slots), [MEMORY(s.param) for s in slots]
        self._last = [new, *self._last[:1]]
        return new

    def runs(self, slots: list[Slot]) -> list[Run]:
        """As :func:`runs`, of slots that fit."""
        return self._known(slots)[1]

    def look_again(self) -> None:
        """Some memory may have moved."""
        self._last = []
        if self.draw is not None:
            self.draw.parts = None

    def prune(self, numbers: Iterable[int]) -> None:
        """Keep memory for the means of these parameters alone."""
        self.spare = {n: self.spare[n] for n in numbers if n in self.spare}

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
                (s.values, s.values.clone() if live or s.low else mean)
                for s, mean in zip(slots, means.values(), strict=True)
            ]
            mine = self.runs(slots)
        self.aside = means
        try:
            with torch.no_grad():
                forget_copies()
                for run in mine:
                    own, noise = [means[n] for n in run.numbers], draw.noise(run)
                    run.ops.sample(run.params, own, run.hess, noise, **run.width)
                    touch(run)
            yield
        finally:
            with torch.no_grad():
                for p, value in standing:
                    p.copy_(value)
                for run in mine:
                    touch(run)
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
        self.draw.enter(self.runs(slots), store_mean, self.spare if store_mean else None)

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
            if SUMS[0] in state:
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
        if (draw := self.draw) is None:
            return [], []
        slots = [*draw.slots.values()]
        grads = [s.param.grad for s in slots]
        if draw.way == "context":
            grads = [self._held(s, g, last) for s, g in zip(slots, grads, strict=True)]
        slots = [s for s, g in zip(slots, grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
        if [*map(MEMORY, grads)] != self._known(slots)[2]:
            for slot, grad in zip(slots, grads, strict=True):
                _check(slot, grad)
        for i, slot in enumerate(slots):
            if slot.pieces is not None:
                grads[i] = local(distributed.placed(grads[i], slot.param))
        return slots, grads

    def _held(self, slot: Slot, grad: Tensor | None, last: bool) -> Tensor | None:
        """The gradient that a parameter had when its sampling context was left."""
        assert self.draw is not None
        held, version = self.draw.held.get(slot.number, (None, 0))
        replaced = grad is not None and grad is not held and bool(local(grad).any())
        if replaced or (not last and held is not None and held._version != version):
            raise RuntimeError(CHANGED)
        return held

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
            old = self.draw.outdated  # (2) will multiply with another λ(h+δ) than σε was made of
            mine = [*map(torch.zeros_like, products)] if old else products
            self._accumulate(slots, grads, totals, mine)
            for slot, product, made in zip(slots, products, mine, strict=True) if old else ():
                product += made * self.draw.narrowed(slot)
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
        for run in runs(slots):
            mine, means = [grads[i] for i in run.places], [self.mean(s) for s in run.slots]
            sums = [totals[i] for i in run.places], [products[i] for i in run.places]
            noise, width = self.draw.noise(run), self.draw.width(run.slots[0])
            approx = run.group["hess_approx"]
            run.ops.accumulate(*sums, mine, means, run.hess, noise, approx, **width)


def _check(slot: Slot, grad: Tensor) -> None:
    """Raise RuntimeError for a gradient that is of other memory than its parameter."""
    p, number = slot.param, slot.number
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


def _no_sums(slot: Slot) -> dict[str, Any]:
    return {name: torch.zeros_like(slot.state["hess"]) for name in SUMS}
