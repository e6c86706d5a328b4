"""How many samples, at test time and in training? (section 4.2.3, figure 4)

IVON on Fashion-MNIST, trained with one, two and four samples a step. Test samples are drawn once;
fewer than all are groups of them, so that the spread over groups is that of drawing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from posterity import metrics, predict
from posterity_studies import jobs, runs
from posterity_studies.recipes import Recipe, recipe
from posterity_studies.settings import Ivon, IvonSamples
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task
from posterity_studies.train import EVAL_BATCH, Progress, silent

TEST = 512
GROUPS = 8  # at most, of samples
MEASURES = {
    "accuracy": metrics.accuracy,
    "NLL": metrics.nll,
    "ECE": lambda p, y: metrics.ece(p, y, 20),
}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each number of training samples and of test samples; means over seeds."""
    base, in_training, in_test = recipe("fashion-mnist"), (1, 2, 4), TEST
    if scale == "paper":
        base, in_training = recipe("cifar10-resnet20-frn"), (1, 2, 4, 8, 16, 32)
    if scale == "smoke":
        base, in_training, in_test = replace(recipe("smoke"), epochs=1), (1, 2), 4
    ivon = base.settings("ivon")
    assert isinstance(ivon, Ivon)
    work = []
    for k in in_training:
        settings = IvonSamples(**asdict(ivon), mc_samples=k) if k > 1 else ivon
        chosen = replace(base, optimizers={"ivon": settings})
        work += [(chosen, "ivon", seed, out / f"{k}-samples-seed{seed}") for seed in seeds]
    results = jobs.train_all(work, progress)
    folders = [job[3] for job in work]
    calls = [(folder, base, in_test) for folder in folders]
    found = jobs.each(judged, calls, progress, "tests", folders, bars=True)
    rows = []
    for k in in_training:
        mine = [f for job, f in zip(work, found, strict=True) if job[3].name.startswith(f"{k}-")]
        seconds = [
            r["seconds_per_epoch"]
            for job, r in zip(work, results, strict=True)
            if job[3].name.startswith(f"{k}-")
        ]
        for count in mine[0]:
            row: dict[str, Any] = {
                "method": f"{k} in training",
                "at test": "the mean" if count == "0" else count,
            }
            for name in MEASURES:
                row[name] = fmean(f[count][name][0] for f in mine)
                row[f"{name} spread"] = fmean(f[count][name][1] for f in mine)
            rows.append(row | {"s/epoch": fmean(seconds)})
    draw(out / "mc-samples.png", rows)
    return {"rows": rows, "data": results[0]["provenance"]["data"]}


def judged(
    folder: Path, base: Recipe, samples: int, progress: Progress = silent
) -> dict[str, dict[str, tuple[float, float]]]:
    """Number of samples (0: the mean) → measure → mean and spread over groups; kept in a file."""
    asked = {"samples": samples, "groups": GROUPS}
    of = runs.read_json(folder / "result.json")["provenance"]
    make = partial(_judged, folder, base, samples, progress)
    return runs.kept(folder / "mc-samples.json", {**asked, "of": of}, make)


def _judged(
    folder: Path, base: Recipe, samples: int, progress: Progress
) -> dict[str, dict[str, tuple[float, float]]]:
    _, model, posterior = runs.load(folder)
    assert posterior is not None
    inputs, targets = load_task(base).test
    at_mean = predict(model, None, inputs, batch_size=EVAL_BATCH).probs
    found = {"0": spread([at_mean], targets)}
    each = []
    for index in progress(range(samples), samples, f"samples of {folder.name}"):
        with posterior.sampled(model, 0, index):
            each.append(predict(model, None, inputs, batch_size=EVAL_BATCH).probs)
    count = 1
    while count <= samples:
        starts = range(0, min(samples, GROUPS * count), count)
        groups = [torch.stack(each[start : start + count]).mean(0) for start in starts]
        found[str(count)] = spread(groups, targets)
        count *= 2
    return found


def spread(groups: Sequence[Tensor], targets: Tensor) -> dict[str, tuple[float, float]]:
    """Each measure's mean and standard deviation over groups of samples."""
    found = {}
    for name, measure in MEASURES.items():
        values = [measure(probs, targets) for probs in groups]
        found[name] = (fmean(values), stdev(values) if len(values) > 1 else 0.0)
    return found


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A measure a panel, a line for each number in training, the mean as a dotted line."""
    with picture(path, len(MEASURES)) as panels:
        for panel, name in zip(panels, MEASURES, strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                mine = [row for row in rows if row["method"] == method]
                at_mean, *sampled = mine
                counts = [int(row["at test"]) for row in sampled]
                (line,) = panel.plot(counts, [row[name] for row in sampled], "o-", label=method)
                low, high = (
                    [row[name] + sign * row[f"{name} spread"] for row in sampled]
                    for sign in (-1, 1)
                )
                panel.fill_between(counts, low, high, color=line.get_color(), alpha=0.15)
                panel.axhline(at_mean[name], color=line.get_color(), ls=":", lw=1)
            label(panel, name, "samples at test time", f"{name} (dotted: at the mean)")
            panel.set_xscale("log", base=2)
        panels[0].legend(fontsize=8)
