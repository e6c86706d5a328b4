"""What merging did to each tensor, as one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from posterity.merging import Marginal
from posterity_studies.report import layers
from posterity_studies.report.comparison import PAGES, write_page


class Merged(NamedTuple):
    """One tensor: of each model how far merging moved it, and what it weighs in the result.

    ``moved`` are root mean squares of (θ − θ_t)/σ_t; ``shares`` of its Hessian in the merged
    precision, on average, where the method adds Hessians up.
    """

    layer: layers.Layer
    moved: tuple[float, ...]
    shares: tuple[float, ...] = ()


def merged(
    name: str, into: Marginal, models: Sequence[Marginal], weights: Sequence[float]
) -> Merged:
    """One tensor's; the merged precision holds Hessians ``weights`` times, or none without any."""
    moved = [((into.mean - q.mean) * q.precision.sqrt()).square().mean().sqrt() for q in models]
    shares = [
        (w * q.hessian / into.precision).mean() for w, q in zip(weights, models, strict=False)
    ]
    std = into.precision.rsqrt()
    return Merged(
        layers.layer(name, into.mean, std, into.prior),
        tuple(map(float, moved)),
        tuple(map(float, shares)),
    )


def write_merge(
    path: str | os.PathLike[str],
    *,
    title: str,
    labels: Sequence[str],
    found: Sequence[Merged],
    provenance: Mapping[str, str],
) -> Path:
    """Write the page to `path`, whole or not at all, and return the path.

    `labels` are the models', as `found` has their values.
    """
    table = layers.table([each.layer for each in found])
    sizes = torch.tensor([each.layer.size for each in found], dtype=torch.float64)
    squares = torch.tensor([each.moved for each in found], dtype=torch.float64).square()
    moved = (sizes @ squares / sizes.sum()).sqrt()
    most, whose = divmod(int(squares.argmax()), len(labels))
    text = PAGES.get_template("merge.html.jinja").render(
        title=title,
        labels=labels,
        table=table,
        rows=zip(found, (strip for _, strip in table["rows"]), strict=True),
        moved=moved.tolist(),
        shared=all(each.shares for each in found),
        most=(labels[whose], found[most].layer.name, found[most].moved[whose]),
        provenance=provenance,
    )
    return write_page(Path(path), text)
