"""The training images a model hangs on, as one self-contained HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from posterity.perturbation import Perturbation, grouped
from posterity_studies.report import figures
from posterity_studies.report.comparison import PAGES, write_page
from posterity_studies.report.gallery import STEP, Gallery, cards

MOST = 240  # images of the gallery


def write_sensitivity(
    path: str | os.PathLike[str],
    *,
    title: str,
    found: Perturbation,
    probs: Tensor,
    targets: Tensor,
    class_names: Sequence[str],
    images: Tensor,
    provenance: Mapping[str, str],
    tested: tuple[Tensor, Tensor] | None = None,
) -> Path:
    """Write the gallery to `path`, whole or not at all, and return the path.

    `probs` (n, C) are the model's for its own training images, `images` uint8 (n, h, w[, 3]),
    `tested` losses and classes (m,) of test images, of which the leave-one-out estimate is one.
    """
    scores, doubted = found.sensitivity, probs.argmax(1) != targets
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order].isfinite()]
    held = scores[order].double().cumsum(0)
    columns = [*grouped(scores, targets)]
    columns += [grouped(x, targets).mean for x in (doubted.float(), found.loss, found.left_out)]
    keys = ("class", "mean", "error", "count", "doubted", "trained", "left_out")
    classes: list[dict[str, Any]] = [
        dict(zip(keys, row, strict=True))
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]
    means = grouped(*tested) if tested else None
    test = dict(zip(means.group.tolist(), means.mean.tolist(), strict=True)) if means else {}
    for row in classes:
        row |= {"name": class_names[row["class"]], "test": test.get(row["class"])}
    seen = [row[key] for row in classes for key in ("trained", "left_out", "test")]
    top = max((loss for loss in seen if loss is not None and math.isfinite(loss)), default=0) or 1
    for row in classes:
        row["strip"] = figures.losses(top, row["trained"], row["left_out"], row["test"])

    values = {"sensitivity": scores, "loss": found.loss}
    words = {
        "what": "Training image",
        "score_word": "moves",
        "form": "%.3g",
        "truth_word": "label",
        "class_word": "Label",
        "answers": {"right": "agrees", "wrong": "doubts"},
    }

    def gallery(chosen: Tensor, orders: Sequence[tuple[str, str]] = ()) -> Gallery:
        shown = cards(chosen, values, probs, targets, class_names, images)
        return Gallery(shown, **words, orders=orders)

    orders = [
        ("sensitivity -1", "most sensitive first"),
        ("loss -1", "largest loss first"),
        ("index 1", "as in the data"),
    ]
    text = PAGES.get_template("sensitivity.html.jinja").render(
        title=title,
        n_train=len(scores),
        share=(int((held < held[-1] / 2).sum()) + 1) / len(scores),
        nll=(found.left_out * found.count).sum().item() / found.count.sum().item(),
        loss=(found.loss * found.count).sum().item() / found.count.sum().item(),
        classes=sorted(classes, key=lambda c: (math.isnan(c["mean"]), -c["mean"])),
        test=float(tested[0].double().mean()) if tested else None,
        most=gallery(order[:MOST], orders),
        least=gallery(order.flip(0)[:STEP]),
        provenance=provenance,
    )
    return write_page(Path(path), text)
