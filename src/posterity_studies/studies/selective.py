"""Does abstention keep its promise, what can be pruned, and which temperature predicts best?

Fashion-MNIST. Thresholds and the temperature are chosen on one half of the test images and judged
on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posterity import Posterior, metrics, predict
from posterity.selective import abstention, choose_temperature
from posterity_studies import compare, runs
from posterity_studies.recipes import recipe
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task
from posterity_studies.train import EVAL_BATCH, Progress, train

RISKS = (0.005, 0.01, 0.02, 0.05)
SHARES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
MEASURES: tuple[Literal["snr", "magnitude"], ...] = ("snr", "magnitude")

Half = tuple[Tensor, Tensor]


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each risk, pruned share and temperature; of the first seed."""
    chosen = recipe("fashion-mnist") if scale == "desk" else replace(recipe("smoke"), epochs=1)
    task, seed = load_task(chosen), seeds[0]
    order = torch.randperm(len(task.test[1]), generator=torch.Generator().manual_seed(0))
    first, second = order.chunk(2)
    probs = {}
    for optimizer in ("adamw", "ivon"):
        folder = compare.run_folder(out, optimizer, seed)
        train(chosen, optimizer, seed, folder, progress)
        saved = runs.read_tensors(folder / "predictions.safetensors")
        key = "samples.probs" if "samples.probs" in saved else "mean.probs"
        probs[compare.LABELS[optimizer]] = saved[key]
    _, model, posterior = runs.load(folder)
    assert isinstance(posterior, Posterior)
    rows = promises(probs, task.test[1], first, second)
    curves = pruned(model, posterior, (task.test[0][second], task.test[1][second]), chosen.samples)
    rows += [
        {"method": f"pruned by {by}", "share": share, **found}
        for by, curve in curves.items()
        for share, found in curve.items()
    ]
    halves = [(task.test[0][half], task.test[1][half]) for half in (first, second)]
    rows += tempered(model, posterior, halves[0], halves[1], chosen.samples)
    with picture(out / "selective.png", 2) as panels:
        for name, p in probs.items():
            curve = metrics.risk_coverage(p, task.test[1])
            panels[0].plot(curve.coverage, curve.risk, label=name)
        label(panels[0], "Risk and coverage", "share of images answered", "share of answers wrong")
        for by, found in curves.items():
            shares, errors = list(found), [1 - at["accuracy"] for at in found.values()]
            panels[1].plot(shares, errors, "o-", label={"snr": "|m|/σ", "magnitude": "|m|"}[by])
        label(panels[1], "Pruning, 16 samples", "share of weights that are zero", "error rate")
        for panel in panels:
            panel.set(yscale="log")
            panel.legend()
    return {"rows": rows, "data": task.digest}


def promises(
    probs: dict[str, Tensor], targets: Tensor, first: Tensor, second: Tensor
) -> list[dict[str, Any]]:
    """For each risk that is asked for, what the other half's images show."""
    rows: list[dict[str, Any]] = []
    for name, p in probs.items():
        for risk in RISKS:
            row: dict[str, Any] = {"method": f"abstention, {name}", "risk asked for": risk}
            try:
                rule = abstention(p[first], targets[first], risk)
            except ValueError:
                rows.append({**row, "coverage": 0.0})
                continue
            answered = p[second].amax(1) > rule.threshold
            wrong = p[second].argmax(1) != targets[second]
            found = wrong[answered].double().mean().item()
            rows.append({**row, "coverage": answered.double().mean().item(), "risk": found})
    return rows


def pruned(
    model: nn.Module, posterior: Posterior, test: Half, samples: int
) -> dict[str, dict[float, dict[str, float]]]:
    """Accuracy and NLL with ever more weights zero."""
    return {
        by: {
            share: quality(model, posterior.prune_share(share, by), test, min(samples, 16))
            for share in SHARES
        }
        for by in MEASURES
    }


def tempered(
    model: nn.Module, posterior: Posterior, held: Half, test: Half, samples: int
) -> list[dict[str, Any]]:
    """As trained, and at the temperature that the held half prefers."""
    n = min(samples, 32)
    best = choose_temperature(model, posterior, held, samples=n, batch_size=EVAL_BATCH)
    return [
        {"method": name, "temperature": t, **quality(model, q, test, n)}
        for name, t, q in (
            ("as trained", 1.0, posterior),
            ("tempered", best.temperature, best.posterior),
        )
    ]


def quality(model: nn.Module, posterior: Any, test: Half, samples: int) -> dict[str, float]:
    """Accuracy, NLL and ECE."""
    found = predict(model, posterior, test[0], samples=samples, batch_size=EVAL_BATCH)
    return {
        "accuracy": metrics.accuracy(found.probs, test[1]),
        "NLL": metrics.nll(found.log_probs, test[1], log=True),
        "ECE": metrics.ece(found.probs, test[1], bins=20),
    }
