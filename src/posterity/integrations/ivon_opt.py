"""The way over from ivon-opt: its checkpoints as an :class:`IVON` state, or as a `Posterior`.

Only the checkpoint is read (``torch.save(optimizer.state_dict(), path)``); the package itself is
not needed. Written against the files of ivon-opt 0.1.3, which hold one flat ``momentum`` and
``hess`` for each group: all its parameters, frozen ones included, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ivon import IVON
from ..posterior import Posterior

__all__ = ["load", "posterior"]

VECTORS = ("momentum", "hess")
SETTINGS = ("lr", "ess", "hess_init", "weight_decay", "clip_radius")
BETAS = ("beta1", "beta2")


@torch.no_grad()
def load(optimizer: IVON, checkpoint: Mapping[str, Any], *, steps: int) -> None:
    """Take over an ivon-opt run: momentum, Hessian, step count and settings of every group.

    Args:
        optimizer: over the same parameters in the same groups. What a group's checkpoint says of
            lr, ess, hess_init, betas, weight_decay and clip_radius replaces the optimizer's own
            setting, and so does a schedule's initial_lr; what it does not hold stays: hess_approx,
            gradsq_scale (ivon-opt multiplied by ess), rescale_lr, debias, mc_samples, the seed.
        checkpoint: what ``state_dict()`` of ``ivon.IVON`` returned. The weights are not in it:
            load them into the model first, as for any optimizer.
        steps: how many steps the run had made. ivon-opt does not save it, yet the momentum is
            divided by 1 − β1^t (5): counting from 0 again would make the next update ten times
            too large at β1 = .9. When unknown, any number above 10/(1 − β1) is as good.

    Raises:
        ValueError: not an ivon-opt checkpoint, one of other parameters or groups, one saved
            between a sample and its step, values that are not finite or out of their range, or
            ``steps`` of 0 (or less) though the momentum has moved. Nothing has changed then.

    Example:
        >>> import torch
        >>> from posterity import IVON
        >>> from posterity.integrations import ivon_opt
        >>> group = dict(lr=0.1, ess=100.0, hess_init=1.0, beta1=0.9, beta2=0.999)
        >>> group |= dict(weight_decay=1e-4, clip_radius=float("inf"), numel=2, params=[0])
        >>> group |= dict(momentum=torch.tensor([0.1, 0.2]), hess=torch.tensor([0.9, 0.8]))
        >>> checkpoint = {"state": {"count": 0}, "param_groups": [group]}  # torch.load(...)
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = IVON([w], lr=1.0, ess=1.0)
        >>> ivon_opt.load(opt, checkpoint, steps=500)
        >>> opt.state[w]["hess"], opt.param_groups[0]["betas"]
        (tensor([0.9000, 0.8000]), (0.9, 0.999))

    Source: Shen et al. 2024, arXiv 2402.17641, Algorithm 1; https://pypi.org/project/ivon-opt.
    """
    groups = _groups(checkpoint, optimizer)
    trained = any(group["momentum"].any() for group in groups)
    if steps < 0 or (steps == 0 and trained):
        raise ValueError(
            f"steps={steps}, but this run has made some: the momentum is not zero. Pass how many "
            "(ivon-opt does not save it); when unknown, any number above 10/(1-beta1)"
        )
    state = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state["state"], number = {}, 0
    for group, into, own in zip(groups, state["param_groups"], optimizer.param_groups, strict=True):
        begun = {k: group[k] for k in ("initial_lr",) if k in group}  # by a schedule
        into.update(_settings(group) | begun, pending=0)
        if isinstance(own["lr"], Tensor):  # it stays one, on its device
            into["lr"] = torch.full_like(own["lr"], float(group["lr"]))
        sizes = [p.numel() for p in own["params"]]
        for momentum, hess in zip(*(group[k].split(sizes) for k in VECTORS), strict=True):
            p = params[number]
            if p.requires_grad:
                wide = torch.float64 if p.dtype == torch.float64 else torch.float32
                state["state"][number] = {
                    "step": torch.tensor(float(steps)),
                    "momentum": momentum.reshape(p.shape).to(wide),
                    "hess": hess.reshape(p.shape).to(wide),
                }
            number += 1
    optimizer.load_state_dict(state)


def posterior(
    checkpoint: Mapping[str, Any], model: nn.Module, params: Iterable[Any] | None = None
) -> Posterior:
    """The Gaussian that an ivon-opt run left: mean the model's weights, precision λ(h+δ).

    Args:
        checkpoint: what ``state_dict()`` of ``ivon.IVON`` returned.
        model: with the weights saved beside the checkpoint. Its buffers and frozen parameters come
            along.
        params: what ``ivon.IVON`` was given, where that was not ``model.parameters()``: the
            parameters or groups, of this model and in the same order. Needed with several groups,
            for the checkpoint names no parameter.

    Raises:
        ValueError: as :func:`load`; several groups without ``params``; a model that is not finite.

    Example:
        >>> import torch
        >>> from posterity.integrations import ivon_opt
        >>> group = dict(lr=0.1, ess=100.0, hess_init=1.0, beta1=0.9, beta2=0.999)
        >>> group |= dict(weight_decay=0.25, clip_radius=float("inf"), numel=3, params=[0, 1])
        >>> group |= dict(momentum=torch.zeros(3), hess=torch.tensor([0.75, 0.75, 0.0]))
        >>> checkpoint = {"state": {"count": 0}, "param_groups": [group]}  # torch.load(...)
        >>> ivon_opt.posterior(checkpoint, torch.nn.Linear(2, 1)).precision["weight"]
        tensor([[100., 100.]])

    Source: Shen et al. 2024, arXiv 2402.17641, line (7).
    """
    if params is None:
        if len(_param_groups(checkpoint)) > 1:
            raise ValueError(
                "the checkpoint has several groups and names no parameter: pass as `params` the "
                "groups that ivon.IVON was given, of this model's parameters"
            )
        params = model.parameters()
    optimizer = IVON(params, 0.0, ess=1.0, seed=0)
    load(optimizer, checkpoint, steps=1)  # their number matters to the next step only
    return optimizer.posterior(model)


def _param_groups(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checkpoint's groups, if it is one of ivon-opt's."""
    foreign = "not a checkpoint of ivon-opt (its optimizer's state_dict()): "
    if not isinstance(checkpoint, Mapping) or not {"state", "param_groups"} <= checkpoint.keys():
        raise ValueError(f"{foreign}it needs 'state' and 'param_groups'")
    groups = checkpoint["param_groups"]
    if not groups:
        raise ValueError(f"{foreign}it has no groups")
    for i, group in enumerate(groups):
        if missing := [k for k in (*SETTINGS, *BETAS, *VECTORS) if k not in group]:
            raise ValueError(f"{foreign}group {i} has no {', '.join(missing)}")
        if not all(isinstance(group[k], Tensor) and group[k].dim() == 1 for k in VECTORS):
            raise ValueError(f"{foreign}momentum and hess of group {i} must be vectors")
    if checkpoint["state"].get("count"):
        raise ValueError("this checkpoint was saved between a sample and its step: save after it")
    return groups


def _groups(checkpoint: Mapping[str, Any], optimizer: IVON) -> list[dict[str, Any]]:
    """The checkpoint's groups, if they are those of the optimizer's parameters."""
    groups = _param_groups(checkpoint)
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(groups)} groups, the optimizer {len(optimizer.param_groups)}"
        )
    for i, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        size = sum(p.numel() for p in own["params"])
        for name in VECTORS:
            if group[name].numel() != size:
                raise ValueError(
                    f"{name} of group {i} has {group[name].numel()} elements in the checkpoint, "
                    f"but the group's parameters have {size}: this is another model's checkpoint"
                )
            if not group[name].isfinite().all():
                raise ValueError(f"{name} of group {i} is not finite in the checkpoint")
        IVON([torch.zeros(1)], **_settings(group), seed=0)  # raises where one is out of its range
    return groups


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint group's settings by our names."""
    return {k: group[k] for k in SETTINGS} | {"betas": tuple(group[k] for k in BETAS)}
