"""Search settings on a validation split by successive halving, alike for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.ticker import LogLocator

from posterity_studies import compare, jobs, runs
from posterity_studies.recipes import Range, Recipe, UserError
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task
from posterity_studies.train import Progress, train

VALIDATION = 10_000  # training images held out
KEPT = ("nll", "accuracy", "ece", "brier")
FACTOR = 3  # a third of the trials goes on, for three times as long
FINALISTS = 3  # trials of each optimizer that are trained again
SEEDS = (0, 1, 2)  # with these seeds

Given = dict[str, float]  # settings
Trial = dict[str, Any]  # settings, epochs, number of seeds, mean validation metrics


def trials(space: Mapping[str, Range], n: int) -> list[Given]:
    """``n`` settings spread over a space: a Sobol sequence on logarithmic axes.

    The sequence is fixed, so that an interrupted search can be taken up again.
    """
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(n)
    return [
        {
            key: float(f"{low * (high / low) ** u:.3g}")
            for (key, (low, high)), u in zip(space.items(), point.tolist(), strict=True)
        }
        for point in points
    ]


def rounds(epochs: int, n: int, first: int | None = None) -> list[int]:
    """Epochs of each round: from ``first`` three times as many each time, at last all ``epochs``.

    By default so few at first that the last round has the best of ``n`` by threes.

    >>> rounds(18, 12), rounds(100, 12), rounds(18, 12, first=18)
    ([2, 6, 18], [12, 36, 100], [18])
    """
    times = FACTOR ** int(math.log(n, FACTOR) + 1e-9)
    length, found = -(-epochs // times) if first is None else first, []
    while length < epochs:
        found.append(length)
        length *= FACTOR
    return [*found, epochs]


def tune(
    recipe: Recipe, n: int, out: Path, progress: Progress, first: int | None = None
) -> dict[str, Any]:
    """``n`` trials of every optimizer, and as many epochs; the lowest NLL is best.

    After each round the better third goes on. It is trained from the start, under a schedule of the
    round's own length: trials that are merely cut short favour small rates. The best
    :data:`FINALISTS` are then trained in full with more seeds, and the lowest mean NLL wins: one
    seed alone would choose by luck. IVON is judged with posterior samples, as it will be used.
    Finished runs are not run again.

    Args:
        recipe: what is trained, and where to search.
        n: trials of each optimizer, spread over its search space.
        out: folder of the runs.
        progress: of the runs of each round.
        first: epochs of the first round (see :func:`rounds`).

    Returns:
        Facts and provenance of the search, and optimizer → {"best", "trials"}: trials with
        settings, epochs, number of seeds and mean validation metrics; finalists first, then the
        longest, each part by NLL.

    Raises:
        UserError: the recipe has no search space, or all finalists of an optimizer diverged.
    """
    spaces = {o: space for o, space in recipe.search.items() if o in recipe.optimizers}
    if not spaces:
        raise UserError(f"{recipe.name} has no search space")
    recipe = replace(recipe, validation=recipe.validation or VALIDATION)
    going = {o: trials(space, n) for o, space in spaces.items()}
    table: dict[str, list[Trial]] = {o: [] for o in spaces}
    for epochs in rounds(recipe.epochs, n, first):
        ranked = _judged(recipe, going, epochs, SEEDS[:1], out, progress)
        for o, best in ranked.items():
            table[o] = best + [t for t in table[o] if t["settings"] not in going[o]]
            going[o] = [t["settings"] for t in best[: -(-len(best) // FACTOR)]]
    finalists = {o: [t["settings"] for t in table[o][:FINALISTS]] for o in spaces}
    finals = _judged(recipe, finalists, recipe.epochs, SEEDS, out, progress)
    facts = {"recipe": recipe.name, "epochs": recipe.epochs, "validation": recipe.validation}
    for o, best in finals.items():
        if _nll(best[0]) == math.inf:
            raise UserError(f"all finalists of {o} diverged: let the recipe search smaller rates")
        facts[o] = {"best": best[0]["settings"], "trials": best + table[o][FINALISTS:]}
    return facts | {"provenance": runs.provenance(0, load_task(recipe).digest)}


def _judged(
    recipe: Recipe,
    settings: Mapping[str, Sequence[Given]],
    epochs: int,
    seeds: Sequence[int],
    out: Path,
    progress: Progress,
) -> dict[str, list[Trial]]:
    """Each optimizer's trials, best first; one that diverged with a seed is infinitely bad."""
    work = [(o, each) for o, every in settings.items() for each in every]
    calls = [(recipe, o, each, epochs, seed, out) for o, each in work for seed in seeds]
    attempt = partial(jobs.unless_diverged, validated)
    some = f"runs of {epochs} epochs"
    found = jobs.each(attempt, calls, progress, some, [_folder(*call[1:]) for call in calls])
    done: dict[str, list[Trial]] = {o: [] for o in settings}
    for k, (o, each) in enumerate(work):
        metrics = found[k * len(seeds) : (k + 1) * len(seeds)]
        mean = {key: fmean(m[key] if m else math.inf for m in metrics) for key in KEPT}
        trial = {"settings": each, "epochs": epochs, "seeds": len(seeds), "validation": mean}
        done[o].append(trial)
    return {o: sorted(every, key=_nll) for o, every in done.items()}


