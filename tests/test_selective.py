"""Abstention that keeps its promise, thresholds, scores, temperature and pruning by share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn

from posterity import Mixture, Posterior, metrics, predict
from posterity.selective import _at_most, abstention, choose_temperature, score, threshold


def drawn(n, g, error):
    """Confidences and wrong answers: ``error`` is the rate at a confidence."""
    confidence = 0.5 + 0.5 * torch.rand(n, generator=g, dtype=torch.float64)
    wrong = torch.rand(n, generator=g, dtype=torch.float64) < error(confidence)
    return torch.stack([1 - confidence, confidence], 1), 1 - wrong.long()


@pytest.mark.parametrize(
    ("error", "true"),
    [
        (lambda c: 1 - c, lambda t: (1 - t) / 2),  # calibrated
        (lambda c: torch.full_like(c, 0.101), lambda t: 0.101),  # no threshold is right
    ],
)
def test_the_promised_risk_holds_as_often_as_promised(error, true):
    g, risk, delta, runs = torch.Generator().manual_seed(0), 0.1, 0.1, 400
    violations, coverages = 0, []
    for _ in range(runs):
        try:
            found = abstention(*drawn(2000, g, error), risk, delta)
        except ValueError:
            continue
        coverages.append(found.coverage)
        violations += true(found.threshold) > risk
    assert violations / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    if true(0.9) < risk:  # at best, an error rate of exactly a tenth, it answers two fifths
        assert len(coverages) > 0.95 * runs
        assert 0.28 < sum(coverages) / len(coverages) < 0.4


@given(st.integers(1, 60), st.data())
def test_the_binomial_tail_is_scipys(n, data):
    errors = data.draw(st.integers(0, n))
    rate = data.draw(st.floats(0.01, 0.99))
    assert _at_most(errors, n, rate) == pytest.approx(binom.cdf(errors, n, rate), rel=1e-9)


def test_equal_confidences_are_answered_together_or_not_at_all():
    probs = torch.tensor([[0.1, 0.9]] * 500 + [[0.4, 0.6]] * 500)
    targets = torch.ones(1000, dtype=torch.long)
    targets[500:700] = 0
    found = abstention(probs, targets, risk=0.05)
    assert found == (pytest.approx(0.6), 0.5, 0, 500)


def test_without_enough_examples_abstention_says_how_many_it_takes():
    probs, targets = torch.tensor([[0.1, 0.9]] * 50 + [[0.2, 0.8]]), torch.ones(51).long()
    with pytest.raises(ValueError, match="takes 816 answers"):
        abstention(probs, targets, risk=0.01)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        abstention(probs, targets, risk=0.0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.floats(0, 0.99))
def test_a_threshold_rejects_no_more_known_inputs_than_allowed(scores, fpr):
    values = torch.tensor(scores, dtype=torch.float64)
    limit = threshold(values, fpr)
    assert (values < limit).double().mean() <= fpr + 1e-9
    higher = values[values > limit]  # and the next one would reject more
    assert not len(higher) or (values < higher.min()).double().mean() > fpr - 1e-9


def test_a_threshold_needs_scores():
    for bad in (torch.tensor([]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="NaN"):
            threshold(bad, 0.1)
    with pytest.raises(ValueError, match="fpr"):
        threshold(torch.ones(2), 1.0)


class Spread(nn.Module):
    """Logits w·x: at x = 0 every sample agrees, far away none does."""

    def __init__(self, outputs):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x * self.w


@pytest.mark.parametrize("kind", ["probability", "entropy", "mutual_information", "variance"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_scores_are_high_where_samples_agree(kind, likelihood):
    outputs = 3 if likelihood == "categorical" else 1
    model = Spread(outputs)
    mean = {"w": torch.linspace(0, 4, outputs) + 4 * (outputs == 1)}
    posterior = Posterior(mean, {"w": torch.full((outputs,), 0.5)})
    x = torch.tensor([[1.0], [1.0], [8.0]])
    found = score(predict(model, posterior, x, likelihood=likelihood), kind)
    assert found.shape == ((3,) if outputs == 3 else (3, 1))
    narrow = score(predict(model, posterior.temper(1e-6), x, likelihood=likelihood), kind)
    assert (found <= narrow + 1e-6).all()
    values = torch.stack(
        [(x * posterior.sample(0, s)["w"]).double() for s in range(64)]
    )  # samples, inputs, outputs
    each = values.softmax(-1) if outputs == 3 else torch.stack([-values, values], -1).sigmoid()
    p = each.mean(0)

    def entropy(p):
        return -(p * p.clamp_min(1e-300).log()).sum(-1)

    spread = each.var(0, correction=0)
    expected = {
        "probability": p.amax(-1),
        "entropy": -entropy(p),
        "mutual_information": entropy(each).mean(0) - entropy(p),
        "variance": -(spread.sum(-1) if outputs == 3 else spread[..., 1]),
    }[kind]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown score"):
        score(predict(model, posterior, x, likelihood=likelihood), "luck")


def test_the_best_temperature_is_found_and_only_the_width_changes():
    torch.manual_seed(0)
    model = Spread(1)
    g = torch.Generator().manual_seed(0)
    # weights that vary with variance 4 from example to example: the width that predicts best
    x = torch.ones(4000, 1)
    w = 1 + 2 * torch.randn(4000, 1, generator=g)
    y = (torch.rand(4000, 1, generator=g) < w.sigmoid()).long()
    posterior = Posterior({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, ess=10)
    options = {"likelihood": "bernoulli", "samples": 256}
    found = choose_temperature(model, posterior, (x, y), (0.01, 1.0, 30.0, 1000.0), **options)
    direct = {
        t: metrics.nll(predict(model, posterior.temper(t), x, **options).probs, y)
        for t in found.nll
    }
    assert found.nll == pytest.approx(direct)
    assert found.temperature == min(direct, key=direct.__getitem__) == 30.0
    assert found.posterior.mean["w"] == 3
    assert found.posterior.precision["w"] == pytest.approx(1 / 30)
    mixed = choose_temperature(model, Mixture([posterior]), (x, y), (0.01, 30.0), **options)
    assert mixed.temperature == 30.0
    with pytest.raises(ValueError, match="temperatures to try"):
        choose_temperature(model, posterior, (x, y), ())


def weights():
    torch.manual_seed(0)
    mean = {"a": torch.randn(30, 4), "b": torch.randn(30)}
    precision = {"a": torch.rand(30, 4) + 0.1, "b": 100 * torch.rand(30) + 1}
    return Posterior(mean, precision)


@given(st.floats(0, 1), st.sampled_from(["snr", "magnitude"]))
def test_a_share_of_the_weights_is_pruned_the_least_first(share, by):
    posterior = weights()
    found = posterior.prune_share(share, by)
    count = math.floor(share * 150 + 1e-9)
    masks = torch.cat([found.pruned[n].flatten() for n in ("a", "b")])
    worth = torch.cat(
        [
            (m.abs() * (posterior.precision[n].sqrt() if by == "snr" else 1)).flatten()
            for n, m in posterior.mean.items()
        ]
    )
    assert masks.sum() == count
    if 0 < count < 150:
        assert worth[masks].max() < worth[~masks].min()
    assert all((found.sample(0, 0)[n][found.pruned[n]] == 0).all() for n in found.mean)


def test_pruning_a_share_by_signal_to_noise_is_pruning_at_its_threshold():
    posterior = weights()
    share = posterior.prune_share(0.4)
    snr = torch.cat(
        [(m.abs() / posterior.std()[n]).flatten() for n, m in posterior.mean.items()]
    ).sort()
    limit = (snr.values[59] + snr.values[60]).item() / 2
    for name, mask in posterior.prune(limit).pruned.items():
        assert torch.equal(mask, share.pruned[name])
    again = share.prune_share(0.2)
    assert all(torch.equal(again.pruned[n], share.pruned[n]) for n in share.pruned)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share in"):
            posterior.prune_share(bad)
    with pytest.raises(ValueError, match="share in"):
        posterior.prune_share(0.1, "luck")


@pytest.mark.parametrize("fpr", [0.0, 1 - 1e-11])
def test_thresholds_at_the_ends(fpr):
    scores = torch.rand(10, generator=torch.Generator().manual_seed(0))
    assert threshold(scores, fpr) == (scores.min() if fpr == 0 else scores.max()).item()
