"""The training images a model hangs on, as one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from posterity.perturbation import Perturbation, grouped
from posterity_studies.report import figures
from posterity_studies.report.comparison import PAGES, write_page

SHOWN = 24  # images of each kind


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
) -> Path:
    """Write the gallery to `path`, whole or not at all, and return the path.

    `probs` (n, C) are the model's for its own training images, `images` uint8 (n, h, w[, 3]).
    """
    scores, doubted = found.sensitivity, probs.argmax(1) != targets
    order = scores.argsort(descending=True, stable=True)
    held = scores[order].double().cumsum(0) / scores.double().sum()
    classes = grouped(scores, targets)
    shares = grouped(doubted.float(), targets).mean
    by_class = [
        {"name": class_names[c], "mean": m, "error": e, "count": n, "doubted": d}
        for c, m, e, n, d in zip(*(x.tolist() for x in (*classes, shares)), strict=True)
    ]

    def cards(chosen: Tensor) -> list[dict[str, Any]]:
        return [_card(i, scores, probs, targets, class_names, images) for i in chosen.tolist()]

    text = PAGES.get_template("sensitivity.html.jinja").render(
        title=title,
        n_train=len(scores),
        share=(int((held < 0.5).sum()) + 1) / len(scores),
        nll=(found.left_out * found.count).sum().item() / found.count.sum().item(),
        loss=(found.loss * found.count).sum().item() / found.count.sum().item(),
        classes=sorted(by_class, key=lambda c: -c["mean"]),
        most=cards(order[:SHOWN]),
        least=cards(order.flip(0)[:SHOWN]),
        provenance=provenance,
    )
    return write_page(Path(path), text)


def _card(
    i: int,
    scores: Tensor,
    probs: Tensor,
    targets: Tensor,
    class_names: Sequence[str],
    images: Tensor,
) -> dict[str, Any]:
    label, ranked = int(targets[i]), probs[i].argsort(descending=True, stable=True).tolist()
    shown = ranked[:3] + [label] * (label not in ranked[:3])
    return {
        "index": i,
        "sensitivity": float(scores[i]),
        "image": figures.png(images[i].numpy()),
        "truth": class_names[label],
        "right": ranked[0] == label,
        "bars": [(class_names[k], float(probs[i, k]), k == label) for k in shown],
    }