def validated(
    recipe: Recipe, optimizer: str, settings: Given, epochs: int, seed: int, out: Path
) -> dict[str, float]:
    """Metrics on the recipe's validation images; what is finished is read."""
    given = replace(recipe.settings(optimizer), **settings)
    chosen = replace(recipe, epochs=epochs, optimizers={optimizer: given})
    folder = _folder(optimizer, settings, epochs, seed, out)
    evaluations = train(chosen, optimizer, seed, folder)["evaluations"]
    found = evaluations.get("samples") or evaluations["mean"]
    return {key: found[key] for key in KEPT}


def _folder(optimizer: str, settings: Given, epochs: int, seed: int, out: Path) -> Path:
    told = "-".join(f"{key}={value:g}" for key, value in settings.items())
    return out / f"{optimizer}-{told}-epochs={epochs}-seed{seed}"


def _nll(trial: Trial) -> float:
    return trial["validation"]["nll"]


def draw(path: Path, found: dict[str, Any]) -> None:
    """NLL of every trial by its lr and, of IVON, by the noise it starts with.

    Finalists are filled; the shorter a trial was trained, the smaller.
    """
    tables = {o: found[o]["trials"] for o in compare.LABELS if o in found}
    panels = [(o, "lr", "lr") for o in tables]
    if "ivon" in tables:
        panels.append(("ivon", "noise", "√N σ at the start, √(temperature/hess_init)"))
    with picture(path, len(panels), (3.4, 3.2)) as drawn:
        for panel, (optimizer, key, name) in zip(drawn, panels, strict=True):
            for trial in tables[optimizer]:
                given = trial["settings"]
                if key == "noise":
                    given = {key: (given.get("temperature", 1) / given["hess_init"]) ** 0.5}
                fill = "C0" if trial["seeds"] > 1 else "none"
                size = 3 + 3 * trial["epochs"] / found["epochs"]
                panel.plot(given[key], _nll(trial), "o", mfc=fill, mec="C0", ms=size)
            label(
                panel, compare.LABELS[optimizer], name, "validation NLL, nats" * (panel is drawn[0])
            )
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
        finite = [_nll(t) for table in tables.values() for t in table if _nll(t) < math.inf]
        low, high = min(finite), min(max(finite), 2 * min(finite))  # bad ones may lie far off
        pad = 0.05 * (high - low) or 0.005
        for panel in drawn:
            panel.set_ylim(low - pad, high + pad)
