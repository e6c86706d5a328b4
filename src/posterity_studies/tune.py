"""Search settings on a validation split: the same number of trials for every optimizer."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator

from posterity_studies import compare, runs
from posterity_studies.recipes import Range, Recipe, UserError
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task

VALIDATION = 10_000  # training images held out
KEPT = ("nll", "accuracy", "ece", "brier")
FINALISTS = 3  # trials of each optimizer that are trained again
SEEDS = (1, 2)  # with these seeds beside 0

Trial = dict[str, Any]  # number, seed, settings; once run, validation metrics too


def trials(space: dict[str, Range], n: int, seed: int = 0) -> list[dict[str, float]]:
    """``n`` settings spread over a space: a Sobol sequence on logarithmic axes.

    The sequence is fixed, so that an interrupted search can be taken up again.
    """
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(n)
    return [
        {
            key: float(f"{low * (high / low) ** u:.3g}")
            for (key, (low, high)), u in zip(space.items(), point.tolist(), strict=True)
        }
        for point in points
    ]


def around(best: dict[str, float], space: dict[str, Range]) -> dict[str, Range]:
    """Half the space on every logarithmic axis, centred on the best settings."""
    reach = {key: (high / low) ** 0.25 for key, (low, high) in space.items()}
    return {key: (value / reach[key], value * reach[key]) for key, value in best.items()}


def tune(recipe: Recipe, n: int, jobs: int, out: Path) -> dict[str, Any]:
    """Train ``n`` trials of every optimizer, ``jobs`` at a time; the best has the lowest NLL.

    Two thirds are spread over the recipe's search space, the rest around the best of these. The
    best :data:`FINALISTS` are then trained with more seeds, and the lowest mean NLL wins: one seed
    alone would choose by luck. IVON is judged with posterior samples, as it will be used. Finished
    trials are not run again.

    Returns:
        Facts and provenance of the search, and optimizer → {"best", "trials"}: trials with
        settings, number of seeds and mean validation metrics; finalists first, each part by NLL.
    """
    first, spaces = n - n // 3, recipe.search
    found = _run_all(recipe, {o: _spread(spaces[o], first) for o in spaces}, jobs, out)
    near = {o: around(found[o][0]["settings"], spaces[o]) for o in spaces}
    more = _run_all(recipe, {o: _spread(near[o], n - first, first) for o in spaces}, jobs, out)
    ranked = {o: sorted(found[o] + more[o], key=_nll) for o in spaces}
    finals = {
        o: [t | {"seed": seed} for t in r[:FINALISTS] for seed in SEEDS] for o, r in ranked.items()
    }
    again = _run_all(recipe, finals, jobs, out)
    facts = {"recipe": recipe.name, "epochs": recipe.epochs, "validation": VALIDATION}
    for o, trials in ranked.items():
        best = sorted((_mean(t, again[o]) for t in trials[:FINALISTS]), key=_nll)
        table = best + [_mean(t, []) for t in trials[FINALISTS:]]
        facts[o] = {"best": best[0]["settings"], "trials": table}
    return facts | {"provenance": runs.provenance(0, load_task(recipe).digest)}


def _spread(space: dict[str, Range], n: int, first: int = 0) -> list[Trial]:
    """Trials numbered from ``first``; those that refine (``first > 0``) follow another sequence."""
    settings = trials(space, n, seed=int(first > 0))
    return [{"number": first + i, "seed": 0, "settings": s} for i, s in enumerate(settings)]


def _nll(trial: Trial) -> float:
    return trial["validation"]["nll"]


def _mean(trial: Trial, more: list[Trial]) -> Trial:
    """A trial's settings with its metrics averaged over its seeds."""
    seeds = [trial, *(t for t in more if t["number"] == trial["number"])]
    mean = {k: sum(t["validation"][k] for t in seeds) / len(seeds) for k in KEPT}
    return {"settings": trial["settings"], "seeds": len(seeds), "validation": mean}


def _run_all(
    recipe: Recipe, settings: dict[str, list[Trial]], jobs: int, out: Path
) -> dict[str, list[Trial]]:
    """Run trials in processes of their own; each optimizer's, best first."""
    work = [
        (o, t)
        for row in zip(*settings.values(), strict=True)
        for o, t in zip(settings, row, strict=True)
    ]
    threads = max((os.cpu_count() or 1) // jobs, 1)
    environment = runs.environment(OMP_NUM_THREADS=str(threads))

    def run(job: tuple[str, Trial]) -> tuple[str, Trial]:
        optimizer, trial = job
        folder = out / f"{optimizer}-{trial['number']:02d}-seed{trial['seed']}"
        command = [sys.executable, "-m", "posterity_studies", "train", recipe.name]
        command += ["--optimizer", optimizer, "--seed", str(trial["seed"]), "--out", str(folder)]
        command += ["--epochs", str(recipe.epochs), "--samples", str(recipe.samples), "--quiet"]
        command += ["--validation", str(VALIDATION)]
        command += ["--set", *(f"{key}={value!r}" for key, value in trial["settings"].items())]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if "diverged" in done.stderr:
            kept = dict.fromkeys(KEPT, float("inf"))
        elif done.returncode:
            raise UserError(f"the trial in {folder} failed: {done.stderr.strip()[-500:]}")
        else:
            evaluations = runs.read_json(folder / "result.json")["evaluations"]
            found = evaluations.get("samples") or evaluations["mean"]
            kept = {k: found[k] for k in KEPT}
        print(f"{folder.name}: {trial['settings']} → {kept}", flush=True)
        return optimizer, {**trial, "validation": kept}

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(run, work))
    return {o: sorted((t for name, t in done if name == o), key=_nll) for o in settings}


def draw(path: Path, found: dict[str, Any]) -> None:
    """NLL of every trial by its lr and, of IVON, by the noise it starts with; finalists filled."""
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
                panel.plot(given[key], _nll(trial), "o", mfc=fill, mec="C0", ms=6)
            label(
                panel, compare.LABELS[optimizer], name, "validation NLL, nats" * (panel is drawn[0])
            )
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
        finite = [_nll(t) for table in tables.values() for t in table if _nll(t) < math.inf]
        for panel in drawn:
            panel.set_ylim(min(finite) - 0.005, min(max(finite), 2 * min(finite)) + 0.005)
