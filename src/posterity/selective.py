"""What a model should not answer: unknown inputs, and known ones that it is not sure enough of.

A score or confidence is compared with a threshold, and the threshold is chosen on held-out data so
that something is promised of new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import metrics
from .mixture import Mixture
from .posterior import Posterior
from .prediction import Prediction, predict

__all__ = ["Abstention", "Tempering", "abstention", "choose_temperature", "score", "threshold"]

COVERAGES = 100  # that are tried: each hundredth of the held-out examples
STARTS = (0.0, 0.25, 0.5)  # coverages where the trials begin


def score(
    prediction: Prediction,
    kind: Literal["probability", "entropy", "mutual_information", "variance"] = "probability",
) -> Tensor:
    """How familiar each input is: high for known ones, low for unknown ones.

    The largest class probability; minus the entropy; minus the mutual information; or minus the
    variance of the probabilities over the samples, summed over classes (of ``bernoulli`` that of
    P(y=1); of ``gaussian``, which has no other score, the total variance).

    Raises:
        ValueError: another kind.
        AttributeError: a kind that the likelihood has not.

    >>> import torch
    >>> from posterity import predict
    >>> prediction = predict(torch.nn.Identity(), None, torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    >>> [round(s, 3) for s in score(prediction, "entropy").tolist()]
    [-0.693, -0.001]

    Source: Hendrycks and Gimpel 2017, arXiv 1610.02136; Shen et al. 2024, arXiv 2402.17641.
    """
    if kind == "probability":
        return prediction._of("log_probs").amax(-1).exp()
    if kind == "entropy":
        return -prediction.entropy
    if kind == "mutual_information":
        return -prediction.mutual_information
    if kind == "variance":
        variance = prediction.variance
        return -(variance.sum(-1) if prediction.likelihood == "categorical" else variance)
    raise ValueError(f"unknown score {kind!r}")


def threshold(scores_in: Tensor, fpr: float) -> float:
    """The threshold below which at most a share ``fpr`` of known inputs falls.

    Call an input unknown where its score is *below* it. The share is exact on these scores,
    ties included; on new ones it is (⌊n·fpr⌋ + 1)/(n + 1) on average, so hold out many more than
    1/fpr, and varies by some √(fpr/n).

    Args:
        scores_in: scores of held-out known inputs, as :func:`score` gives them.
        fpr: known inputs that may be called unknown, in [0, 1).

    Raises:
        ValueError: no scores, NaN among them, or ``fpr`` out of range.

    >>> threshold(torch.tensor([0.1, 0.5, 0.7, 0.9]), fpr=0.25)
    0.5
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), not {fpr}")
    ordered = scores_in.detach().flatten().sort().values
    if not len(ordered) or ordered.isnan().any():
        raise ValueError("needs scores, and none may be NaN")
    return ordered[min(math.floor(fpr * len(ordered) + 1e-9), len(ordered) - 1)].item()


class Abstention(NamedTuple):
    """Answer where the confidence is *above* ``threshold``.

    ``coverage``: the share of held-out examples that are answered then; ``errors`` of these
    ``answered`` were wrong.
    """

    threshold: float
    coverage: float
    errors: int
    answered: int


