"""``posterity predict``: classify image files, or say that one had better not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from posterity import predict
from posterity.binding import Samples
from posterity.selective import Abstention, abstention
from posterity_studies import data, runs
from posterity_studies.arguments import Json, Real, RunFolder
from posterity_studies.recipes import UserError
from posterity_studies.tasks import load_task
from posterity_studies.train import EVAL_BATCH


@dataclass
class Predict:
    """Classify image files: probabilities, and how unsure the model is.

    posterity predict runs/fashion-mnist/ivon-seed0 your-picture.png --abstain-at 0.01
    """

    run: RunFolder
    """Folder of a run."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...")]
    """PNG or JPEG files; light on dark, as in the data."""
    samples: int = 64
    """Posterior samples; 0 predicts at the mean."""
    abstain_at: Real = None
    """Answer only so surely that, of images like the test set's, at most this share of the answers
    is wrong (with 95 % certainty)."""
    as_json: Json = False
    """Print a list of the images with all probabilities instead of a table."""

    def __call__(self) -> None:
        if not self.images:
            raise UserError("predict needs at least one image file")
        if self.abstain_at is not None and not 0 < self.abstain_at < 1:
            raise UserError("--abstain-at takes an error rate between 0 and 1")
        result, model, posterior = runs.load_sampled(self.run, self.samples)
        known = data.known(result["data"])
        pixels = torch.stack([known.read(path) for path in self.images])
        found = predict(model, posterior, known.normalise(pixels), samples=self.samples or 1)
        rule = self._rule(result, model, posterior) if self.abstain_at is not None else None
        told = []
        for path, probs, entropy, information in zip(
            self.images, found.probs, found.entropy, found.mutual_information, strict=True
        ):
            classes = dict(zip(known.class_names, probs.tolist(), strict=True))
            told.append({"image": str(path), "probs": classes})
            told[-1] |= {"entropy": float(entropy), "mutual_information": float(information)}
            if rule:
                best = max(classes, key=classes.__getitem__)
                told[-1]["answer"] = best if classes[best] > rule.threshold else None
        if self.as_json:
            print(runs.as_json(told))
            return
        drawn = Table(title_justify="left")
        for heading in ("image", "most probable classes", "entropy", "mutual information"):
            drawn.add_column(heading)
        if rule:
            drawn.add_column("answer")
        for each in told:
            top = sorted(each["probs"].items(), key=lambda item: -item[1])[:3]
            classes = ", ".join(f"{name} {p:.1%}" for name, p in top)
            row = [Path(each["image"]).name, classes]
            row += [f"{each[measure]:.3f}" for measure in ("entropy", "mutual_information")]
            if rule:
                row.append(each["answer"] or "abstains")
            drawn.add_row(*row)
        Console().print(drawn)
        if rule:
            print(
                f"answers where the largest probability is above {rule.threshold:.4f}: "
                f"{rule.coverage:.1%} of the test images, {rule.errors} of these {rule.answered} "
                f"wrong. Of new images like them, with 95 % certainty, at most "
                f"{self.abstain_at:.3g} of the answers are wrong; of other images nothing is said."
            )

    def _rule(
        self, result: dict[str, Any], model: nn.Module, posterior: Samples | None
    ) -> Abstention:
        """From the test set, which took no part in training: the run's predictions, or new ones."""
        inputs, targets = load_task(runs.recipe_of(result)).test
        sampled = posterior is not None
        if not sampled or self.samples == result["samples"]:
            saved = runs.read_tensors(self.run / "predictions.safetensors")
            probs = saved["samples.probs" if sampled else "mean.probs"]
        else:
            probs = predict(
                model, posterior, inputs, samples=self.samples, batch_size=EVAL_BATCH
            ).probs
        assert self.abstain_at is not None
        return abstention(probs, targets, self.abstain_at)
