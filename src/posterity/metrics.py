"""How good probabilities are: accuracy, proper scores, calibration, rejection, unknown inputs.

``probs`` is (…, classes) and ``targets`` (…) class numbers; or, for two classes, ``probs`` is
P(y=1) shaped as ``targets``. Targets of -100 (torch's ``ignore_index``) are left out. Invalid
input raises a ValueError: shapes that do not match, probabilities that are negative, NaN or do not
sum to 1, targets out of range. Sums run in float64; every score is a Python float.

torchmetrics is not used here, and the tests say why: its AUROC and average precision squash scores
outside [0, 1] through a float32 sigmoid (ties, wrong in the second digit on logits) and its
calibration error closes bins on the left.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Reliability",
    "RiskCoverage",
    "accuracy",
    "adaptive_ece",
    "aupr",
    "aurc",
    "auroc",
    "brier",
    "detection_error",
    "ece",
    "fpr_at_95",
    "nll",
    "reliability",
    "risk_coverage",
]

IGNORED = -100  # torch's ignore_index
TOLERANCE = 5e-3  # of sums of probabilities; bfloat16 rounds them by 2e-3


def _checked(probs: Tensor, targets: Tensor, log: bool = False) -> tuple[Tensor, Tensor]:
    """As (examples, classes) and (examples,), without the ignored."""
    if not (isinstance(probs, Tensor) and isinstance(targets, Tensor)):
        raise TypeError(f"needs tensors, not {type(probs).__name__} and {type(targets).__name__}")
    if targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets are class numbers, not {targets.dtype}")
    if not log and probs.shape == targets.shape:
        several = probs.dim() > 1 and probs.shape[-1] > 2 and len(probs)
        chosen = several and (targets.sum(-1) == 1).all()
        if chosen and ((probs.sum(-1) - 1).abs() <= TOLERANCE).all():
            raise ValueError("targets look one-hot: needs class numbers, targets.argmax(-1)")
        probs = torch.stack([1 - probs, probs], -1)
    if probs.dim() < 1 or probs.shape[:-1] != targets.shape:
        raise ValueError(
            f"probs {tuple(probs.shape)} and targets {tuple(targets.shape)} do not match: "
            "needs (…, classes) and (…)"
        )
    targets = targets.detach().to(probs.device).long()
    kept = targets != IGNORED
    probs, targets = probs.detach()[kept], targets[kept]
    if not len(targets):
        raise ValueError("there are no examples")
    if not ((targets >= 0) & (targets < probs.shape[1])).all():
        raise ValueError(f"targets must be in [0, {probs.shape[1] - 1}] or {IGNORED}")
    total = probs.logsumexp(1).exp() if log else probs.sum(1, dtype=torch.float64)
    if not (log or (probs >= 0).all()) or not ((total - 1).abs() <= TOLERANCE).all():
        raise ValueError("probabilities must not be negative or NaN, and must sum to 1")
    return probs, targets


def _top(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence of the most probable class and whether it is right (float64)."""
    probs, targets = _checked(probs, targets)
    confidence, label = probs.max(1)
    return confidence, (label == targets).double()


def accuracy(probs: Tensor, targets: Tensor) -> float:
    """Accuracy (1/n) Σ_i [argmax_c p_ic = y_i]: the share of examples that are right.

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
    0.5
    """
    return _top(probs, targets)[1].mean().item()


def nll(probs: Tensor, targets: Tensor, *, log: bool = False) -> float:
    """Negative log-likelihood −(1/n) Σ_i log p(y_i), in nats; exp of it is the perplexity.

    Args:
        probs: probabilities; a target of probability 0 makes it infinite.
        targets: class numbers.
        log: ``probs`` are log-probabilities (``Prediction.log_probs``): they do not underflow.

    >>> nll(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))
    0.6931471805599453
    """
    probs, targets = _checked(probs, targets, log)
    picked = probs.gather(1, targets[:, None]).double()
    return -(picked if log else picked.log()).mean().item()


