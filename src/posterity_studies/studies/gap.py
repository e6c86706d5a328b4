"""Does the variance grow between the data? (Fig. 3c)

One-dimensional regression from two clusters of inputs: between them and beyond them there are none,
and a posterior should say so. IVON with several samples a step, a mixture of five such runs, and,
for what the modes alone say, an ensemble of the five means.

Source: Foong et al. 2019, arXiv 1909.00719 ("in-between" uncertainty); Shen et al. 2024, arXiv
2402.17641.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posterity import IVON, Mixture, Posterior, predict
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.train import Progress

NOISE = 0.1  # standard deviation of the observations, in units of y; known
EXAMPLES = 100
NEAR, FAR = 1.0, 2.0  # the clusters are where |x| is between
EDGE = 3.0  # of what is looked at
MEMBERS, STEPS = {"desk": 5, "smoke": 2}, {"desk": 1500, "smoke": 500}
SAMPLES = 200  # of each posterior and mixture


def truth(x: Tensor) -> Tensor:
    """The function without noise."""
    return 0.8 * torch.sin(2.5 * x) + 0.3 * x


def observations(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (examples, 1) each: half of them in each cluster."""
    generator = torch.Generator().manual_seed(seed)
    distance = NEAR + (FAR - NEAR) * torch.rand(EXAMPLES, 1, generator=generator)
    x = torch.where(torch.arange(EXAMPLES)[:, None] % 2 == 0, distance, -distance)
    return x, truth(x) + NOISE * torch.randn(EXAMPLES, 1, generator=generator)


def network() -> nn.Module:
    """Two hidden layers: with one (of ReLU), no diagonal Gaussian can widen between the data."""
    hidden = [nn.Linear(1, 50), nn.SiLU(), nn.Linear(50, 50), nn.SiLU()]
    return nn.Sequential(*hidden, nn.Linear(50, 1))


def trained(data: tuple[Tensor, Tensor], seed: int, steps: Iterable[int], count: int) -> Posterior:
    """A run's posterior; λ = N, and a prior of standard deviation 1 on every weight."""
    torch.manual_seed(seed)
    model, (x, y) = network(), data
    how = {"hess_init": 10.0, "betas": (0.9, 0.999), "weight_decay": 1 / len(x), "mc_samples": 4}
    opt = IVON(model.parameters(), lr=0.015, ess=len(x), seed=seed, **how)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, count)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(x) - y).square().mean() / (2 * NOISE**2)
        loss.backward()
        return loss

    for _ in steps:
        opt.step(closure)
        schedule.step()
    return opt.posterior(model)


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Standard deviations at the data, between and beyond, means over seeds."""
    grid = torch.linspace(-EDGE, EDGE, 241)[:, None]
    digest, found = hashlib.sha256(), []
    for seed in seeds:
        data = observations(seed)
        digest.update(torch.cat(data).numpy().tobytes())
        runs = [
            trained(data, MEMBERS[scale] * seed + member, bar, STEPS[scale])
            for member in range(MEMBERS[scale])
            for bar in [progress(range(STEPS[scale]), STEPS[scale], f"run {member + 1}")]
        ]
        found.append(bands(runs, grid))
        if seed == seeds[0]:
            draw(out / "gap.png", found[0], grid, data)
    rows = [
        {"method": name, **_mean([widths(each[name], grid) for each in found])} for name in found[0]
    ]
    return {"rows": rows, "data": f"sha256:{digest.hexdigest()}"}


def bands(runs: Sequence[Posterior], grid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each method, mean and total standard deviation of a new observation on the grid."""
    means = Mixture([run.temper(1e-12) for run in runs])  # as good as no variance
    methods = {
        "IVON, one run": runs[0],
        f"IVON, mixture of {len(runs)} runs": Mixture(runs),
        f"ensemble of the {len(runs)} means": means,
    }
    found = {}
    for name, posterior in methods.items():
        p = predict(network(), posterior, grid, SAMPLES, likelihood="gaussian", noise=NOISE)
        found[name] = p.mean[:, 0], p.variance.sqrt()[:, 0]
    return found


def widths(band: tuple[Tensor, Tensor], grid: Tensor) -> dict[str, float]:
    """Root mean square of the standard deviation of the function itself, in each region."""
    mean, std = band
    variance, x = std.square() - NOISE**2, grid[:, 0].abs()
    regions = {"at the data": (x > NEAR) & (x < FAR), "in the gap": x < 0.7 * NEAR}
    regions["beyond"] = x > FAR + 0.3 * (EDGE - FAR)
    found = {f"sd {name}": variance[at].mean().sqrt().item() for name, at in regions.items()}
    at = regions["at the data"]
    miss = (mean - truth(grid[:, 0]))[at].square().mean().sqrt().item()
    return {**found, "error at the data": miss}


def draw(
    path: Path,
    found: dict[str, tuple[Tensor, Tensor]],
    grid: Tensor,
    data: tuple[Tensor, Tensor],
) -> None:
    """Mean and two standard deviations of an observation, a panel for each method."""
    x, line = grid[:, 0], truth(grid[:, 0])
    with picture(path, len(found), (4.2, 3.4)) as panels:
        for panel, (name, (mean, std)), colour in zip(panels, found.items(), COLOURS, strict=False):
            panel.axvspan(-NEAR, NEAR, color="#efefef", lw=0, label="no data")
            for share, alpha in ((2, 0.22), (1, 0.3)):
                low, high = mean - share * std, mean + share * std
                panel.fill_between(x, low, high, color=colour, alpha=alpha, lw=0)
            panel.plot(x, mean, color=colour, lw=1.8, label="mean ± 1, 2 sd")
            panel.plot(x, line, color="#444444", lw=1, ls="--", label="the function")
            panel.plot(data[0], data[1], "o", color="#222222", ms=2.5, label="data")
            label(panel, name, "x", "y")
            panel.set(xlim=(-EDGE, EDGE), ylim=(-2.6, 2.6))
            panel.grid(visible=False)
        panels[0].legend(fontsize=8, loc="upper left")


def _mean(each: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(e[key] for e in each) / len(each) for key in each[0]}
