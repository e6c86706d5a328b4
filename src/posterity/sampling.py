"""Posterior samples in the parameters, and the window of those that wait for a step.

All three ways to train go through :class:`Window`; nothing here knows a setting beyond σ's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import Group, low_precision
from .ops import noise

SUMS = ("grad_sum", "product_sum")  # of the window's finished samples, in the state until step()
CHANGED = (
    "a gradient changed after its sampling context was left, where it can no longer count. Clip, "
    "unscale and accumulate inside `with opt.sampled_params(train=True):`; only with a single "
    "sample before step() do changes in place after it count too."
)


class Slot(NamedTuple):
    """A parameter, its group, its state, and its number: the third word of its noise."""

    param: Tensor
    group: Group
    state: dict[str, Any]
    number: int

    @property
    def width(self) -> dict[str, float]:
        """The settings that make σ of the Hessian."""
        return {k: self.group[k] for k in ("ess", "hess_init", "weight_decay")}


def mean_at_rest(slot: Slot) -> Tensor:
    """The mean in the state's precision, of a parameter that no sample stands in."""
    p = slot.param.detach()
    if not low_precision(p):
        return p
    mean = slot.state["mean"]  # someone may have loaded other weights since: theirs count
    return mean.copy_(torch.where(mean.to(p.dtype) == p, mean, p.to(mean.dtype)))


def by_group(slots: Iterable[Slot]) -> Iterator[list[Slot]]:
    """The slots of each group, in order."""
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.group), []).append(slot)
    return iter(groups.values())


def noise_for(slots: list[Slot], seed: int, draw: int | Tensor) -> list[Tensor]:
    """The draw's standard normals for each slot, flat, on its device."""
    made: dict[int, Tensor] = {}
    for device in {s.param.device for s in slots}:
        here = [s for s in slots if s.param.device == device]
        key = noise.draw_key(seed, draw, device)
        flat = noise.normals(key, [s.number for s in here], [s.param.numel() for s in here])
        made.update(zip((s.number for s in here), flat, strict=True))
    return [made[s.number] for s in slots]


def place(ops: ModuleType, slots: list[Slot], means: list[Tensor], normals: list[Tensor]) -> None:
    """Put θ = m + σε into the parameters."""
    torch.clear_autocast_cache()  # autocast keeps low-precision copies of the weights
    given = {s.param: (m, e) for s, m, e in zip(slots, means, normals, strict=True)}
    for run in by_group(slots):
        params = [s.param for s in run]
        ops.sample(
            params,
            [given[p][0] for p in params],
            [s.state["hess"] for s in run],
            [given[p][1] for p in params],
            **run[0].width,
        )


class Draw:
    """One training sample θ = m + σε. While it is live θ stands in the parameters, else the mean.

    While live, ``means`` keeps the mean (for low-precision parameters the state does that); once
    left, ``offsets`` keeps θ−m. Where it does not, σε is regenerated: for low-precision parameters
    because θ is rounded so coarsely that θ−m would be mostly the rounding; and without
    ``store_mean``, to restore the mean too. That rounds the mean; so the state notes it
    (``rounded``), and until the parameter's next step every sample keeps its mean: it is rounded
    once a step at most.
    """

    def __init__(self, ops: ModuleType, seed: int, number: int | Tensor, sign: int, way: str):
        self.ops, self.seed, self.number, self.sign = ops, seed, number, sign
        self.way = way  # "context" or "train": who drew it
        self.slots: dict[Tensor, Slot] = {}
        self.live = False
        self.means: dict[Tensor, Tensor] = {}
        self.offsets: dict[Tensor, Tensor] = {}
        self.held: dict[Tensor, tuple[Tensor, int]] = {}  # gradients and their versions, by param

    def _noise(self, slots: list[Slot]) -> list[Tensor]:
        normals = noise_for(slots, self.seed, self.number)
        return normals if self.sign > 0 else [-e for e in normals]

    def enter(self, slots: list[Slot], store_mean: bool) -> None:
        """Put θ into the parameters of ``slots`` and take them up."""
        normals = self._noise(slots)
        means = [mean_at_rest(s) for s in slots]
        for s, mean in zip(slots, means, strict=True):
            if not low_precision(s.param) and (store_mean or "rounded" in s.state):
                self.means[s.param] = mean.clone()
        self.slots.update((s.param, s) for s in slots)
        self.live = True
        try:
            place(self.ops, slots, means, normals)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Put the mean back."""
        if not self.live:
            return
        lost = []
        for p, s in self.slots.items():
            if low_precision(p):
                p.copy_(s.state["mean"])
            elif p in self.means:
                self.offsets[p] = p.detach() - self.means[p]
                p.copy_(self.means[p])
            else:
                lost.append(s)
        for s, e in zip(lost, self._noise(lost), strict=True):
            self.ops.unsample([s.param], [s.state["hess"]], [e], **s.width)
            s.state["rounded"] = True
        self.means, self.live = {}, False
        torch.clear_autocast_cache()

    def mean(self, slot: Slot) -> Tensor:
        """The mean while the sample is live."""
        p = slot.param
        if p not in self.slots:
            return mean_at_rest(slot)
        if low_precision(p):
            return slot.state["mean"]
        return self.means[p] if p in self.means else p.detach() - self.displacement([slot])[0]

    def displacement(self, slots: list[Slot]) -> list[Tensor]:
        """θ − m, in the state's precision."""
        lost = [s for s in slots if s.param not in self.offsets]
        made = {
            s.param: self.ops.perturbation(s.state["hess"], e, **s.width)
            for s, e in zip(lost, self._noise(lost), strict=True)
        }
        return [made[s.param] if s.param in made else self.offsets[s.param] for s in slots]


