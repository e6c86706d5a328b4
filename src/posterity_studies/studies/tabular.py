"""How good are predictive distributions of tables' numbers? (after section 4.2.4)

The competition's network, one hidden layer that gives a mean and a noise, on four tables, split
into nine parts to train on and one to test with, anew for each seed. Both optimizers have as many
trials on the first split, judged on a tenth of its training rows (which other splits may test with:
so it is for both); then five runs of each are trained, and judged one by one and together. IVON
takes five samples a step, and so five passes where AdamW takes one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gaussian_nll_loss

from posterity import predict
from posterity.binding import Samples
from posterity_studies import baselines, jobs, runs
from posterity_studies.data import packages, tabular
from posterity_studies.models import Regression
from posterity_studies.settings import Adamw, IvonSamples, Settings
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.tasks import batches
from posterity_studies.train import Progress, warmup_cosine

MEMBERS, EPOCHS, BATCH, SAMPLES, ROWS = 5, 60, 32, 100, 2000  # rows: of a longer table
TRIALS: dict[str, list[Settings]] = {  # as many of each
    "adamw": [
        Adamw(lr=lr, weight_decay=decay) for decay in (0.1, 1.0) for lr in (3e-3, 1e-2, 3e-2)
    ],
    "ivon": [
        IvonSamples(lr=lr, hess_init=h, weight_decay=5e-3, memory=1e3, mc_samples=5)
        for h in (0.5, 2.0)
        for lr in (0.05, 0.1, 0.2)
    ],
}
TITLES = {
    "adamw": ("AdamW", f"deep ensemble of {MEMBERS}"),
    "ivon": ("IVON", f"mixture of {MEMBERS} of IVON"),
}
Data = tuple[Tensor, Tensor]


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each table and method: root mean square error and NLL, in the targets' units."""
    smoke = scale == "smoke"
    tables = list(tabular.TABLES)[: 1 if smoke else None]
    epochs, count = (1, 1) if smoke else (EPOCHS, None)
    trials = {o: every[:count] for o, every in TRIALS.items()}
    work = [(t, o, k) for t in tables for o, every in trials.items() for k in range(len(every))]
    kept = [out / "trials" / f"{t}-{o}-{k}.json" for t, o, k in work]
    given = [(path, t, trials[o][k], epochs) for path, (t, o, k) in zip(kept, work, strict=True)]
    tried = jobs.each(tried_on, given, progress, "trials", kept)
    known = {(t, settings): loss for (_, t, settings, _), loss in zip(given, tried, strict=True)}
    chosen = {
        t: {o: min(every, key=lambda s, t=t: known[t, s]) for o, every in trials.items()}
        for t in tables
    }
    calls = [
        (out / f"{table}-{o}-{seed}.json", table, o, chosen[table][o], seed, epochs)
        for table in tables
        for seed in seeds
        for o in trials
    ]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for call, scores in zip(
        calls, jobs.each(judged, calls, progress, "splits", [c[0] for c in calls]), strict=True
    ):
        for method, score in scores.items():
            found.setdefault((call[1], method), []).append(score)
    rows = []
    for (table, method), each in found.items():
        row: dict[str, Any] = {"method": method, "table": table}
        for measure in ("RMSE", "NLL"):
            values = [e[measure] for e in each]
            row[measure] = fmean(values)
            row[f"{measure} s.e."] = stdev(values) / math.sqrt(len(values)) if len(seeds) > 1 else 0
        rows.append(row)
    draw(out / "tabular.png", found)
    settings = {t: {o: asdict(s) for o, s in each.items()} for t, each in chosen.items()}
    losses = [
        {"table": t, "settings": asdict(s), "NLL": loss if math.isfinite(loss) else None}
        for (t, s), loss in known.items()
    ]
    read = packages.PACKAGES["tables"].sha256
    each = {f"{table}, {method}": scores for (table, method), scores in found.items()}
    return {"rows": rows, "data": read, "settings": settings, "trials": losses, "each": each}


def split(table: str, seed: int) -> tuple[Data, Data, float]:
    """Rows to train on and to test with, standardised by the first, and a target's unit."""
    x, y = tabular.load(table)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:ROWS]
    first = order[: round(0.9 * len(order))]
    x = (x - x[first].mean(0)) / x[first].std(0).clamp_min(1e-6)
    unit = y[first].std().item()
    y = (y - y[first].mean()) / unit
    rest = order[len(first) :]
    return (x[first], y[first]), (x[rest], y[rest]), unit


