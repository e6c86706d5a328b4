"""What stands in a parameter group: settings, counters that place the noise, and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from numbers import Real
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from . import distributed

Group = dict[str, Any]

SETTINGS = (  # of one group
    *("lr", "ess", "hess_init", "betas", "weight_decay", "clip_radius"),
    *("hess_approx", "gradsq_scale", "rescale_lr", "debias"),
)
NUMBERS = ("lr", "ess", "weight_decay", "clip_radius")
COUNTERS = ("seed", "draws", "eval_draws", "pending", "hess_age")  # of the noise, and of h
FIXED = (  # of the optimizer: the same in every group
    *("mc_samples", "antithetic", "hess_every", "fused", "store_mean", "samples", "capturable"),
    "seed",
)
WHOLE = (*FIXED, *COUNTERS)  # in every group, for distributed checkpoints keep nothing else
SHARE = 0.1  # of a typical weight: the σ that hess_init="auto" begins with
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def low_precision(p: Tensor) -> bool:
    """Whether a parameter keeps its mean in float32 beside itself."""
    return p.dtype in (torch.bfloat16, torch.float16)


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's state and of all arithmetic on it."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def counter_device(p: Tensor, group: Group) -> torch.device:
    """Where a parameter's count of steps is: on a GPU the passes read it there."""
    return p.device if p.is_cuda or group["capturable"] else torch.device("cpu")


def typical_size(params: Iterable[Tensor]) -> float:
    """The geometric mean over matrices of their root mean squares; every rank calls this.

    Vectors count where there is nothing else, and what is zero (as half of LoRA is) does not.

    Raises:
        ValueError: all weights are zero, or those that count are not finite.
    """
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    norms = [(p, float(distributed.whole(norm(p.detach())))) for p in params]
    known = [(p.dim() > 1, size / math.sqrt(p.numel())) for p, size in norms if size]
    chosen = [size for matrix, size in known if matrix] or [size for _, size in known]
    if not chosen or not all(map(math.isfinite, chosen)):
        raise ValueError('hess_init="auto" needs weights that are not all zero, and finite')
    return math.exp(fmean(map(math.log, chosen)))


def share_counters(groups: list[Group]) -> None:
    """Give every group the first one's counters; device tensors where they are captured."""
    first = groups[0]
    if first["capturable"]:
        device = next((p.device for g in groups for p in g["params"] if p.requires_grad), "cpu")
        for name in ("draws", "eval_draws"):
            first[name] = torch.as_tensor(first[name], dtype=torch.int64, device=device)
    else:
        first |= {name: int(first[name]) for name in ("draws", "eval_draws")}
    for group in groups:
        group.update({k: first[k] for k in COUNTERS})


def count(groups: list[Group], name: str, by: int = 1) -> int | Tensor:
    """Advance a counter; its value before."""
    before = groups[0][name]
    if isinstance(before, Tensor):
        value, before = before, before.clone()
        value += by  # in place and on the device, so that a replayed graph advances it too
    else:
        for group in groups:
            group[name] = before + by
    return before


def agree(groups: list[Group]) -> None:
    """Take over rank 0's counters."""
    names = ("seed", "draws", "eval_draws", "hess_age")
    own = [int(groups[0][name]) for name in names]
    groups[0].update(zip(names, distributed.broadcast(own), strict=True))
    share_counters(groups)


def plain(group: Group) -> Group:
    """A group's settings and counters as plain numbers."""
    kept = {k: group[k] for k in (*SETTINGS, "seed", "draws")}
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in kept.items()}


