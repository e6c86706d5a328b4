"""Settings that work untouched, for kinds of tasks: :meth:`posterity.IVON.defaults_for`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
