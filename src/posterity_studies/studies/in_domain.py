"""One run's uncertainty beside other methods' and ensembles' (section 4.2.1 and 4.2.2).

Each method is trained by the recipe `baselines` with every seed and judged on the test images,
and by telling unknown images by the largest class probability. Laplace's Gaussians are fitted to
SGD's runs; a deep ensemble is SGD's runs together, Multi-IVON is IVON's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

from posterity import Mixture, Posterior
from posterity.binding import Samples
from posterity_studies import baselines, compare, jobs, runs
from posterity_studies.recipes import Recipe, recipe
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.tasks import Task, load_task
from posterity_studies.train import Progress, evaluate

METRICS = ("accuracy", "nll", "ece", "brier", "ood_auroc", "ood_fpr_at_95")
LAPLACE = {"last-layer Laplace": baselines.last_layer, "diagonal Laplace": baselines.diagonal}
ENSEMBLES = {"deep ensemble": "sgd", "Multi-IVON": "ivon"}
SAMPLED = {"ivon", "dropout", "swag", "bbb", "vogn"}

Judged = dict[str, float]  # metrics, and the seconds of all training that it took


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
        name = compare.LABELS[optimizer]
        for key, each in result["evaluations"].items():
            title = f"{name} at the mean" if key == "mean" and optimizer in SAMPLED else name
            kept = {m: each[m] for m in METRICS}
            cost = {"seconds": result["seconds_per_epoch"] * result["epochs"]}
            found.setdefault(title, []).append(kept | cost)
        if optimizer == "sgd":
            taken = result["seconds_per_epoch"] * result["epochs"]
            for title in progress(LAPLACE, len(LAPLACE), f"Laplace of {folder.name}"):
                found.setdefault(title, []).append(fitted(title, folder, taken, task, chosen))
    if len(seeds) > 1:
        for title, optimizer in ENSEMBLES.items():
            folders = [compare.run_folder(out, optimizer, seed) for seed in seeds]
            seconds = sum(each["seconds"] for each in found[compare.LABELS[optimizer]])
            found[title] = [joined(title, folders, seconds, task, chosen)]
    sgd = sum(each["seconds"] for each in found["SGD"]) / len(seeds)
    rows = [_row(title, each, sgd) for title, each in found.items()]
    draw(out / "in-domain.png", found)
    return {"rows": rows, "data": task.digest, "each": found}


def _row(title: str, each: Sequence[Judged], sgd: float) -> dict[str, Any]:
    row: dict[str, Any] = {"method": title}
    for metric in METRICS:
        row[metric] = spread([e[metric] for e in each])
    return row | {"cost, SGD's": sum(e["seconds"] for e in each) / len(each) / sgd}


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, of several."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def fitted(title: str, folder: Path, seconds: float, task: Task, chosen: Recipe) -> Judged:
    """One of Laplace's Gaussians around a run of SGD, judged; what is done is read."""

    def make() -> tuple[nn.Module, Samples, float]:
        _, model, _ = runs.load(folder)
        start = time.perf_counter()
        posterior = LAPLACE[title](model, task.train[0])
        return model, posterior, seconds + time.perf_counter() - start

    return _judged(folder / f"{title.replace(' ', '-')}.json", make, task, chosen.samples)


def joined(
    title: str, folders: Sequence[Path], seconds: float, task: Task, chosen: Recipe
) -> Judged:
    """Runs as one mixture, judged; what is done is read."""
    loaded = [runs.load(folder) for folder in folders]
    posteriors = [q for _, _, q in loaded if isinstance(q, Posterior)]
    samples = chosen.samples if posteriors else len(folders)

    def make() -> tuple[nn.Module, Samples, float]:
        networks = [model for _, model, _ in loaded]
        mixture = Mixture(posteriors) if posteriors else baselines.ensemble(networks)
        return networks[0], mixture, seconds

    name = f"{title.replace(' ', '-')}-of-{'-'.join(folder.name for folder in folders)}.json"
    return _judged(folders[0].parent / name, make, task, samples)


def _judged(
    path: Path, make: Callable[[], tuple[nn.Module, Samples, float]], task: Task, samples: int
) -> Judged:
    if path.exists():
        return runs.read_json(path)
    model, posterior, seconds = make()
    found = evaluate(model, posterior, task.test, task.ood, samples)
    kept = {metric: found[metric] for metric in METRICS} | {"seconds": seconds}
    runs.write_json(path, kept)
    return kept


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
