"""What a checkpoint of IVON holds beside torch's packing, and what it must hold to be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .distributed import is_sharded
from .groups import Group
from .window import SUMS, Window

SHAPED = {"momentum", "hess", "mean", *SUMS}  # state of its parameter's shape


def add_window(saved: dict[str, Any], window: Window) -> None:
    """Put an open window into a state dict: finished samples as sums, a live one to be redrawn."""
    draw = window.draw
    if draw is None:
        return
    first = saved["param_groups"][0]
    counters = {"draws": first["draws"] - draw.counted}
    if draw.way == "context" and not draw.live:  # held by reference; any others are sums already
        counters = {}
        for slot, sums in window.contribution():
            saved["state"][slot.number] = {**saved["state"][slot.number], **sums}
            counters = {"pending": first["pending"] + 1}
    saved["param_groups"] = [{**group, **counters} for group in saved["param_groups"]]


def matched(groups: list[Group], loaded: dict[str, Any]) -> Iterator[tuple[Tensor, Any, Group]]:
    """Each parameter with the key of its state in the checkpoint."""
    for group, theirs in zip(groups, loaded["param_groups"], strict=True):
        yield from ((p, n, group) for p, n in zip(group["params"], theirs["params"], strict=True))


def check(groups: list[Group], loaded: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint is not of these parameters, or not of IVON."""
    ours, theirs = ([len(g["params"]) for g in gs] for gs in (groups, loaded["param_groups"]))
    if ours != theirs:
        raise ValueError(
            f"the checkpoint's groups hold {theirs} parameters, the optimizer's {ours}"
        )
    if not all("ess" in group for group in loaded["param_groups"]):
        raise ValueError(
            "no settings of IVON in the groups. Is this another optimizer's checkpoint?"
        )
    for p, number, _ in matched(groups, loaded):
        state = loaded["state"].get(number, {})
        if state and not {"step", "momentum", "hess"} <= state.keys():
            raise ValueError(
                f"no IVON state for parameter {number}: found {sorted(state)}, need step, "
                "momentum and hess. Is this another optimizer's checkpoint?"
            )
        for name in state.keys() & SHAPED:
            if state[name].shape != p.shape:
                raise ValueError(
                    f"{name} of parameter {number} has shape {tuple(state[name].shape)} in the "
                    f"checkpoint, but the parameter has {tuple(p.shape)}"
                )
            if is_sharded(p) and is_sharded(state[name]):
                theirs, ours = (t.placements for t in (state[name], p))  # pyright: ignore
                if theirs != ours:
                    raise ValueError(
                        f"{name} of parameter {number} is placed {theirs} in the checkpoint, the "
                        f"parameter {ours}: load it by set_optimizer_state_dict"
                    )
            if is_sharded(state[name]) != is_sharded(p):
                raise ValueError(
                    f"{name} of parameter {number} is {'whole' if is_sharded(p) else 'sharded'} in "
                    f"the checkpoint, the parameter {'sharded' if is_sharded(p) else 'whole'}: "
                    "load it by set_optimizer_state_dict of torch.distributed.checkpoint.state_dict"
                )
