"""Search settings on a validation split: the same number of trials for every optimizer."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from posterity_studies import runs
from posterity_studies.recipes import Range, Recipe, UserError

VALIDATION = 10_000  # training images held out
KEPT = ("nll", "accuracy", "ece", "brier")


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

    Two thirds are spread over the recipe's search space, the rest around the best of these. IVON
    is judged with posterior samples, as it will be used. Finished trials are not run again.

    Returns:
        Optimizer → {"best", "trials"}: trials with settings and validation metrics, best first.
    """
    first, spaces = n - n // 3, recipe.search
    found = _run_all(recipe, {o: trials(spaces[o], first) for o in spaces}, 0, jobs, out)
    near = {o: around(found[o][0]["settings"], spaces[o]) for o in spaces}
    more = _run_all(recipe, {o: trials(near[o], n - first, 1) for o in spaces}, first, jobs, out)
    ranked = {o: _ranked(found[o] + more[o]) for o in spaces}
    facts = {"recipe": recipe.name, "epochs": recipe.epochs, "validation": VALIDATION}
    return facts | {o: {"best": r[0]["settings"], "trials": r} for o, r in ranked.items()}


def _ranked(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(done, key=lambda trial: trial["validation"]["nll"])


def _run_all(
    recipe: Recipe, settings: dict[str, list[dict[str, float]]], first: int, jobs: int, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run trials in processes of their own; each optimizer's, best first."""
    rounds = zip(*([(o, s) for s in settings[o]] for o in settings), strict=True)
    work = [(o, first + i, s) for i, row in enumerate(rounds) for o, s in row]
    threads = max((os.cpu_count() or 1) // jobs, 1)
    environment = runs.environment(OMP_NUM_THREADS=str(threads))

    def run(job: tuple[str, int, dict[str, float]]) -> dict[str, Any]:
        optimizer, i, settings = job
        folder = out / f"{optimizer}-{i:02d}"
        command = [sys.executable, "-m", "posterity_studies", "train", recipe.name]
        command += ["--optimizer", optimizer, "--seed", "0", "--out", str(folder), "--quiet"]
        command += ["--epochs", str(recipe.epochs), "--samples", str(recipe.samples)]
        command += ["--validation", str(VALIDATION)]
        command += ["--set", *(f"{key}={value!r}" for key, value in settings.items())]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if "diverged" in done.stderr:
            kept = dict.fromkeys(KEPT, float("inf"))
        elif done.returncode:
            raise UserError(f"the trial in {folder} failed: {done.stderr.strip()[-500:]}")
        else:
            evaluations = runs.read_json(folder / "result.json")["evaluations"]
            found = evaluations.get("samples") or evaluations["mean"]
            kept = {k: found[k] for k in KEPT}
        print(f"{folder.name}: {settings} → {kept}", flush=True)
        return {"optimizer": optimizer, "settings": settings, "validation": kept}

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(run, work))
    return {o: _ranked([t for t in done if t["optimizer"] == o]) for o in settings}