def brier(probs: Tensor, targets: Tensor) -> float:
    """Brier score mean Σ_c (p_c − [y = c])²: summed over classes, so in [0, 2].

    >>> brier(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]))
    1.25

    Source: Brier 1950, Monthly Weather Review 78(1).
    """
    probs, targets = _checked(probs, targets)
    errors = probs.double().scatter_add(
        1, targets[:, None], -torch.ones_like(targets, dtype=torch.float64)[:, None]
    )
    return errors.square().sum(1).mean().item()


class Reliability(NamedTuple):
    """One row per bin (lower, upper]: mean confidence, accuracy (NaN where empty) and count."""

    lower: Tensor
    upper: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def _table(confidence: Tensor, hit: Tensor, bins: int, which: Tensor) -> list[Tensor]:
    """Mean confidence, accuracy and count of the examples of each bin."""
    count = torch.bincount(which, minlength=bins)
    sums = (torch.bincount(which, x.double(), minlength=bins) for x in (confidence, hit))
    return [*(total / count for total in sums), count]


def _gap(confidence: Tensor, accuracy: Tensor, count: Tensor) -> float:
    gaps = (confidence - accuracy).abs() * count
    return (gaps[count > 0].sum() / count.sum()).item()


def _bins(bins: int) -> int:
    if bins < 1:
        raise ValueError(f"needs at least one bin, not {bins}")
    return bins


def reliability(probs: Tensor, targets: Tensor, bins: int) -> Reliability:
    """The reliability diagram's table over ``bins`` equal intervals of the top confidence.

    >>> table = reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=2)
    >>> table.count.tolist(), table.accuracy[1].item()
    ([0, 2], 0.5)

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    confidence, hit = _top(probs, targets)
    edges = torch.arange(_bins(bins) + 1, dtype=torch.float64, device=probs.device) / bins
    inner = edges[1:-1].to(confidence.dtype)  # rounded alike: float32's 0.8 is on the edge 0.8
    which = torch.bucketize(confidence, inner)  # right-closed: an edge belongs to the bin below
    return Reliability(edges[:-1], edges[1:], *_table(confidence, hit, bins, which))


def ece(probs: Tensor, targets: Tensor, bins: int) -> float:
    """Expected calibration error Σ_b (n_b/n)·|accuracy_b − confidence_b| over equal intervals.

    It depends on ``bins`` (the paper uses 20), so there is no default. Bins are (lower, upper].

    >>> round(ece(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=20), 6)
    0.45

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    return _gap(*reliability(probs, targets, bins)[2:])


def _shared(confidence: Tensor, hit: Tensor) -> Tensor:
    """Hits shared evenly among equal confidences: the mean over all orders of ties."""
    _, group, count = confidence.unique(return_inverse=True, return_counts=True)
    return (torch.bincount(group, hit) / count)[group]


def adaptive_ece(probs: Tensor, targets: Tensor, bins: int) -> float:
    """Calibration error over bins of equally many examples (their numbers differ by 1 at most).

    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    >>> round(adaptive_ece(probs, torch.tensor([0, 1]), bins=2), 6)
    0.35

    Source: Nixon et al. 2019, arXiv 1904.01685; Mukhoti et al. 2020, arXiv 2002.09437 (top label).
    """
    confidence, hit = _top(probs, targets)
    hit = _shared(confidence, hit)
    order = confidence.argsort()
    which = torch.arange(len(order), device=order.device) * _bins(bins) // len(order)
    return _gap(*_table(confidence[order], hit[order], bins, which))


class RiskCoverage(NamedTuple):
    """Error rate (risk) among the most confident examples, for each fraction kept (coverage)."""

    coverage: Tensor
    risk: Tensor


def risk_coverage(probs: Tensor, targets: Tensor) -> RiskCoverage:
    """Selective prediction: answer only the k most confident of n examples, for k = 1, …, n.

    Equally confident examples share their errors, so the order of the data does not matter.

    >>> risk_coverage(torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([1, 0])).risk.tolist()
    [0.0, 0.5]

    Source: Geifman & El-Yaniv 2017, arXiv 1705.08500.
    """
    confidence, hit = _top(probs, targets)
    errors = 1 - _shared(confidence, hit)[confidence.argsort(descending=True)]
    kept = torch.arange(1, len(errors) + 1, device=errors.device, dtype=torch.float64)
    return RiskCoverage(kept / len(errors), errors.cumsum(0) / kept)