def check(group: Group) -> None:
    """Refuse settings out of their range, and parameters that cannot be trained.

    Raises:
        ValueError: a setting, or a parameter, that IVON cannot work with.
        TypeError: a setting that is no number, or betas that are no pair.
    """
    odd = {k: group[k] for k in NUMBERS if not isinstance(group[k], (Real, Tensor))}
    if odd:
        raise TypeError(f"IVON needs numbers; got {odd}")
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        said = f"betas is a pair, of momentum and Hessian; got {group['betas']!r}"
        raise TypeError(said) from None
    scale = 1 if group["hess_approx"] == "price" else group["gradsq_scale"] or 0
    hess_init = group["hess_init"]
    if isinstance(hess_init, str):
        hess_init = 1 if hess_init == "auto" else math.nan
    rules = {
        "a finite lr >= 0": 0 <= group["lr"] < math.inf,
        "a finite ess > 0": 0 < group["ess"] < math.inf,
        'a finite hess_init >= 0, or hess_init "auto"': 0 <= hess_init < math.inf,
        "0 <= betas[0] < 1": 0 <= beta1 < 1,
        "0 <= betas[1] < 1": 0 <= beta2 < 1,
        "a finite weight_decay >= 0": 0 <= group["weight_decay"] < math.inf,
        "hess_init + weight_decay > 0": hess_init + group["weight_decay"] > 0,
        "clip_radius > 0": group["clip_radius"] > 0,
        "0 <= seed < 2**63": 0 <= group["seed"] < 2**63,
        "a whole mc_samples >= 1": group["mc_samples"] >= 1 and group["mc_samples"] % 1 == 0,
        "a whole hess_every >= 1": group["hess_every"] >= 1 and group["hess_every"] % 1 == 0,
        "hess_every=1 with capturable=True (a CUDA graph replays one kind of step)": (
            group["hess_every"] == 1 or not group["capturable"]
        ),
        'hess_approx "price" or "gradsq"': group["hess_approx"] in ("price", "gradsq"),
        'samples "shared" or "per_rank"': group["samples"] in ("shared", "per_rank"),
        'a finite gradsq_scale > 0 with hess_approx="gradsq" (for a mean over a batch of B: B)': (
            0 < scale < math.inf
        ),
        "an even mc_samples with antithetic=True": (
            not group["antithetic"]
            or group["mc_samples"] % 2 == 0
            or group["samples"] == "per_rank"  # where ranks are the pairs
        ),
        'store_mean=True with samples="per_rank" (each rank would round the mean by itself)': (
            group["store_mean"] or group["samples"] == "shared"
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            words = re.findall(r"\w+", rule)
            shown = {k: group[k] for k in (*SETTINGS, *WHOLE) if k in words}
            raise ValueError(f"IVON needs {rule}; got {shown}")
    if len({*map(id, group["params"])}) < len(group["params"]):
        raise ValueError(
            "a parameter stands twice in a group (tied weights?): pass each once, as "
            "model.parameters() does, or list(dict.fromkeys(params))"
        )
    for p in group["params"]:
        if p.requires_grad:
            check_trainable(p, group)


def check_trainable(p: Tensor, group: Group) -> None:
    """Raise ValueError for a parameter that IVON cannot train. Frozen ones may be anything."""
    if p.dtype not in DTYPES:
        raise ValueError(f"IVON trains real floating-point parameters; got one of {p.dtype}")
    if p.is_meta:
        raise ValueError(
            "IVON got a parameter on the meta device, which has no values: materialise the model "
            "(model.to_empty(device=...)) before building the optimizer"
        )
    if hasattr(p, "_fsdp_flattened"):
        raise ValueError(
            "IVON got a parameter of FullyShardedDataParallel, whose parts would all draw the same "
            "noise: shard with torch.distributed.fsdp.fully_shard (in Accelerate fsdp_version: 2)"
        )
    if distributed.pieces(p) is not None and group["samples"] == "per_rank":
        raise ValueError(
            f'samples="per_rank" with a sharded parameter (global shape {tuple(p.shape)}): its '
            'parts are one replica, which has one sample. Use samples="shared"'
        )
    if low_precision(p) and not group["store_mean"]:
        raise ValueError(
            f"store_mean=False with a {p.dtype} parameter: its mean must be kept in float32"
        )
