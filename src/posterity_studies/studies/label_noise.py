"""Does sensitivity find wrong labels?

LeNet-5 on Fashion-MNIST with 5 % of the training labels flipped to another class. The training
images are ranked by IVON's sensitivities, by their self-influence (how much an image's own loss
would rise if it were left out), by AdamW's stand-in for both, and by nothing but the loss, at
several epochs: a network that has learnt its wrong labels by heart no longer doubts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posterity import IVON, metrics, sensitivity
from posterity.integrations.adam import adam_posterior
from posterity.perturbation import perturb
from posterity_studies import runs
from posterity_studies.recipes import Recipe, UserError, recipe
from posterity_studies.studies.leave_one_out import PRIOR
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import Task, load_task
from posterity_studies.train import Progress, train

SHARE = 0.05
WHEN = (1, 2, 5, 10, 20)  # epochs; the last is the end of training
RANKINGS = {
    "ivon.loss": "loss, IVON",
    "ivon.full": "sensitivity, IVON",
    "ivon.influence": "self-influence, IVON",
    "ivon.diagonal": "sensitivity, class-diagonal, IVON",
    "adamw.loss": "loss, AdamW",
    "adamw.full": "sensitivity, AdamW's stand-in",
    "adamw.influence": "self-influence, AdamW's stand-in",
    "adamw.diagonal": "sensitivity, class-diagonal, AdamW's stand-in",
}
STYLES = {"loss": ":", "full": "-", "influence": "-.", "diagonal": "none"}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """AUROC and precision of each ranking at the end and at its best epoch, means over seeds."""
    chosen, when = replace(recipe("lenet5"), label_noise=SHARE, epochs=WHEN[-1]), WHEN
    if scale == "smoke":
        chosen, when = replace(chosen, epochs=2, train_limit=500, samples=2), (1, 2)
    task = load_task(chosen)
    assert task.wrong is not None
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for key in RANKINGS:
        optimizer, kind = key.split(".")
        each = [ranked(chosen, task, optimizer, seed, when, out, progress) for seed in seeds]
        curves[key] = {
            epoch: _mean([quality(found[f"{epoch}.{kind}"], task.wrong) for found in each])
            for epoch in (when if kind != "diagonal" else when[-1:])
        }
    rows = []
    for key, name in RANKINGS.items():
        best = max(curves[key].items(), key=lambda item: item[1]["AUROC"])
        found = {"best epoch": best[0], "AUROC then": best[1]["AUROC"]}
        rows.append({"method": name, **curves[key][when[-1]], **found})
    draw(out / "label-noise.png", curves)
    return {"rows": rows, "data": task.digest, "curves": curves, "wrong": int(task.wrong.sum())}


def draw(path: Path, curves: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """How well each ranking points at wrong labels, over epochs."""
    with picture(path, 2) as panels:
        for panel, what in zip(panels, ("AUROC", "precision at 5 %"), strict=True):
            for key, curve in curves.items():
                style = STYLES[key.split(".")[1]]
                look = {"ls": style, "marker": "o" if style != "none" else "s"}
                look["color"] = f"C{int(key.startswith('adamw'))}"
                values = [at[what] for at in curve.values()]
                panel.plot([*curve], values, label=RANKINGS[key], **look)
            label(panel, f"Flipped labels found: {what}", "epochs trained", what)
            when = [*curves["ivon.loss"]]
            panel.set(xscale="log", xticks=when, xticklabels=when)
            panel.minorticks_off()
        lines = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(*lines, loc="outside lower center", ncols=2, fontsize=8)


def ranked(
    chosen: Recipe,
    task: Task,
    optimizer: str,
    seed: int,
    when: Sequence[int],
    out: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """Train, and score every training image after some epochs: ``EPOCH.KIND`` → scores."""
    path = out / f"{optimizer}-seed{seed}.safetensors"
    known = runs.read_tensors(path) if path.exists() else {}
    n = len(task.train[1])
    steps = math.ceil(n / chosen.batch_size)

    def watch(step: int, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        epoch = step // steps
        if step % steps or epoch not in when or f"{epoch}.full" in known:
            return
        if isinstance(opt, IVON):
            posterior = opt.posterior(model)
        else:
            posterior = adam_posterior(opt, model, n, PRIOR)
        found = perturb(model, posterior, task.train)
        known[f"{epoch}.full"], known[f"{epoch}.loss"] = found.sensitivity, found.loss
        known[f"{epoch}.influence"] = found.left_out - found.loss
        if epoch == when[-1]:  # it takes longer than all the rest
            known[f"{epoch}.diagonal"] = sensitivity(model, posterior, task.train, full=False)
        runs.write_tensors(path, known)

    folder = out / f"{optimizer}-seed{seed}"
    train(chosen, optimizer, seed, folder, progress, watch)
    kinds = ("full", "loss", "influence")
    if any(f"{epoch}.{kind}" not in known for epoch in when for kind in kinds):
        raise UserError(f"{path} does not hold all scores: remove it and {folder}, or change --out")
    return known


def quality(scores: Tensor, wrong: Tensor) -> dict[str, float]:
    """How well high scores point at wrong labels."""
    top = scores.argsort(descending=True)[: round(SHARE * len(scores))]
    return {
        "AUROC": metrics.auroc(scores[wrong], scores[~wrong]),
        "precision at 5 %": wrong[top].double().mean().item(),
    }


def _mean(each: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(e[key] for e in each) / len(each) for key in each[0]}
