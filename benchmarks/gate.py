"""No speed is printed where an implementation does not agree with float64 on the same noise."""

from __future__ import annotations

import sys

import torch

from benchmarks.peers import nothing, parameters, train
from posterity import IVON

SHAPES = [(64, 100), (100,), (100, 30), (1000, 70), (1,)]
BOUND = 1e-6


def gate(device: str) -> dict[str, float]:
    """Largest difference of the means after five steps, over the largest weight.

    Exits where one is above 1e-6.
    """
    errors = {}
    for fused in (None, False):
        for store_mean in (True, False):
            settings = {"ess": 1e3, "hess_init": 0.1, "betas": (0.9, 0.999), "seed": 0}
            single = parameters(SHAPES, device)
            double = parameters(SHAPES, "cpu", torch.float64)
            one = IVON(single, 0.1, fused=fused, store_mean=store_mean, **settings)
            two = IVON(double, 0.1, fused=False, **settings)
            for opt in (one, two) * 5:
                train(opt, nothing)
            name = f"{one.implementation}, {'kept' if store_mean else 'regenerated'} mean"
            errors[name] = max(
                float((a.double().cpu() - b).detach().abs().max() / b.detach().abs().max())
                for a, b in zip(single, double, strict=True)
            )
    for name, error in errors.items():
        print(f"{name}: within {error:.1e} of float64 on the same noise")
        if not error < BOUND:
            sys.exit(f"{name} disagrees with float64: no speed is worth printing")
    return errors