def fitted(data: Data, settings: Settings, seed: int, epochs: int) -> tuple[nn.Module, Any]:
    """A trained network and, of IVON, its posterior."""
    x, y = data
    torch.manual_seed(seed)
    model = Regression(x.shape[1])
    steps = epochs * math.ceil(len(y) / BATCH)
    opt = settings.build(model, len(y), steps, seed)
    rate = torch.optim.lr_scheduler.LambdaLR(opt, warmup_cosine(0.05 * steps, steps))
    for epoch in range(epochs):
        for batch in batches(len(y), BATCH, seed, epoch):

            def closure(batch: Tensor = batch) -> Any:
                opt.zero_grad()
                mean, noise = model(x[batch])
                loss = gaussian_nll_loss(mean, y[batch], noise.exp())
                loss.backward()
                return loss

            opt.step(closure)
            rate.step()
    posterior = getattr(opt, "posterior", None)
    return model, posterior(model) if posterior else None


def scored(
    model: nn.Module, posterior: Samples | None, data: Data, unit: float, samples: int = SAMPLES
) -> dict[str, Any]:
    """Of the Gaussian with the predictive mean and variance."""
    p = predict(model, posterior, data[0], samples, likelihood="gaussian")
    nll = gaussian_nll_loss(p.mean, data[1], p.variance, full=True).item() + math.log(unit)
    return {"RMSE": unit * (p.mean - data[1]).square().mean().sqrt().item(), "NLL": nll}


def tried_on(path: Path, table: str, settings: Settings, epochs: int) -> float:
    """NLL on the last tenth of the first split's training rows; infinite where it diverged.

    It is kept in a file.
    """

    def make() -> float | None:
        (x, y), _, unit = split(table, 0)
        kept = round(0.9 * len(y))
        model, posterior = fitted((x[:kept], y[:kept]), settings, 0, epochs)
        loss = scored(model, posterior, (x[kept:], y[kept:]), unit)["NLL"]
        return loss if math.isfinite(loss) else None

    loss = runs.kept(path, asked(settings, epochs), make)
    return math.inf if loss is None else loss


def asked(settings: Settings, epochs: int) -> dict[str, Any]:
    """All that a kept score depends on, beside its name."""
    kept = {"kind": type(settings).__name__, **asdict(settings), "epochs": epochs}
    return kept | {"members": MEMBERS, "batch": BATCH, "samples": SAMPLES, "rows": ROWS}


def judged(
    path: Path, table: str, optimizer: str, settings: Settings, seed: int, epochs: int
) -> dict[str, dict[str, float]]:
    """One split: the mean of single runs' scores, and that of all together; kept in a file."""

    def make() -> dict[str, dict[str, float]]:
        train, test, unit = split(table, seed)
        fits = [fitted(train, settings, MEMBERS * seed + k, epochs) for k in range(MEMBERS)]
        each = [scored(model, posterior, test, unit) for model, posterior in fits]
        together, samples = baselines.together(fits, SAMPLES)
        one, all_of_them = TITLES[optimizer]
        return {
            one: {m: fmean(e[m] for e in each) for m in each[0]},
            all_of_them: scored(fits[0][0], together, test, unit, samples),
        }

    return runs.kept(path, asked(settings, epochs), make)


def draw(path: Path, found: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """A panel for each table: NLL and error of every split, joined by their means."""
    tables = list(dict.fromkeys(table for table, _ in found))
    with picture(path, len(tables), (3.4, 3.2)) as panels:
        for panel, table in zip(panels, tables, strict=True):
            for k, (method, each) in enumerate((m, e) for (t, m), e in found.items() if t == table):
                values = ([e["RMSE"] for e in each], [e["NLL"] for e in each])
                colour = COLOURS[k % len(COLOURS)]
                panel.plot(*values, ".", color=colour, alpha=0.4)
                panel.plot(*map(fmean, values), "os^D"[k], color=colour, label=method)
            label(panel, table, "root mean square error", "NLL, nats")
        panels[0].legend(fontsize=7)