class Window:
    """The training samples since the last step.

    The latest one (``draw``) is live, or left and held with its gradients by reference; the ones
    before it are summed up in the state, and their gradients sealed: a change would be lost.
    """

    def __init__(self):
        self.draw: Draw | None = None
        self.sealed: list[tuple[Tensor, Tensor | None, int]] = []
        self.aside: dict[Tensor, Tensor] = {}  # the means, while an evaluation sample stands

    def mean(self, slot: Slot) -> Tensor:
        """The mean in the state's precision, whatever stands in the parameter."""
        if slot.param in self.aside:
            return self.aside[slot.param]
        draw = self.draw
        return draw.mean(slot) if draw is not None and draw.live else mean_at_rest(slot)

    @contextmanager
    def evaluating(
        self, ops: ModuleType, slots: list[Slot], normals: list[Tensor]
    ) -> Iterator[None]:
        """An evaluation sample, around the mean; then again what stood there, if a live sample."""
        with torch.no_grad():
            live = self.draw is not None and self.draw.live
            means = {s.param: self.mean(s).clone() for s in slots}
            standing = {
                p: p.detach().clone() if live or low_precision(p) else mean
                for p, mean in means.items()
            }
        self.aside = means
        try:
            with torch.no_grad():
                place(ops, slots, list(means.values()), normals)
            yield
        finally:
            with torch.no_grad():
                for p, value in standing.items():
                    p.copy_(value)
            self.aside = {}
            torch.clear_autocast_cache()

    def open(self, draw: Draw, slots: list[Slot], store_mean: bool) -> None:
        """Begin a sample."""
        self.draw, self.sealed = draw, []
        draw.enter(slots, store_mean)

    def hold(self) -> None:
        """Restore the mean and hold the sample's gradients."""
        if draw := self.draw:
            draw.leave()
            draw.held = {p: (p.grad, p.grad._version) for p in draw.slots if p.grad is not None}

    def drop(self) -> None:
        """Restore the mean and forget the sample with its gradients."""
        if draw := self.draw:
            draw.leave()
            for p in draw.slots:
                p.grad = None
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
        self._verify(int(checked))
        draw = self.draw
        if draw is None:
            return False
        draw.leave()
        contributed = False
        for slot, grad, product in self.contribution(last=last):
            for name, value in zip(SUMS, (grad, product), strict=True):
                if name in slot.state:
                    value = slot.state[name] + value
                    if slot.param.grad is not None:  # GradScaler must see any sample's overflow
                        slot.param.grad.add_(value * 0)
                slot.state[name] = value
            contributed = True
        self.draw = None
        grads = [(p, p.grad) for p in draw.slots]
        self.sealed = [(p, grad, 0 if grad is None else grad._version) for p, grad in grads]
        return contributed

    def _verify(self, allowed: int) -> None:
        """Raise where a gradient that was summed up already has changed since."""
        sealed, self.sealed = self.sealed, []
        for p, grad, version in sealed:
            same = p.grad is grad and (grad is None or grad._version <= version + allowed)
            if not same and p.grad is not None and p.grad.any():
                raise RuntimeError(CHANGED)

    def contribution(self, *, last: bool) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """Each parameter's gradient and product (2) of the sample, which was left."""
        draw, slots, grads = self.draw, [], []
        assert draw is not None
        for p, slot in draw.slots.items():
            grad = p.grad
            if draw.way == "context":
                held, version = draw.held.get(p, (None, 0))
                replaced = grad is not None and grad is not held and bool(grad.any())
                if replaced or (not last and held is not None and held._version != version):
                    raise RuntimeError(CHANGED)
                grad = held
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"IVON needs dense gradients, but parameter {slot.number} of shape "
                    f"{tuple(p.shape)} got a {grad.layout} one: pass sparse=False to nn.Embedding"
                )
            slots.append(slot)
            grads.append(grad)
        for slot, grad, displacement in zip(slots, grads, draw.displacement(slots), strict=True):
            grad = grad.to(displacement.dtype, copy=True)
            yield slot, grad, draw.ops.product(grad, displacement, slot.group["hess_approx"])
