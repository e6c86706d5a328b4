"""One run's uncertainty beside other methods' and ensembles' (section 4.2.1 and 4.2.2).

Each method is trained by the recipe `baselines` with every seed and judged on the test images,
and by telling unknown images by the largest class probability. Laplace's Gaussians are fitted to
SGD's runs; a deep ensemble is SGD's runs together, Multi-IVON is IVON's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from posterity.binding import Samples
from posterity_studies import baselines, compare, jobs, runs
from posterity_studies.baselines import ENSEMBLES, LAPLACE
from posterity_studies.recipes import Recipe, recipe
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.tasks import Task, load_task
from posterity_studies.train import Progress, evaluate

METRICS = ("accuracy", "nll", "ece", "brier", "ood_auroc", "ood_fpr_at_95")

Judged = dict[str, float]  # metrics, and the seconds of all training that it took
Result = Mapping[str, Any]  # of a run


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each method: means and standard deviations over seeds, and what it costs."""
    chosen = recipe("published-baselines" if scale == "paper" else "baselines")
    if scale == "smoke":
        short = {"epochs": 1, "train_limit": 200, "samples": 3, "batch_size": 25}
        chosen = replace(chosen, **short)
    work = [
        (chosen, optimizer, seed, compare.run_folder(out, optimizer, seed))
        for seed in seeds
        for optimizer in chosen.optimizers
    ]
    results = jobs.train_all(work, progress)
    task = load_task(chosen)
    found: dict[str, list[Judged]] = {}
    for (_, optimizer, _, folder), result in zip(work, results, strict=True):
        cost = {"seconds": seconds(result)}
        for title, _, evaluation in compare.rows([result]):
            each = result["evaluations"][evaluation]
            title = title.split(",")[0]  # whatever the number of samples
            found.setdefault(title, []).append({m: each[m] for m in METRICS} | cost)
        if optimizer == "sgd":
            for title in progress(LAPLACE, len(LAPLACE), f"Laplace of {folder.name}"):
                found.setdefault(title, []).append(fitted(title, folder, result, task, chosen))
    if len(seeds) > 1:
        for title, optimizer in ENSEMBLES.items():
            mine = [
                (job[3], result)
                for job, result in zip(work, results, strict=True)
                if job[1] == optimizer
            ]
            found[title] = [joined(title, dict(mine), task, chosen)]
    sgd = sum(each["seconds"] for each in found["SGD"]) / len(seeds)
    rows = [_row(title, each, sgd) for title, each in found.items()]
    draw(out / "in-domain.png", found)
    return {"rows": rows, "data": task.digest, "each": found}


def _row(title: str, each: Sequence[Judged], sgd: float) -> dict[str, Any]:
    row: dict[str, Any] = {"method": title}
    for metric in METRICS:
        row[metric] = compare.spread([e[metric] for e in each])
    return row | {"cost, SGD's": sum(e["seconds"] for e in each) / len(each) / sgd}


def seconds(result: Result) -> float:
    """All of a run's training."""
    return result["seconds_per_epoch"] * result["epochs"]


def fitted(title: str, folder: Path, result: Result, task: Task, chosen: Recipe) -> Judged:
    """One of Laplace's Gaussians around a run of SGD, judged; what is done is read."""

    def make() -> Judged:
        _, model, _ = runs.load(folder)
        start = time.perf_counter()
        posterior = LAPLACE[title](model, task.train[0])
        taken = seconds(result) + time.perf_counter() - start
        return judged(model, posterior, task, chosen.samples) | {"seconds": taken}

    path = folder / f"{title.replace(' ', '-')}.json"
    return runs.kept(path, {"of": result["provenance"], "samples": chosen.samples}, make)


def joined(title: str, members: Mapping[Path, Result], task: Task, chosen: Recipe) -> Judged:
    """Runs as one mixture, judged; what is done is read."""

    def make() -> Judged:
        loaded = [runs.load(folder)[1:] for folder in members]
        mixture, samples = baselines.together(loaded, chosen.samples)
        taken = sum(map(seconds, members.values()))
        return judged(loaded[0][0], mixture, task, samples) | {"seconds": taken}

    first = next(iter(members))
    asked = {"of": [r["provenance"] for r in members.values()], "samples": chosen.samples}
    names = "-".join(folder.name for folder in members)
    return runs.kept(first.parent / f"{title.replace(' ', '-')}-of-{names}.json", asked, make)


def judged(model: nn.Module, posterior: Samples, task: Task, samples: int) -> Judged:
    """The metrics of what predicts."""
    found = evaluate(model, posterior, task.test, task.ood, samples)
    return {metric: found[metric] for metric in METRICS}


def draw(path: Path, found: Mapping[str, Sequence[Judged]]) -> None:
    """A dot for each run: calibration against proper score, and what is told apart."""
    with picture(path, 2, (5.2, 4.0)) as panels:
        for panel, x, y in zip(panels, ("nll", "ood_auroc"), ("ece", "accuracy"), strict=True):
            for k, (title, each) in enumerate(found.items()):
                panel.plot(
                    [e[x] for e in each],
                    [e[y] for e in each],
                    "os^Dv<>PX*hd"[k % 12],
                    color=COLOURS[k % len(COLOURS)],
                    fillstyle="full" if k < len(COLOURS) else "none",
                    label=title,
                )
        label(panels[0], "Known images: lower left is better", "NLL, nats", "ECE")
        panels[0].set(xscale="log", yscale="log")  # a method that is far off squeezes no other
        for axis in (panels[0].xaxis, panels[0].yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}" if axis is panels[0].xaxis else "")
        label(panels[1], "Unknown images: upper right is better", "OOD AUROC", "accuracy")
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
