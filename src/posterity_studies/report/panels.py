"""What stands beside each figure: its numbers, its finding in words, its drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from posterity import metrics
from posterity_studies.report import figures
from posterity_studies.report.entry import Entry
from posterity_studies.report.gallery import Gallery, cards

BINS, ENTROPY_BINS = 20, 30
ANSWERED = 200  # points of a risk curve
UNSURE, WORST = 160, 80  # images of the gallery
NOTHING = "no finite predictions"


class Table(NamedTuple):
    """Per bin (lo, hi] of the largest probability: its mean, the accuracy, the number of images."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Share of all images per bin."""
        return self.count / max(self.count.sum(), 1)

    @property
    def ece(self) -> float:
        """Mean gap between confidence and accuracy; NaN without any finite row."""
        gaps = np.abs(self.confidence - self.accuracy)[self.count > 0]
        return float(gaps @ self.share[self.count > 0]) if len(gaps) else math.nan


def reliability_table(probs: torch.Tensor, targets: torch.Tensor) -> Table:
    """Reliability over BINS equal bins; rows that are not finite are left out."""
    keep = probs.isfinite().all(1)
    if not keep.any():
        return Table(*np.zeros((3, BINS)))
    found = metrics.reliability(probs[keep], targets[keep], BINS)
    return Table(*(np.nan_to_num(column.numpy()) for column in found[2:]))


def training(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Train loss and test NLL over epochs, for the rows that have a curve."""
    drawn = [(i, e) for i, e in enumerate(entries) if e.curve.get("epoch")]
    panels = []
    for key, name in (("train_loss", "Train loss"), ("test_nll", "Test NLL")) if drawn else ():
        lines = [(i, e.curve["epoch"], e.curve[key]) for i, e in drawn]
        ends = (f"{e.label} from {e.curve[key][0]:.3f} to {e.curve[key][-1]:.3f}" for _, e in drawn)
        svg = figures.training_curves(f"training-{key}", lines)
        panels.append({"name": name, "finding": "; ".join(ends), "svg": svg})
    return panels


def reliability(entries: Sequence[Entry], targets: torch.Tensor) -> list[dict[str, Any]]:
    """One reliability diagram per row, all on the same axes."""
    tables = [reliability_table(_double(e.probs), targets) for e in entries]
    top = _ceiling(table.share for table in tables)
    panels = []
    for i, t in enumerate(tables):
        confidence, accuracy = (float(t.share @ values) for values in t[:2])
        gap = 100 * (confidence - accuracy)
        finding = (
            f"mean confidence {confidence:.1%}, accuracy {accuracy:.1%}: "
            f"{abs(gap):.1f} points too {'sure' if gap > 0 else 'cautious'}"
            if t.count.any()
            else NOTHING
        )
        svg = figures.reliability_diagram(f"reliability-{i}", i, *t, t.share, top)
        panels.append({"score": t.ece, "finding": finding, "svg": svg})
    return panels


def entropy(entries: Sequence[Entry], data_name: str, ood_name: str) -> list[dict[str, Any]]:
    """One pair of entropy histograms per row: known inputs against unknown ones."""
    limit = math.log(entries[0].probs.shape[1])
    pairs = [(_entropies(e.probs), _entropies(e.ood_probs)) for e in entries]
    shares = [(_shares(known, limit), _shares(unknown, limit)) for known, unknown in pairs]
    top = _ceiling(share for pair in shares for share in pair)
    panels = []
    for i, (e, (known, unknown)) in enumerate(zip(entries, pairs, strict=True)):
        middle = [float(values.nanmedian()) for values in (known, unknown)]
        finding = (
            f"median {middle[0]:.2f} nats on {data_name}, {middle[1]:.2f} on {ood_name}"
            if math.isfinite(sum(middle))
            else NOTHING
        )
        svg = figures.entropy_histogram(f"entropy-{i}", i, *shares[i], limit, top)
        score = e.metrics.get("ood_auroc", math.nan)
        panels.append({"score": score, "finding": finding, "svg": svg})
    return panels


def risk(entries: Sequence[Entry], targets: torch.Tensor) -> dict[str, Any] | None:
    """Errors among the answers that are given, where the least confident ones are kept back.

    Predictions that are not finite are left out.
    """
    curves, found = [], {}
    for i, e in enumerate(entries):
        probs, keep = _double(e.probs), e.probs.isfinite().all(1).cpu()
        if not (n := int(keep.sum())):
            continue
        coverage, errors = metrics.risk_coverage(probs[keep], targets[keep])
        points = torch.linspace(0, n - 1, min(n, ANSWERED)).round().long()
        curves.append((i, *(v[points].tolist() for v in (coverage, errors))))
        most = float(errors[math.ceil(0.8 * n) - 1])
        found[e.label] = f"{e.label} errs in {errors[-1]:.2%} of all, {most:.2%} of the surest 80%"
    if not curves:
        return None
    svg = figures.risk_curves("risk", curves)
    return {"labels": [*found], "finding": "; ".join(found.values()), "svg": svg}


def gallery(
    entry: Entry, targets: torch.Tensor, class_names: Sequence[str], images: torch.Tensor
) -> Gallery:
    """Of the images with finite predictions the UNSURE of highest entropy, the least sure first.

    And the WORST of largest loss: where the model is sure, and wrong.
    """
    probs, values = _double(entry.probs), _entropies(entry.probs)
    losses = -probs.gather(1, targets[:, None])[:, 0].clamp_min(1e-38).log()
    chosen: dict[int, None] = {}
    for scores, number in ((values, UNSURE), (losses, WORST)):
        order = scores.argsort(descending=True, stable=True)
        chosen |= dict.fromkeys(order[values[order].isfinite()][:number].tolist())
    order = torch.tensor(sorted(chosen, key=lambda i: -float(values[i])), dtype=torch.long)
    scores = {"entropy": values, "loss": losses}
    return Gallery(
        cards(order, scores, probs, targets, class_names, images),
        what="Test image",
        score_word="entropy",
        form="%.2f",
        truth_word="true",
        class_word="True class",
        answers={"right": "right", "wrong": "wrong"},
        orders=[
            ("entropy -1", "least sure first"),
            ("entropy 1", "surest first"),
            ("loss -1", "worst first"),
            ("index 1", "as in the data"),
        ],
    )


def _double(values: torch.Tensor) -> torch.Tensor:
    return values.detach().cpu().double()


def _entropies(probs: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(_double(probs)).sum(1)


def _shares(entropies: torch.Tensor, limit: float) -> np.ndarray:
    """Share of the finite entropies in each of ENTROPY_BINS bins on 0..limit."""
    finite = entropies[entropies.isfinite()].clamp(0, limit).numpy()
    return np.histogram(finite, ENTROPY_BINS, (0, limit))[0] / max(len(finite), 1)


def _ceiling(shares) -> float:
    """The next tenth above every share: one axis limit for all rows."""
    return max(0.1, math.ceil(10 * max(share.max() for share in shares)) / 10)