def abstention(probs: Tensor, targets: Tensor, risk: float, delta: float = 0.05) -> Abstention:
    r"""How sure a model must be so that its answers are wrong at most at a rate of ``risk``.

    With probability 1−δ over the draw of the held-out examples, the error rate among answers on
    new examples of the same distribution is at most ``risk``. Examples must be drawn independently:
    the tokens of one text are not. Given the confidence of the next
    example, the k most confident ones are independent draws from all that lie above it, so that
    their errors are binomial. Greater and greater k are tried as long as
    P(Bin(k, risk) ≤ errors) ≤ δ/3: from the least k that could pass with a few errors, from a
    quarter and from half of the examples (fixed-sequence testing: only the starts share δ).

    Args:
        probs: (…, classes) of held-out labelled examples, or P(y=1) shaped as the targets. Not
            those the model, its temperature or anything else was chosen by.
        targets: (…) class numbers; -100 is left out.
        risk: error rate that is allowed, in (0, 1).
        delta: δ, the chance that the promise does not hold.

    Raises:
        ValueError: no threshold is enough: too few examples, or too many confident errors.

    Example:
        >>> import torch
        >>> from posterity.selective import abstention
        >>> sure = torch.linspace(0.5, 1, 2000, dtype=torch.float64)
        >>> wrong = torch.rand(2000, generator=torch.Generator().manual_seed(0)) > sure
        >>> found = abstention(torch.stack([1 - sure, sure], 1), 1 - wrong.long(), risk=0.1)
        >>> found.errors / found.answered < 0.1 < 0.5 < found.threshold
        True

    Source: Geifman and El-Yaniv 2017, arXiv 1705.08500; Angelopoulos et al. 2021, arXiv 2110.01052.
    """
    if not (0 < risk < 1 and 0 < delta < 1):
        raise ValueError(f"risk and delta must be in (0, 1), not {risk} and {delta}")
    confidence, hit = metrics._top(probs, targets)
    order = confidence.argsort(descending=True)
    confidence, wrong = confidence[order], (1 - hit)[order].cumsum(0)
    n, level, best = len(order), delta / len(STARTS), None
    least = math.ceil(math.log(level) / math.log1p(-risk))  # answers, if none is wrong
    for start in STARTS:
        for part in range(1, COVERAGES + 1):
            # the first one that is not answered; equals of it are not answered either
            first = min(n * part // COVERAGES, n - 1)
            answered = int((confidence > confidence[first]).sum())
            if answered < max(start * n, 2 * least):
                continue
            errors = int(wrong[answered - 1])
            if _at_most(errors, answered, risk) > level:
                break
            if best is None or answered > best.answered:
                best = Abstention(confidence[first].item(), answered / n, errors, answered)
    if best is None:
        raise ValueError(
            f"no confidence among {n} held-out examples promises a risk of {risk:g}: it takes "
            f"{2 * least} answers with hardly an error. Allow more risk, or hold out more"
        )
    return best


def _at_most(errors: int, n: int, rate: float) -> float:
    """P(Bin(n, rate) ≤ errors)."""
    i = torch.arange(errors + 1, dtype=torch.float64)
    total = torch.tensor(float(n), dtype=torch.float64)
    ways = (total + 1).lgamma() - (i + 1).lgamma() - (total - i + 1).lgamma()
    return (ways + i * math.log(rate) + (n - i) * math.log1p(-rate)).logsumexp(0).exp().item()


class Tempering(NamedTuple):
    """The posterior at the best temperature, that, and the mean NLL at each, in nats."""

    posterior: Posterior | Mixture
    temperature: float
    nll: dict[float, float]


def choose_temperature(
    model: nn.Module,
    posterior: Posterior | Mixture,
    data: tuple[Any, Tensor],
    temperatures: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0),
    **options: Any,
) -> Tempering:
    """The temperature of the posterior at which held-out data are most probable.

    Each is tried by ``posterior.temper(t)``, which scales its variances and leaves its mean; with
    the same stream of noise, so that temperatures differ by nothing else.

    Args:
        model: that the posterior fits.
        posterior: to be tempered.
        data: a pair (inputs, targets) that was not trained on.
        temperatures: to try.
        options: of :func:`posterity.predict`.

    Raises:
        ValueError: no temperatures, or as :func:`posterity.predict`.

    Source: Wenzel et al. 2020, arXiv 2002.02405.
    """
    if not temperatures:
        raise ValueError("needs temperatures to try")
    inputs, targets = data
    nll = {}
    for t in temperatures:
        found = predict(model, posterior.temper(t), inputs, **options)
        if found.likelihood == "gaussian":
            raise ValueError("choose_temperature is for classes")
        log_probs = found._of("log_probs")
        nll[t] = metrics.nll(log_probs, targets, log=True)
    best = min(nll, key=lambda t: nll[t])
    return Tempering(posterior.temper(best), best, nll)
