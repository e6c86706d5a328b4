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
from posterity_studies.recipes import Recipe, UserError

VALIDATION = 10_000  # training images held out
KEPT = ("nll", "accuracy", "ece", "brier")


def trials(recipe: Recipe, optimizer: str, n: int) -> list[dict[str, float]]:
    """``n`` settings spread over the search space: a Sobol sequence on logarithmic axes.

    The recipe's own ranges are searched, and nothing else; the sequence is fixed, so that a search
    can be taken up again or made longer.
    """
    space = recipe.search[optimizer]
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(n)
    return [
        {
            key: float(f"{low * (high / low) ** u:.3g}")
            for (key, (low, high)), u in zip(space.items(), point.tolist(), strict=True)
        }
        for point in points
    ]


def tune(recipe: Recipe, n: int, jobs: int, out: Path) -> dict[str, Any]:
    """Train every trial, ``jobs`` at a time, and keep each optimizer's lowest validation NLL.

    IVON is judged with posterior samples, as it will be used. Finished trials are not run again.

    Returns:
        Optimizer → {"best", "trials"}: trials with settings and validation metrics, best first.
    """
    spread = {name: trials(recipe, name, n) for name in recipe.optimizers}
    work = [(name, i, spread[name][i]) for i in range(n) for name in recipe.optimizers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))}

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
        finished = list(pool.map(run, work))
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "epochs": recipe.epochs,
        "validation": VALIDATION,
    }
    for optimizer in recipe.optimizers:
        mine = [t for t in finished if t["optimizer"] == optimizer]
        mine.sort(key=lambda trial: trial["validation"]["nll"])
        found[optimizer] = {"best": mine[0]["settings"], "trials": mine}
    return found