def aurc(probs: Tensor, targets: Tensor) -> float:
    """Area under the risk-coverage curve: the mean risk over all coverages; less is better.

    >>> aurc(torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([1, 0]))
    0.25

    Source: Geifman et al. 2019, arXiv 1805.08206.
    """
    return risk_coverage(probs, targets).risk.mean().item()


def _curve(scores_in: Tensor, scores_out: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each are accepted at every threshold, from above the highest to the lowest."""
    if not (scores_in.numel() and scores_out.numel()):
        raise ValueError("needs scores of both kinds")
    scores = torch.cat([s.detach().flatten() for s in (scores_in, scores_out.to(scores_in.device))])
    if scores.isnan().any():
        raise ValueError("scores must not be NaN")
    level, group = scores.unique(return_inverse=True)
    parts = group.split([scores_in.numel(), scores_out.numel()])
    counts = [torch.bincount(part, minlength=len(level)).flip(0).cumsum(0) for part in parts]
    first, second = (torch.cat([count.new_zeros(1), count]) for count in counts)
    return first, second


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """P(score in > score out) + ½ P(equal): area under the ROC curve, exact.

    ``scores_in`` are scores of known (in-distribution) inputs, ``scores_out`` of unknown ones;
    a higher score means more in-distribution (max p̄, or −entropy).

    >>> auroc(torch.tensor([0.9, 0.8]), torch.tensor([0.8, 0.1]))
    0.875

    Source: Hendrycks & Gimpel 2017, arXiv 1610.02136.
    """
    known, unknown = (count.double() for count in _curve(scores_in, scores_out))
    return (torch.trapezoid(known, unknown) / (known[-1] * unknown[-1])).item()


def aupr(scores_in: Tensor, scores_out: Tensor, *, positive: Literal["in", "out"] = "in") -> float:
    """Average precision Σ (recall_k − recall_{k−1})·precision_k: area under the PR curve.

    Scores as in :func:`auroc`; ``positive="out"`` is about finding unknown inputs by low scores.

    >>> round(aupr(torch.tensor([0.9, 0.7]), torch.tensor([0.8, 0.1])), 6)
    0.833333

    Source: Hendrycks & Gimpel 2017, arXiv 1610.02136.
    """
    if positive not in ("in", "out"):
        raise ValueError(f"positive is 'in' or 'out', not {positive!r}")
    if positive == "out":
        scores_in, scores_out = -scores_out, -scores_in
    right, wrong = (count.double() for count in _curve(scores_in, scores_out))
    precision = right[1:] / (right + wrong)[1:]
    return (right.diff() / right[-1] * precision).sum().item()


def fpr_at_95(scores_in: Tensor, scores_out: Tensor) -> float:
    """The fraction of unknown inputs accepted where at least 95 % of known ones are.

    Scores as in :func:`auroc`; less is better.

    >>> fpr_at_95(torch.tensor([0.9, 0.8]), torch.tensor([0.85, 0.1]))
    0.5

    Source: Liang et al. 2018, arXiv 1706.02690.
    """
    known, unknown = _curve(scores_in, scores_out)
    enough = (100 * known >= 95 * known[-1]).int().argmax()  # the first: the highest threshold
    return unknown[enough].item() / unknown[-1].item()


def detection_error(scores_in: Tensor, scores_out: Tensor) -> float:
    """min over thresholds of ½(FNR + FPR): the error rate if both kinds are equally likely.

    Scores as in :func:`auroc`; 0 is perfect, ½ is chance.

    >>> detection_error(torch.tensor([0.9, 0.8]), torch.tensor([0.85, 0.1]))
    0.25

    Source: Liang et al. 2018, arXiv 1706.02690.
    """
    known, unknown = (count.double() for count in _curve(scores_in, scores_out))
    return ((1 - known / known[-1] + unknown / unknown[-1]) / 2).min().item()
