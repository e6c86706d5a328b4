"""The optimizers side by side: runs in processes of their own, a table, a report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy
from rich.console import Console
from rich.table import Table

from posterity import Posterior
from posterity_studies import runs
from posterity_studies.recipes import Recipe, UserError
from posterity_studies.report import Entry, write_comparison
from posterity_studies.report.layers import layers
from posterity_studies.tasks import load_task
from posterity_studies.train import finished

LABELS = {
    "adamw": "AdamW", "sgd": "SGD", "ivon": "IVON", "adahessian": "AdaHessian",
    "dropout": "MC-dropout", "swag": "SWAG", "bbb": "Bayes by backprop", "vogn": "VOGN",
}  # fmt: skip
COLUMNS = {  # metric → heading, format, which end is better
    "accuracy": ("accuracy", "{:.2%}", max),
    "nll": ("NLL", "{:.4f}", min),
    "ece": ("ECE", "{:.4f}", min),
    "brier": ("Brier", "{:.4f}", min),
    "ood_auroc": ("OOD AUROC", "{:.4f}", max),
    "ood_fpr_at_95": ("OOD FPR@95", "{:.4f}", min),
    "seconds_per_epoch": ("s/epoch", "{:.1f}", min),
    "peak_memory_mib": ("peak MiB", "{:.0f}", min),
}


def run_folder(out: Path, optimizer: str, seed: int) -> Path:
    """Where a comparison keeps a run."""
    return out / f"{optimizer}-seed{seed}"


def run_all(recipe: Recipe, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """Train what is not trained yet, each run in a process of its own so that its memory counts.

    Raises:
        UserError: a run failed; what it printed stands above.
    """
    results = []
    for seed in seeds:
        for optimizer in recipe.optimizers:
            folder = run_folder(out, optimizer, seed)
            if result := finished(recipe, optimizer, seed, folder):
                results.append(result)
                continue
            command = [sys.executable, "-m", "posterity_studies", "train", recipe.name]
            command += ["--optimizer", optimizer, "--seed", str(seed), "--out", str(folder)]
            command += ["--epochs", str(recipe.epochs), "--samples", str(recipe.samples), "--quiet"]
            print(f"training {LABELS.get(optimizer, optimizer)}, seed {seed}", file=sys.stderr)
            code = subprocess.run(command, env=runs.environment()).returncode
            if code:
                raise UserError(f"the run in {folder} ended with exit code {code}")
            results.append(runs.read_json(folder / "result.json"))
    return results


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, of several."""
    mean = f"{fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.4f}"


def rows(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Label, optimizer and evaluation of every row of the table."""
    optimizers: list[str] = [r["settings"]["optimizer"] for r in results]
    for optimizer in dict.fromkeys(optimizers):
        first = next(r for r in results if r["settings"]["optimizer"] == optimizer)
        label = LABELS.get(optimizer, optimizer)
        sampled = "samples" in first["evaluations"]
        yield (f"{label} at the mean" if sampled else label), optimizer, "mean"
        if sampled:
            yield f"{label}, {first['samples']} samples", optimizer, "samples"


def values(results: Sequence[dict[str, Any]], optimizer: str, evaluation: str) -> dict[str, list]:
    """Each metric of a row, one value a seed."""
    mine = [r for r in results if r["settings"]["optimizer"] == optimizer]
    flat = [{**r, **r["evaluations"][evaluation]} for r in mine]
    return {metric: [r[metric] for r in flat] for metric in columns(results)}


def columns(results: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics that there are of all rows: of unknown inputs only where there are any."""
    flat = [{**r, **found} for r in results for found in r["evaluations"].values()]
    return [metric for metric in COLUMNS if all(metric in row for row in flat)]


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The comparison; over several seeds mean ± standard deviation. The best is bold."""
    first = results[0]
    seeds = sorted({r["seed"] for r in results})
    drawn = Table(
        title=f"{first['name']}: {first['epochs']} epochs, batch {first['batch_size']}, "
        f"{first['parameters']:,} parameters, OOD {first['ood'] or 'none'}, "
        + (f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds (mean ± s.d.)"),
        title_justify="left",
    )
    drawn.add_column("")
    shown = {metric: COLUMNS[metric] for metric in columns(results)}
    for heading, _, better in shown.values():
        drawn.add_column(f"{heading} {'↑' if better is max else '↓'}", justify="right")
    found = {label: values(results, *row) for label, *row in rows(results)}
    best = {
        metric: better(numpy.mean(v[metric]) for v in found.values())
        for metric, (_, _, better) in shown.items()
    }
    for label, row in found.items():
        cells = []
        for metric, (_, form, _) in shown.items():
            mean = numpy.mean(row[metric])
            cell = form.format(mean)
            if len(seeds) > 1:
                cell += " ± " + form.format(numpy.std(row[metric], ddof=1))
            cells.append(f"[bold]{cell}[/bold]" if mean == best[metric] else cell)
        drawn.add_row(label, *cells)
    return drawn


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """The HTML report of finished runs on the same images.

    Raises:
        UserError: a folder holds no finished run, runs are of other images, or were scored without
            unknown ones.
    """
    found = [runs.read_json(folder / "result.json") for folder in folders]
    first = found[0]
    for folder, result in zip(folders, found, strict=True):
        if "data" not in result:
            raise UserError(f"{folder} is no run of `train` or `compare`, which a report is of")
        for key in ("data", "ood", "validation"):
            if result.get(key) != first.get(key):
                raise UserError(
                    f"{folder} has {key} {result.get(key)}, {folders[0]} {first.get(key)}: one "
                    "report is of runs that were scored on the same images"
                )
    if not first.get("ood") or first.get("validation"):
        raise UserError(f"{folders[0]} was scored without unknown images, which a report shows")
    optimizers: list[str] = [result["settings"]["optimizer"] for result in found]
    names = [LABELS.get(o, o) for o in optimizers]
    if len(set(names)) < len(names):
        names = runs.distinct([folder.resolve().name for folder in folders])
    entries = [
        entry
        for name, result, folder in zip(names, found, folders, strict=True)
        for entry in _entries(name, result, folder)
    ]
    task = load_task(runs.recipe_of(first))
    return write_comparison(
        path,
        title=f"{' · '.join(names)} on {first['data']}",
        entries=entries,
        targets=task.test[1],
        class_names=task.class_names,
        images=task.images,
        provenance={
            key: ", ".join(dict.fromkeys(str(result["provenance"][key]) for result in found))
            for key in first["provenance"]
        },
        ood_name=first["ood"],
        data_name=first["data"],
    )


def _entries(name: str, result: dict[str, Any], folder: Path) -> Iterator[Entry]:
    """A run's rows of a report: at the mean, and averaged over samples."""
    saved = runs.read_tensors(folder / "predictions.safetensors")
    for label, optimizer, evaluation in rows([result]):
        row = values([result], optimizer, evaluation)
        found = ()
        if evaluation == "samples":
            _, model, posterior = runs.load(folder)
            if isinstance(posterior, Posterior):
                found = layers(posterior, [n for n, _ in model.named_parameters()])
        yield Entry(
            label=label.replace(LABELS.get(optimizer, optimizer), name, 1),
            metrics={metric: each[0] for metric, each in row.items()},
            curve=result["curve"] if evaluation == "mean" else {},
            probs=saved[f"{evaluation}.probs"],
            ood_probs=saved[f"{evaluation}.ood_probs"],
            layers=found,
        )


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the table, as wide as it needs to be where nobody watches."""
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table(results))
