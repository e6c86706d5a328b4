"""Metrics against numbers worked out by hand, scikit-learn, and what must hold for any input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from posterity import metrics

OF_PROBS = {
    "accuracy": metrics.accuracy,
    "nll": metrics.nll,
    "brier": metrics.brier,
    "ece": lambda p, y: metrics.ece(p, y, bins=7),
    "adaptive_ece": lambda p, y: metrics.adaptive_ece(p, y, bins=4),
    "aurc": metrics.aurc,
}
OF_SCORES = {
    "auroc": metrics.auroc,
    "aupr in": metrics.aupr,
    "aupr out": lambda a, b: metrics.aupr(a, b, positive="out"),
    "fpr_at_95": metrics.fpr_at_95,
    "detection_error": metrics.detection_error,
}

# top confidences .8 right, .6 wrong, .5 right, .9 right
PROBS = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.3, 0.2, 0.5], [0.05, 0.9, 0.05]])
TARGETS = torch.tensor([0, 0, 2, 1])


def case(seed, n=200, classes=4, ties=False):
    rng = torch.Generator().manual_seed(seed)
    probs = (torch.randn(n, classes, generator=rng) * 2).softmax(-1)
    if ties:
        probs = probs[torch.randint(0, min(5, n), (n,), generator=rng)]
    return probs, torch.randint(0, classes, (n,), generator=rng)


# --- by hand ---------------------------------------------------------------------------------


def test_by_hand():
    assert metrics.accuracy(PROBS, TARGETS) == 0.75
    nll = -(math.log(0.8) + math.log(0.3) + math.log(0.5) + math.log(0.9)) / 4
    assert metrics.nll(PROBS, TARGETS) == pytest.approx(nll, rel=1e-6)
    brier = (0.04 + 0.01 + 0.01) + (0.49 + 0.36 + 0.01) + (0.09 + 0.04 + 0.25) + (0.0025 * 2 + 0.01)
    assert metrics.brier(PROBS, TARGETS) == pytest.approx(brier / 4, rel=1e-6)


def test_reliability_and_ece_by_hand():
    table = metrics.reliability(PROBS, TARGETS, bins=5)
    assert table.lower.tolist() == [0, 0.2, 0.4, 0.6, 0.8]
    assert table.upper.tolist() == [0.2, 0.4, 0.6, 0.8, 1]
    assert table.count.tolist() == [0, 0, 2, 1, 1]  # .6 and .8 on an edge: in the bin below
    assert table.accuracy[2:].tolist() == [0.5, 1, 1]
    torch.testing.assert_close(table.confidence[2:], torch.tensor([0.55, 0.8, 0.9]).double())
    assert table.confidence[:2].isnan().all()
    assert table.accuracy[:2].isnan().all()
    by_hand = (2 * abs(0.5 - 0.55) + abs(1 - 0.8) + abs(1 - 0.9)) / 4
    assert metrics.ece(PROBS, TARGETS, bins=5) == pytest.approx(by_hand, rel=1e-6)
    assert metrics.ece(PROBS, TARGETS, bins=1) == pytest.approx(0.75 - 0.7, rel=1e-5)
    by_hand = (abs(1 - (0.5 + 0.6)) + abs(2 - (0.8 + 0.9))) / 4  # bins {.5, .6} and {.8, .9}
    assert metrics.adaptive_ece(PROBS, TARGETS, bins=2) == pytest.approx(by_hand, rel=1e-6)
    by_hand = (0.5 + 0.6 + 0.2 + 0.1) / 4  # more bins than examples: each alone
    assert metrics.adaptive_ece(PROBS, TARGETS, bins=9) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("bins", [5, 10, 15, 20])
def test_every_edge_belongs_to_the_bin_below(bins):
    for k in range(1, bins + 1):
        for dtype in (torch.float32, torch.float64):
            top = torch.tensor([k / bins], dtype=dtype)
            if k / bins < 0.5:
                continue
            probs = torch.cat([top, 1 - top])[None]
            count = metrics.reliability(probs, torch.tensor([0]), bins).count
            assert count.argmax() == k - 1


def test_risk_coverage_by_hand():
    curve = metrics.risk_coverage(PROBS, TARGETS)  # .9 right, .8 right, .6 wrong, .5 right
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert metrics.aurc(PROBS, TARGETS) == pytest.approx((1 / 3 + 1 / 4) / 4)


def test_scores_by_hand():
    known, unknown = torch.tensor([0.9, 0.8, 0.8, 0.3]), torch.tensor([0.8, 0.2])
    # pairs won: .9 two, .8 one and a half (twice), .3 one
    assert metrics.auroc(known, unknown) == 6 / 8
    # precision at .9 is 1/1, at .8 3/4, at .3 4/5; recall grows by 1/4, 2/4, 1/4
    assert metrics.aupr(known, unknown) == pytest.approx(1 / 4 + 3 / 8 + 1 / 5)
    # lowest first: .2 right, .3 wrong, .8 one right of three
    assert metrics.aupr(known, unknown, positive="out") == pytest.approx(1 / 2 + 1 / 2 * 2 / 5)
    assert metrics.fpr_at_95(known, unknown) == 1 / 2
    # accept ≥ .9: ½(3/4 + 0); ≥ .8: ½(1/4 + 1/2); ≥ .3: ½(0 + 1/2)
    assert metrics.detection_error(known, unknown) == 1 / 4


def test_fpr_at_95_counts_exactly():
    known, unknown = torch.arange(20.0), torch.arange(20.0) - 0.5
    assert metrics.fpr_at_95(known, unknown) == 18 / 20  # 19 of 20 are 95 %: those from 1 on
    known, unknown = torch.arange(19.0), torch.arange(19.0) - 0.5
    assert metrics.fpr_at_95(known, unknown) == 18 / 19  # 18 of 19 would be too few


# --- against others --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed):
    probs, y = case(seed)
    p = probs.double() / probs.double().sum(-1, keepdim=True)
    assert metrics.accuracy(p, y) == sklearn.accuracy_score(y, p.argmax(-1))
    assert metrics.nll(p, y) == pytest.approx(sklearn.log_loss(y, p, labels=range(4)), rel=1e-12)
    both = sklearn.brier_score_loss(y == 1, p[:, 1]) * 2  # two classes: twice the binary score
    assert metrics.brier(p[:, 1], (y == 1).long()) == pytest.approx(both, rel=1e-12)


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("digits", [1, 5])
def test_scores_against_scikit_learn(scale, digits):
    rng = np.random.default_rng(0)
    known = np.round(rng.normal(1, 1, 300), digits) * scale
    unknown = np.round(rng.normal(0, 1, 170), digits) * scale
    scores, label = np.concatenate([known, unknown]), np.repeat([1, 0], [300, 170])
    a, b = torch.tensor(known), torch.tensor(unknown)
    assert metrics.auroc(a, b) == pytest.approx(sklearn.roc_auc_score(label, scores), rel=1e-12)
    found = sklearn.average_precision_score(label, scores)
    assert metrics.aupr(a, b) == pytest.approx(found, rel=1e-12)
    found = sklearn.average_precision_score(1 - label, -scores)
    assert metrics.aupr(a, b, positive="out") == pytest.approx(found, rel=1e-12)
    fpr, tpr, _ = sklearn.roc_curve(label, scores, drop_intermediate=False)
    assert metrics.fpr_at_95(a, b) == pytest.approx(fpr[tpr >= 0.95].min(), rel=1e-12)
    assert metrics.detection_error(a, b) == pytest.approx(((1 - tpr + fpr) / 2).min(), rel=1e-12)


def test_ece_against_torchmetrics_off_the_edges():
    probs, y = case(0, 500)
    theirs = multiclass_calibration_error(probs, y, 4, n_bins=15).item()
    assert metrics.ece(probs, y, bins=15) == pytest.approx(theirs, abs=1e-6)


def test_why_torchmetrics_is_not_used():
    """Should this fail one day, torchmetrics has become exact and can take over."""
    rng = torch.Generator().manual_seed(0)
    known, unknown = (torch.randn(5000, generator=rng) * 30 + shift for shift in (20, 0))
    label = torch.tensor([1, 0]).repeat_interleave(5000)
    theirs = binary_auroc(torch.cat([known, unknown]), label).item()
    assert abs(theirs - metrics.auroc(known, unknown)) > 0.01
    probs = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
    edge = multiclass_calibration_error(probs, torch.tensor([0, 0]), 2, n_bins=2).item()
    assert edge == pytest.approx(0.05)  # both in [½, 1): |½ − .55|
    assert metrics.ece(probs, torch.tensor([0, 0]), bins=2) == pytest.approx(0.55)  # (½·.5 + ½·.6)


# --- what always holds -----------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6), st.booleans())
def test_invariants_of_probs(seed, n, classes, ties):
    probs, y = case(seed, n, classes, ties)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for name, metric in OF_PROBS.items():
        value = metric(probs, y)
        assert isinstance(value, float)
        assert 0 <= value <= {"nll": math.inf, "brier": 2}.get(name, 1), name
        assert metric(probs[order], y[order]) == pytest.approx(value, abs=1e-9), name
    curve = metrics.risk_coverage(probs, y)
    assert curve.risk[-1].item() == pytest.approx(1 - metrics.accuracy(probs, y), abs=1e-12)
    table = metrics.reliability(probs, y, 6)
    assert table.count.sum() == n
    gap = abs(metrics.accuracy(probs, y) - probs.max(1).values.double().mean().item())
    assert metrics.ece(probs, y, 6) >= gap - 1e-9  # the triangle inequality
    assert metrics.ece(probs, y, 1) == pytest.approx(gap, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(*[st.lists(st.integers(-6, 6), min_size=1, max_size=25)] * 2)
def test_invariants_of_scores(known, unknown):
    a, b = torch.tensor(known).float(), torch.tensor(unknown).float()
    for name, metric in OF_SCORES.items():
        value = metric(a, b)
        assert isinstance(value, float)
        assert 0 <= value <= 1, name
        assert metric(a.flip(0), b.flip(0)) == value, name
        assert metric((a / 10).exp(), (b / 10).exp()) == pytest.approx(value, abs=1e-12), name
    pairs = [(x > y) + (x == y) / 2 for x in known for y in unknown]
    assert metrics.auroc(a, b) == pytest.approx(sum(pairs) / len(pairs))
    assert metrics.auroc(b, a) == pytest.approx(1 - metrics.auroc(a, b))
    assert metrics.detection_error(a, b) <= 0.5
    assert metrics.aupr(a, b, positive="out") == pytest.approx(metrics.aupr(-b, -a))


def test_perfect_predictions():
    y = torch.arange(40) % 4
    probs = torch.nn.functional.one_hot(y).float()
    values = {name: metric(probs, y) for name, metric in OF_PROBS.items()}
    assert values.pop("accuracy") == 1
    assert set(values.values()) == {0.0}
    a, b = torch.rand(30) + 1, torch.rand(20)
    assert [metric(a, b) for metric in OF_SCORES.values()] == [1, 1, 1, 0, 0]
    assert [metric(b, a) for metric in OF_SCORES.values()][3:] == [1, 0.5]


def test_chance():
    n, rng = 20000, torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (n,), generator=rng)
    flat = torch.full((n, 10), 0.1)
    assert metrics.nll(flat, y) == pytest.approx(math.log(10), rel=1e-6)
    assert metrics.brier(flat, y) == pytest.approx(0.9, rel=1e-6)
    calibrated = (torch.randn(n, 10, generator=rng) * 2).softmax(-1)
    y = torch.multinomial(calibrated, 1, generator=rng)[:, 0]
    assert metrics.ece(calibrated, y, bins=15) < 0.015  # √(15/n) at most
    assert metrics.adaptive_ece(calibrated, y, bins=15) < 0.015
    assert metrics.ece((calibrated.log() * 2).softmax(-1), y, bins=15) > 0.1  # overconfident
    a, b = torch.rand(n, generator=rng), torch.rand(n, generator=rng)
    tolerance = 4 * math.sqrt(1 / (6 * n))  # four standard errors of the AUROC
    assert metrics.auroc(a, b) == pytest.approx(0.5, abs=tolerance)
    assert metrics.fpr_at_95(a, b) == pytest.approx(0.95, abs=0.01)
    assert metrics.aupr(a, b) == pytest.approx(0.5, abs=0.02)


# --- input -----------------------------------------------------------------------------------


def test_token_level_and_ignored_targets():
    probs, y = case(0, 60)
    tokens, targets = probs.view(5, 12, 4), y.view(5, 12).clone()
    for name, metric in OF_PROBS.items():
        assert metric(tokens, targets) == metric(probs, y), name
    targets[:, ::3] = -100
    kept = targets.flatten() != -100
    for name, metric in OF_PROBS.items():
        assert metric(tokens, targets) == metric(probs[kept], y[kept]), name
        assert metric(tokens, targets) != metric(probs, y), name


def test_two_classes_as_one_probability():
    p, y = torch.rand(50).double(), torch.randint(0, 2, (50,))
    for name, metric in OF_PROBS.items():
        assert metric(p, y) == metric(torch.stack([1 - p, p], 1), y), name


def test_log_probs_do_not_underflow():
    log_probs = torch.tensor([[0.0, -300.0]]).log_softmax(-1)
    assert metrics.nll(log_probs, torch.tensor([1]), log=True) == pytest.approx(300)
    assert metrics.nll(log_probs.exp(), torch.tensor([1])) == math.inf  # visible, not masked
    probs, y = case(1)
    assert metrics.nll(probs.log(), y, log=True) == pytest.approx(metrics.nll(probs, y), rel=1e-6)
    with pytest.raises(ValueError, match="must sum to 1"):
        metrics.nll(torch.randn(3, 2), torch.tensor([0, 1, 0]), log=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    probs, y = case(2)
    for name, metric in OF_PROBS.items():
        assert metric(probs.to(dtype), y) == pytest.approx(metric(probs, y), abs=0.05), name


def test_gradients_do_not_matter():
    probs, y = case(3)
    for metric in OF_PROBS.values():
        assert metric(probs.requires_grad_(), y) == metric(probs.detach(), y)


BAD_PROBS = {
    "other length": (PROBS, TARGETS[:3], "do not match"),
    "logits": (PROBS * 3, TARGETS, "must sum to 1"),
    "negative": (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), "negative"),
    "nan": (torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), "NaN"),
    "too large": (PROBS, TARGETS + 1, r"targets must be in \[0, 2\]"),
    "negative target": (PROBS, TARGETS - 1, r"targets must be in \[0, 2\]"),
    "one-hot": (PROBS, torch.eye(3)[TARGETS], "class numbers"),
    "float": (PROBS, TARGETS.float(), "class numbers"),
    "empty": (PROBS[:0], TARGETS[:0], "no examples"),
    "all ignored": (PROBS, torch.full((4,), -100), "no examples"),
    "binary": (torch.tensor([1.2]), torch.tensor([1]), "negative"),
}


@pytest.mark.parametrize("bad", BAD_PROBS)
@pytest.mark.parametrize("name", OF_PROBS)
def test_bad_probs(name, bad):
    probs, targets, message = BAD_PROBS[bad]
    with pytest.raises(ValueError, match=message):
        OF_PROBS[name](probs, targets)


@pytest.mark.parametrize("name", OF_SCORES)
def test_bad_scores(name):
    for a, b, message in (
        (torch.ones(3), torch.ones(0), "both kinds"),
        (torch.ones(0), torch.ones(3), "both kinds"),
        (torch.ones(3), torch.tensor([math.nan]), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            OF_SCORES[name](a, b)


def test_bad_options():
    for metric in (metrics.ece, metrics.adaptive_ece, metrics.reliability):
        with pytest.raises(ValueError, match="at least one bin"):
            metric(PROBS, TARGETS, 0)
        with pytest.raises(TypeError, match="bins"):
            metric(PROBS, TARGETS)
    with pytest.raises(ValueError, match="'in' or 'out'"):
        metrics.aupr(torch.ones(1), torch.ones(1), positive="yes")


def test_one_hot_targets_and_arrays_are_errors():
    probs, targets = torch.rand(64, 3).softmax(-1), torch.randint(3, (64,))
    with pytest.raises(ValueError, match="one-hot"):
        metrics.nll(probs, torch.nn.functional.one_hot(targets, 3))
    with pytest.raises(TypeError, match="needs tensors"):
        metrics.accuracy(probs.numpy(), targets.numpy())
    sure = torch.tensor([[0.998], [0.999]]), torch.ones(2, 1, dtype=torch.long)  # of one question
    assert metrics.accuracy(*sure) == 1
    several = torch.rand(64, 3), torch.randint(2, (64, 3))  # P(y=1) of three questions each
    assert math.isfinite(metrics.nll(*several))
