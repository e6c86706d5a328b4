"""The parameters as the passes take them: in runs, whose memory is found once and not each step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .distributed import local
from .groups import Group, counter_device, low_precision, state_dtype
from .ops import Ops, choose
from .ops.fused import Tensors, placed
from .ops.reference import at_rest

Spare = dict[int, tuple["Slot", Tensor]]  # memory for the means, by number


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
    mean = local(slot.state["mean"])
    if p.device.type == "cpu" and torch.equal(mean.to(p.dtype), p):  # as ever: nothing to write
        return mean
    return mean.copy_(at_rest(p, mean))


def state_of(slots: Iterable[Slot], name: str) -> list[Tensor]:
    """One tensor of each slot's state, its memory."""
    return [s.state[name] if s.pieces is None else local(s.state[name]) for s in slots]


class Run:
    """Slots that a pass takes in one call: of one group, implementation, device and precision.

    Its columns, in the slots' order, hold as long as their memory stays where it is; ``places``
    are the slots' among all that the runs were made of.
    """

    def __init__(self, ops: Ops, slots: list[Slot], places: Sequence[int] = ()):
        self.ops, self.slots, self.places = ops, slots, places
        self.group, self.low = slots[0].group, slots[0].low
        self.numbers = [s.number for s in slots]
        self.sharded = any(s.pieces is not None for s in slots)

    @property
    def width(self) -> dict[str, Any]:
        """The settings that make σ of the Hessian."""
        return self.slots[0].width

    @cached_property
    def params(self) -> Tensors:
        """The memory of the parameters."""
        return placed([s.values for s in self.slots])

    @cached_property
    def hess(self) -> Tensors:
        """The Hessians."""
        return placed(state_of(self.slots, "hess"))

    @cached_property
    def momentum(self) -> Tensors:
        """The momenta."""
        return placed(state_of(self.slots, "momentum"))

    @cached_property
    def steps(self) -> Tensors:
        """The counters of steps."""
        return placed(state_of(self.slots, "step"))

    @cached_property
    def pieces(self) -> list[Any] | None:
        """Where each lies in its whole; None where all are whole."""
        return [s.pieces for s in self.slots] if self.sharded else None

    def rooms(self, spare: Spare | None) -> Tensors:
        """Memory for the means, kept between steps where there is some to spare."""
        if spare is None:
            return [_room({}, s) for s in self.slots]
        if self._rooms is None:
            self._rooms = placed([_room(spare, s) for s in self.slots])
        return self._rooms

    _rooms: Tensors | None = None

    def at_rest(self) -> Tensors:
        """The means, where no sample stands in the parameters."""
        return [mean_at_rest(s) for s in self.slots] if self.low else self.params

    @property
    def masters(self) -> Tensors:
        """Where the means are kept at rest: the state's, in low precision, else the parameters."""
        return state_of(self.slots, "mean") if self.low else self.params

    def parts(self, chosen: list[bool]) -> list[tuple[Run, bool]]:
        """Those that are chosen, and those that are not."""
        if chosen.count(chosen[0]) == len(chosen):
            return [(self, chosen[0])]
        cut = {True: [], False: []}
        for slot, which in zip(self.slots, chosen, strict=True):
            cut[which].append(slot)
        return [(Run(self.ops, slots), which) for which, slots in cut.items()]


def runs(slots: Iterable[Slot]) -> list[Run]:
    """The slots of each group, implementation, device and precision, in order."""
    found: dict[tuple[int, Ops, torch.device, bool], tuple[list[Slot], list[int]]] = {}
    for place, s in enumerate(slots):
        members, places = found.setdefault((id(s.group), s.ops, s.param.device, s.low), ([], []))
        members.append(s)
        places.append(place)
    return [Run(ops, *members) for (_, ops, _, _), members in found.items()]


def _room(spare: Spare, slot: Slot) -> Tensor:
    """Fresh pages cost more than the pass."""
    owner, room = spare.get(slot.number, (None, slot.param))
    if owner is not slot:
        p = slot.values
        room = torch.empty(p.shape, dtype=p.dtype, device=p.device)  # row-major
        spare[slot.number] = slot, room
    return room
