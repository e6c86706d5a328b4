"""One comparison of predictors on one data set, as one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup

from posterity_studies.report import figures, layers, panels, table
from posterity_studies.report.entry import Entry, check

SCRIPT = resources.files("posterity_studies.report").joinpath("page.js").read_text("utf-8")
PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("posterity_studies.report", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.globals["script"] = Markup(SCRIPT)
PAGES.globals["script_hash"] = (
    f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}"
)


def write_comparison(
    path: str | os.PathLike[str],
    *,
    title: str,
    entries: Sequence[Entry],
    targets: torch.Tensor,
    class_names: Sequence[str],
    images: torch.Tensor,
    provenance: Mapping[str, str],
    ood_name: str,
    data_name: str,
) -> Path:
    """Write the report to `path`, whole or not at all, and return the path.

    `targets` is int64 (n,), `images` uint8 (n, h, w[, 3]); the gallery shows the last entry's least
    certain and worst images. Raises ValueError, naming the entry, where shapes disagree.
    """
    targets, images = targets.detach().cpu(), images.detach().cpu()
    check(entries, targets, class_names, images)
    text = PAGES.get_template("comparison.html.jinja").render(
        title=title,
        entries=entries,
        columns=table.columns(entries),
        verdict=table.verdict(entries),
        lead=table.lead(entries, targets),
        undrawn=[e.label for e in entries if not e.curve.get("epoch")],
        training=panels.training(entries),
        risk=panels.risk(entries, targets),
        posteriors=[(e.label, layers.table(e.layers)) for e in entries if e.layers],
        reliability=panels.reliability(entries, targets),
        entropy=panels.entropy(entries, data_name, ood_name),
        gallery=panels.gallery(entries[-1], targets, class_names, images),
        provenance=provenance,
        data_name=data_name,
        ood_name=ood_name,
        bins=panels.BINS,
        dashes=figures.DASHES,
        n_test=len(targets),
        n_classes=len(class_names),
    )
    return write_page(Path(path), text)


def write_page(path: Path, text: str) -> Path:
    """Write beside the target, then rename: readers see the old file or the new, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
