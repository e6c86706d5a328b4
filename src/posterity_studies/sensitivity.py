"""``posterity sensitivity``: which training examples a finished run hangs on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from posterity import Posterior, predict
from posterity.perturbation import Perturbation, grouped, perturb
from posterity_studies import data, runs
from posterity_studies.arguments import Json, Place, RunFolder, Whole
from posterity_studies.progress import bar
from posterity_studies.recipes import UserError
from posterity_studies.report import write_sensitivity
from posterity_studies.tasks import load_task

BATCH = 250


@dataclass
class Sensitivity:
    """Find the training images a model is most sensitive to: rare, hard or wrongly labelled ones.

    Writes a table, sensitivity.csv, and a gallery, sensitivity.html, into the run's folder.

    posterity sensitivity runs/fashion-mnist/ivon-seed0
    """

    run: RunFolder
    """Folder of a finished IVON run."""
    variance: Literal["jacobian", "samples"] = "jacobian"
    """How the variance of the outputs is found; samples needs no derivative of the network."""
    samples: int = 64
    """Posterior samples, for --variance samples."""
    full: bool = True
    """The whole covariance between classes, or (--no-full) its diagonal."""
    first: Whole = None
    """Only so many training images, from the first on."""
    table: Place = None
    """Where to write the table: a name in .csv, or in .parquet if pyarrow is installed."""
    gallery: Place = None
    """Where to write the gallery."""
    as_json: Json = False
    """Print the summary as JSON instead of a table: classes, and mean losses."""

    def __call__(self) -> None:
        path = self.table or self.run / "sensitivity.csv"
        write = _writer(path)
        result, model, posterior = runs.load(self.run)
        if not isinstance(posterior, Posterior):
            raise UserError(
                f"{self.run} has no Gaussian posterior: sensitivity needs a run of IVON"
            )
        task = load_task(runs.recipe_of(result))
        n, known = len(task.train[1]), data.known(result["data"])
        if self.first is not None and not 0 < self.first <= n:
            raise UserError(f"--first must be between 1 and {n}")
        inputs, targets = (part[: self.first] for part in task.train)
        found = perturb(
            model,
            posterior,
            (inputs, targets),
            variance=self.variance,
            full=self.full,
            samples=self.samples,
            n_train=n,
            batch_size=BATCH,
            progress=lambda batches: bar(batches, -(-len(targets) // BATCH), "sensitivity"),
        )
        if not found.sensitivity.isfinite().any():
            raise UserError(
                f"no image has a finite sensitivity: outputs of the model of {self.run}, or their "
                "variances, are not finite. Train it again with a lower lr"
            )
        probs = predict(model, None, inputs, batch_size=BATCH).probs
        columns = {
            "image": torch.arange(len(targets)),
            "label": targets,
            "predicted": probs.argmax(1),
            "sensitivity": found.sensitivity,
            "loss": found.loss,
            "left_out_loss": found.left_out,
            "probability_of_label": probs.gather(1, targets[:, None])[:, 0],
        }
        values = {name: column.tolist() for name, column in columns.items()}
        for name in ("label", "predicted"):
            values[name] = [known.class_names[c] for c in values[name]]
        with runs.replacing(path) as temporary:
            write(temporary, values)
        tested = None
        if not result.get("validation"):  # else the task's test images are those held out
            log_probs = predict(model, None, task.test[0], batch_size=BATCH).log_probs
            classes = task.test[1]
            tested = -log_probs.gather(1, classes[:, None])[:, 0], classes
        gallery = write_sensitivity(
            self.gallery or self.run / "sensitivity.html",
            title=f"The training images {self.run.name} hangs on",
            found=found,
            probs=probs,
            targets=targets,
            class_names=known.class_names,
            images=task.train_images[: self.first],
            provenance=runs.provenance(result["seed"], task.digest),
            tested=tested,
        )
        told = _summary(found, probs, targets, known.class_names)
        if self.as_json:
            print(runs.as_json({**told, "table": str(path), "gallery": str(gallery)}))
            return
        _show(told)
        print(f"table: {path.resolve()}\ngallery: {gallery.resolve()}")


def _summary(
    found: Perturbation, probs: torch.Tensor, targets: torch.Tensor, names: tuple[str, ...]
) -> dict[str, Any]:
    """Of each class, the most sensitive first; and mean losses over all images."""
    doubted = grouped((probs.argmax(1) != targets).float(), targets).mean
    rows = zip(*(x.tolist() for x in (*grouped(found.sensitivity, targets), doubted)), strict=True)
    classes = [
        {"class": names[c], "sensitivity": mean, "error": error, "doubted": doubt}
        for c, mean, error, _, doubt in sorted(rows, key=lambda row: -row[1])
    ]
    left_out, loss = (
        (each * found.count).sum().item() / found.count.sum().item()
        for each in (found.left_out, found.loss)
    )
    return {"classes": classes, "loss": loss, "left_out": left_out}


def _show(told: dict[str, Any]) -> None:
    drawn = Table(title="mean sensitivity of a class", title_justify="left")
    for heading in ("class", "sensitivity", "± s.e.", "label doubted"):
        drawn.add_column(heading, justify="left" if heading == "class" else "right")
    for name, mean, error, doubt in (row.values() for row in told["classes"]):
        drawn.add_row(name, f"{mean:.3g}", f"{error:.1g}", f"{doubt:.1%}")
    Console().print(drawn)
    print(
        f"training loss {told['loss']:.4f}; leave-one-out estimate of the test loss "
        f"{told['left_out']:.4f}"
    )


def _csv(path: Path, columns: dict[str, list]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _parquet(path: Path, columns: dict[str, list]) -> None:
    import pyarrow  # pyright: ignore
    import pyarrow.parquet  # pyright: ignore

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _writer(path: Path):
    """How to write a table of this name, before hours of work are spent on it."""
    if path.suffix == ".csv":
        return _csv
    if path.suffix != ".parquet":
        raise UserError(f"{path}: a table's name ends in .csv or .parquet")
    try:
        import pyarrow  # noqa: F401  # pyright: ignore
    except ImportError:
        raise UserError(f"{path} needs pyarrow (pip install pyarrow); .csv needs nothing") from None
    return _parquet
