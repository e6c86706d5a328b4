"""What one optimizer step costs, as a ratio to PyTorch's fused AdamW in the same run.

First IVON must agree with its float64 self on the same noise: no speed is printed where it does
not. Rounds of all optimizers are interleaved and medians taken, since machines are noisy.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ivon
import torch
from torch import Tensor
from torch.optim import Optimizer

from posterity import IVON
from posterity_studies.runs import provenance

SHAPES = {
    "10k MLP": [(64, 100), (100,), (100, 30), (30,)],
    "50 x 100k": [(100_000,)] * 50,
}
ROUNDS = 15


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator) for s in shapes]
    params = [torch.nn.Parameter(p.to(dtype)) for p in made]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


def step(opt: Optimizer) -> None:
    """A step on given gradients: what is left of the training step is the optimizer's cost."""
    if isinstance(opt, IVON):
        opt.train()
    opt.step()


def step_ivon_opt(opt: ivon.IVON) -> None:
    with opt.sampled_params(train=True):
        pass
    opt.step()


def gate(fused: bool | None) -> float:
    """Largest difference of a float32 mean from float64's, after 5 steps on the same noise."""
    single, double = (parameters(SHAPES["10k MLP"], d) for d in (torch.float32, torch.float64))
    for params in (single, double):
        how = fused if params is single else False
        opt = IVON(params, 0.1, ess=1000, hess_init=0.1, betas=(0.9, 0.999), seed=0, fused=how)
        for _ in range(5):
            step(opt)
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max())
        for a, b in zip(single, double, strict=True)
    )


def main() -> None:
    print(f"IVON runs as: {IVON(parameters([(1,)]), 1e-3, ess=1).implementation}")
    for fused in (None, False):
        error = gate(fused)
        name = "reference" if fused is False else "IVON"
        print(f"{name} against float64 on the same noise: {error:.1e} of the largest weight")
        if not error < 1e-6:
            sys.exit("the implementations disagree: no speed is worth printing")
    report: dict[str, dict[str, float]] = {}
    for name, shapes in SHAPES.items():
        steps: dict[str, Callable[[], None]] = {}
        for label, build, run in (
            ("AdamW, fused", lambda p: torch.optim.AdamW(p, 1e-3, fused=True), step),
            ("SGD, fused", lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, fused=True), step),
            ("IVON", lambda p: IVON(p, 1e-3, ess=1000, seed=0), step),
            ("IVON, no mean", lambda p: IVON(p, 1e-3, ess=1000, seed=0, store_mean=False), step),
            ("IVON, reference", lambda p: IVON(p, 1e-3, ess=1000, seed=0, fused=False), step),
            ("ivon-opt", lambda p: ivon.IVON(p, 1e-3, ess=1000), step_ivon_opt),
        ):
            opt = build(parameters(shapes))
            steps[label] = lambda run=run, opt=opt: run(opt)
        seconds: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(ROUNDS):
            for label, once in steps.items():
                start = time.perf_counter()
                once()
                seconds[label].append(time.perf_counter() - start)
        medians = {label: statistics.median(s[2:]) for label, s in seconds.items()}
        base = medians["AdamW, fused"]
        report[name] = {label: s / base for label, s in medians.items()}
        print(f"\n{name}: AdamW, fused {base * 1e3:.2f} ms")
        for label, ratio in report[name].items():
            print(f"  {label:16} {ratio:7.2f} x")
    out = Path("runs/bench.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"ratios": report, **provenance(0, "none")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
