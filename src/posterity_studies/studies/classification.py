"""Is IVON as accurate as AdamW and SGD, and better calibrated? (table 1)

ResNet-20 on CIFAR-10, from scratch; at the paper's scale all of its networks and data but ImageNet,
whose recipe is `imagenet-resnet50`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from posterity_studies import compare, jobs
from posterity_studies.recipes import PUBLISHED, Recipe, recipe
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.train import Progress

METRICS = ("accuracy", "nll", "ece", "brier")
NAMES = {
    "smoke": ("smoke",),
    "desk": ("cifar10-resnet20",),
    "gpu": ("cifar10-resnet20-frn",),
    "paper": tuple(PUBLISHED),
}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each recipe, optimizer and evaluation: means and standard deviations over seeds."""

    def asked(name: str) -> Recipe:
        if scale != "gpu":
            return recipe(name)
        return replace(recipe(name), ood="", compiled=True)  # SVHN is in no registry

    work = [
        (chosen, optimizer, seed, compare.run_folder(out / chosen.name, optimizer, seed))
        for chosen in map(asked, NAMES[scale])
        for optimizer in chosen.optimizers
        for seed in seeds
    ]
    results = jobs.train_all(work, progress)
    rows, each = [], {}
    for name in NAMES[scale]:
        mine = [r for r in results if r["name"] == name]
        for title, optimizer, evaluation in compare.rows(mine):
            runs = [r for r in mine if r["settings"]["optimizer"] == optimizer]
            found = [{m: r["evaluations"][evaluation][m] for m in METRICS} for r in runs]
            each.setdefault(name, {})[title] = found
            row: dict[str, Any] = {"method": title, "recipe": name}
            row |= {metric: compare.spread([f[metric] for f in found]) for metric in METRICS}
            rows.append(row | {"s/epoch": fmean(r["seconds_per_epoch"] for r in runs)})
    draw(out / "classification.png", results, each)
    digests = dict.fromkeys(r["provenance"]["data"] for r in results)
    return {"rows": rows, "data": " ".join(digests), "each": each}


def draw(path: Path, results: Sequence[Mapping[str, Any]], each: Mapping[str, Any]) -> None:
    """Of each recipe the test loss over epochs, at the mean; what samples make of it is a star."""
    with picture(path, len(each)) as panels:
        for panel, (name, found) in zip(panels, each.items(), strict=True):
            mine = [r for r in results if r["name"] == name]
            optimizers = dict.fromkeys(r["settings"]["optimizer"] for r in mine)
            for colour, optimizer in zip(COLOURS, optimizers, strict=False):
                curves = [r["curve"] for r in mine if r["settings"]["optimizer"] == optimizer]
                losses = [fmean(v) for v in zip(*(c["test_nll"] for c in curves), strict=True)]
                title = compare.LABELS[optimizer]
                panel.plot(curves[0]["epoch"], losses, color=colour, label=title)
                for sampled in (t for t in found if t.startswith(f"{title}, ")):
                    nll = fmean(f["nll"] for f in found[sampled])
                    panel.plot(len(losses), nll, "*", color=colour, ms=9, label=sampled)
            label(panel, name, "epoch", "test NLL, nats")
            panel.set_yscale("log")
            panel.legend(fontsize=8)
