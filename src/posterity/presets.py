"""Settings that work untouched, for kinds of tasks, and those that other optimizers leave.

:meth:`posterity.IVON.defaults_for`, :meth:`posterity.IVON.from_sgd` and
:meth:`posterity.IVON.from_adamw`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import SGD, AdamW, Optimizer

Settings = dict[str, Any]


def vision(n: int, steps: int) -> Settings:
    """SGD's steps with the paper's steady noise: h stays where it starts."""
    return {"lr": 2.0, "ess": n, "hess_init": 0.5, "weight_decay": 5e-4}


def plain(n: int, steps: int) -> Settings:
    """Where no layer undoes a weight's size h is learnt, and prunes; λ above n bounds the noise."""
    learnt = {"betas": (0.9, 1 - 4 / max(steps, 4)), "clip_radius": 0.3}
    return {"lr": 0.5, "ess": 10 * n, "hess_init": "auto", "weight_decay": 1e-3, **learnt}


def tabular(n: int, steps: int) -> Settings:
    """Small networks on few rows: wide noise, and h learnt."""
    learnt = {"betas": (0.9, 0.999), "clip_radius": 0.3}
    return {"lr": 0.1, "ess": n, "hess_init": 2.0, "weight_decay": 5e-3, **learnt}


def _clipped(lr: float, ess: float, memory: float, beta1: float = 0.9) -> Settings:
    """Where SGD does not train well: steps of at most ``lr`` times the clip, in AdamW's scale.

    Weights bear only so much noise, however few the examples: where ``ess`` follows them it has a
    least value.
    """
    bound = {"clip_radius": 1e-3, "rescale_lr": False, "weight_decay": 1e-6}
    betas = (beta1, 1 - 1 / max(memory, 1))
    return {"lr": lr, "ess": ess, "hess_init": 1e-3, "betas": betas, **bound}


def language(n: int, steps: int) -> Settings:
    """From scratch; a weight moves by 7e-4 at most, and h forgets in a fifth of the steps.

    λ over h's memory is 1e6: above it noise in h shortens the steps, below it all are clipped.
    """
    return _clipped(0.7, 2e5 * steps, steps / 5, beta1=0.8)


def language_pairs(n: int, steps: int) -> Settings:
    """The same with h from pairs at every tenth step: curvature, and few steps are clipped.

    A weight moves by 3e-3 at most. Loops draw ``samples_due`` samples, or pass a closure.
    """
    pairs = {"mc_samples": 2, "antithetic": True, "hess_every": 10}
    return _clipped(1e-2, 1e9, 300, beta1=0.8) | {"clip_radius": 0.3, **pairs}


def finetuning(n: int, steps: int) -> Settings:
    """All weights of a pretrained model; a weight moves by 6e-5 at most."""
    return _clipped(0.06, max(2e3 * n, 3e6), steps / 10)


def lora(n: int, steps: int) -> Settings:
    """Low-rank adapters; a weight moves by 3e-4 at most, and the prior is flat."""
    return _clipped(0.3, max(2e4 * n, 1e7), steps / 10) | {"weight_decay": 0.0}


PRESETS: dict[str, Callable[[int, int], Settings]] = {
    "vision": vision,
    "plain": plain,
    "tabular": tabular,
    "language": language,
    "language_pairs": language_pairs,
    "finetuning": finetuning,
    "lora": lora,
}

LIKE_ADAMW = ("finetuning", "lora")  # presets whose longest step can be AdamW's rate


def refuse(settings: Settings, where: str, *carried: str) -> None:
    """What another optimizer's settings decide cannot be set beside them."""
    if twice := [name for name in carried if name in settings]:
        raise ValueError(f"{where} sets {twice[0]} itself: to choose it build IVON(...)")


def of_sgd(sgd: SGD, beta2: float) -> list[Settings]:
    """Groups in which IVON, while h stays, takes SGD's steps; SGD adds up what IVON averages."""
    found = []
    for group, own in _groups(sgd, SGD, "nesterov", "maximize", "dampening"):
        momentum = group["momentum"]
        lr, betas = own["lr"] / (1 - momentum), (momentum, beta2)
        found.append({**own, "lr": lr, "betas": betas, "weight_decay": group["weight_decay"]})
    return found


def of_adamw(adamw: AdamW, preset: Settings) -> Settings:
    """A preset for AdamW's groups: a weight moves by its rate at most, and decays where AdamW's do.

    Weights bear noise in proportion to the steps they take, σ² to the rate's square: below the
    preset's own rate λ grows by as much.

    Raises:
        ValueError: all rates are 0.
    """
    bound, own = preset["clip_radius"], list(_groups(adamw, AdamW, "amsgrad", "maximize"))
    rate = max(float(ours["lr"]) for _, ours in own)
    if rate <= 0:
        raise ValueError("AdamW's lr is 0: IVON takes its rate from there")
    decays, found = any(group["weight_decay"] for group, _ in own), []
    for group, ours in own:
        decay = preset["weight_decay"] if group["weight_decay"] or not decays else 0.0
        found.append({**ours, "lr": ours["lr"] / bound, "weight_decay": decay})
    colder = max(1.0, preset["lr"] * bound / rate) ** 2
    return preset | {"params": found, "lr": rate / bound, "ess": preset["ess"] * colder}


def _groups(
    other: Optimizer, kind: type[Optimizer], *odd: str
) -> Iterator[tuple[Settings, Settings]]:
    """An optimizer's groups, and for IVON their parameters, named where they are, and rates.

    A rate is what schedules start from: a warm-up has set it to next to nothing.

    Raises:
        ValueError: it is of another kind, or has what IVON has not.
    """
    name = kind.__name__
    if not isinstance(other, kind):
        raise ValueError(f"this takes torch.optim.{name}, not {type(other).__name__}")
    for group in other.param_groups:
        if has := [setting for setting in odd if group[setting]]:
            raise ValueError(f"IVON has no {has[0]}: build {name} without it")
        params = group["params"]
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        yield group, {"params": params, "lr": group.get("initial_lr", group["lr"])}
