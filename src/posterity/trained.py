"""What an optimizer trains, as slots: found once, and again only where something has moved."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import suppress
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, distributed, groups
from .groups import Group, low_precision
from .slots import Slot
from .window import Window

KIND = attrgetter("dtype"), Tensor.is_contiguous  # of what lies at an address
SHAPE = attrgetter("shape")
TRAINED = attrgetter("requires_grad")
HELD = itemgetter("hess", "momentum", "step")  # of the state
State = MutableMapping[Tensor, dict[str, Any]]


class Trained:
    """The slots of trainable parameters; their state is made on first use and follows them.

    Groups and state are the optimizer's, which may exchange them between calls.

    Args:
        window: learns of slots that are others now, or gone.
    """

    def __init__(self, window: Window):
        self._window = window
        self.forget()

    def forget(self) -> None:
        """Look at everything again."""
        self._known: dict[int, Slot] = {}
        self._seen: tuple[list[Any], list[Any], list[Slot]] = [], [], []  # facts, and their slots
        self._asked: list[Tensor] = []  # what a step asks again

    def slots(self, param_groups: list[Group], state: State) -> list[Slot]:
        """Of every trainable parameter, in order."""
        objects, facts, slots = self._seen
        now = _facts(param_groups, state)
        if not (len(objects) == len(now[0]) and all(map(is_, objects, now[0])) and facts == now[1]):
            self._window.look_again()
            slots = self._look(param_groups, state)
            self._seen = *_facts(param_groups, state), slots
            whole = all(slot.pieces is None for slot in slots)  # the others have no address
            self._asked = [slot.param for slot in slots] if whole else []
        return slots

    def stayed(self, state: State) -> bool:
        """Whether all that is trained, and its state, are where and as they were found."""
        params = self._asked
        with suppress(KeyError):
            now = [_addresses(params), _addresses(_held(state)[1])]
            return bool(params) and now + [[*map(ask, params)] for ask in KIND] == self._seen[1][:4]
        return False

    def _look(self, param_groups: list[Group], state: State) -> list[Slot]:
        known, slots, sharded = self._known, [], False
        members = ((group, p) for group in param_groups for p in group["params"])
        for number, (group, p) in enumerate(members):
            if not p.requires_grad:
                continue
            slot = known.get(number)
            if slot is None or slot.state is not state.get(p) or not slot.fits(p, group):
                if not state.get(p):
                    groups.check_trainable(p, group)
                if group["hess_init"] == "auto":
                    _begin(param_groups, state)
                slot = known[number] = Slot(p, group, _fitted(p, group, state[p]), number)
                sharded = sharded or slot.pieces is not None
                if self._window.draw is not None:
                    self._window.draw.renew(slot)
            slots.append(slot)
        if sharded:
            distributed.gathered.find()
        if len(slots) < len(known):  # frozen since, or gone
            self._known = {slot.number: slot for slot in slots}
            self._window.prune(self._known)
        return slots


def _facts(param_groups: list[Group], state: State) -> tuple[list[Any], list[Any]]:
    """What decides the slots and where they are, by C calls alone: every step asks for it.

    Objects that must be the same, and what must be equal.
    """
    params = [p for group in param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in param_groups]
    trained = [*map(TRAINED, params)]
    learning = [*compress(params, trained)]  # frozen ones may be anything
    try:
        states, held = _held(state)
    except KeyError:  # some state is still to be made
        return [object()], []
    memory = [_addresses(learning), _addresses(held)]
    kinds = [[*map(ask, learning)] for ask in (*KIND, SHAPE)]
    whole = param_groups[0]["fused"], param_groups[0]["capturable"]
    same = [*param_groups, *params, *states, *held]
    return same, [*memory, *kinds, sizes, trained, whole]


def _held(state: State) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """All state, and its tensors."""
    states = [each for each in state.values() if each]
    held = [*chain.from_iterable(map(HELD, states))]
    return states, held + [each["mean"] for each in states if "mean" in each]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


@torch.inference_mode(False)  # state made while evaluating must serve training too
@torch.no_grad()
def _fitted(p: Tensor, group: Group, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter, made where there is none, as the parameter is now."""
    dtype, on = groups.state_dtype(p), groups.counter_device(p, group)
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=on)
        shape = distributed.local(p).shape
        for name, value in (("momentum", 0.0), ("hess", float(group["hess_init"]))):
            # row-major, as the passes go: a channels-last parameter alone is then copied
            values = torch.full(shape, value, dtype=dtype, device=p.device)
            state[name] = distributed.like(values, p)
    if low_precision(p) != ("mean" in state):
        groups.check_trainable(p, group)
        state.pop("mean", None)
        if low_precision(p):
            values = distributed.local(p).to(dtype, memory_format=torch.contiguous_format)
            state["mean"] = distributed.like(values.detach(), p)
    if state["hess"].device != p.device or state["hess"].dtype != dtype:
        for name in state.keys() & checkpoint.SHAPED:
            state[name] = state[name].to(p.device, dtype)
    if state["hess"].shape != p.shape:
        raise ValueError(
            f"a parameter has become {tuple(p.shape)}, but its state is "
            f"{tuple(state['hess'].shape)}: build a new IVON for it"
        )
    state["step"] = state["step"].to(on, torch.float32)
    return state


@torch.inference_mode(False)
@torch.no_grad()
def _begin(param_groups: list[Group], state: State) -> None:
    """Let "auto" be a number in every group that has it, by the weights as they are."""
    trained = (p for g in param_groups for p in g["params"] if p.requires_grad)
    width = groups.SHARE * groups.typical_size(trained)
    for group in (g for g in param_groups if g["hess_init"] == "auto"):
        start = 1 / (float(group["ess"]) * width**2) - group["weight_decay"]
        group["hess_init"] = max(start, 0.0)
        for each in (state.get(p) for p in group["params"]):
            if each and not each["step"]:  # made for a checkpoint that was not loaded
                distributed.local(each["hess"]).fill_(group["hess_init"])
