"""The metrics table and the verdict: who leads in what, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from posterity_studies.report.entry import Entry


class Column(NamedTuple):
    """How a metric is shown; `sign` is +1 where higher is better, -1 where lower, 0 for neither."""

    key: str
    title: str
    unit: str = ""
    sign: int = 0
    form: str = ".4g"
    scale: float = 1.0

    def show(self, entry: Entry) -> str:
        """The printed value, or a dash where it is missing or not finite."""
        value = entry.metrics.get(self.key, math.nan)
        return format(value * self.scale, self.form) if math.isfinite(value) else "–"

    def best(self, entries: Sequence[Entry]) -> list[int]:
        """Indices of the leaders, ties in print included; none where all finite rows tie."""
        shown = {i: self.show(e) for i, e in enumerate(entries) if self.show(e) != "–"}
        if not self.sign or len({*shown.values()}) < 2:
            return []
        top = max(shown, key=lambda i: self.sign * entries[i].metrics[self.key])
        return [i for i in shown if shown[i] == shown[top]]


KNOWN = (
    Column("accuracy", "Accuracy", "%", +1, ".2f", 100),
    Column("nll", "NLL", "nats", -1, ".4f"),
    Column("ece", "ECE", "%", -1, ".2f", 100),
    Column("brier", "Brier", "", -1, ".4f"),
    Column("ood_auroc", "OOD AUROC", "%", +1, ".2f", 100),
    Column("ood_fpr_at_95", "OOD FPR at 95%", "%", -1, ".2f", 100),
    Column("seconds_per_epoch", "Epoch time", "s", -1, ".1f"),
    Column("peak_memory_mib", "Peak memory", "MiB", -1, ",.0f"),
)


class Lead(NamedTuple):
    """How far the lowest NLL lies below the next, in nats per image, with its standard error."""

    first: str
    second: str
    gap: float
    error: float


def columns(entries: Sequence[Entry]) -> list[Column]:
    """The known columns, then any further metric as it stands, without a direction."""
    known = {column.key for column in KNOWN}
    further = dict.fromkeys(key for e in entries for key in e.metrics if key not in known)
    return [*KNOWN, *(Column(key, key) for key in further)]


def verdict(entries: Sequence[Entry]) -> list[tuple[list[str], list[str]]]:
    """(labels of the leaders, what they lead in), one pair per set of leaders."""
    wins: dict[tuple[int, ...], list[str]] = {}
    accuracy, nll, ece = KNOWN[:3]
    for column, phrase in (nll, "lowest NLL"), (ece, "lowest ECE"), (accuracy, "highest accuracy"):
        if best := column.best(entries):
            value = column.show(entries[best[0]]) + column.unit.replace("nats", " nats")
            wins.setdefault((*best,), []).append(f"the {phrase} ({value})")
    return [([entries[i].label for i in who], what) for who, what in wins.items()]


def lead(entries: Sequence[Entry], targets: torch.Tensor) -> Lead | None:
    """The lead in NLL, paired image by image; None where fewer than two rows are finite."""
    chosen = (e.probs.detach().cpu().double().gather(1, targets[:, None]) for e in entries)
    losses = [-probs.clamp_min(1e-38).log() for probs in chosen]
    finite = [i for i, loss in enumerate(losses) if loss.isfinite().all()]
    if len(finite) < 2:
        return None
    first, second = sorted(finite, key=lambda i: float(losses[i].mean()))[:2]
    gap = losses[second] - losses[first]
    error = float(gap.std(correction=0)) / len(gap) ** 0.5
    return Lead(entries[first].label, entries[second].label, float(gap.mean()), error)
