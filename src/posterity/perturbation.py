r"""Memory perturbation: what a model would say of an example it had not been trained on.

Training balances the prior's pull with every example's gradient, so leaving out example i moves the
mean by Σ·(λ/N)·∇ℓ_i to first order, with Σ the posterior's covariance (docs/maths.md). The outputs
then move by (λ/N)·V_i e_i, with the prediction's error e_i = ∂ℓ_i/∂f_i and its covariance
V_i = J_i Σ J_iᵀ, J_i = ∂f_i/∂θ. No retraining, and no test set.

Source: Nickl et al. 2023, arXiv 2310.19273; Shen et al. 2024, arXiv 2402.17641.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .batches import Pairs
from .binding import Tensors, call, clean_name, evaluating, floats, placed
from .metrics import IGNORED
from .mixture import Mixture
from .posterior import Posterior
from .prediction import Likelihood
from .variances import (
    Form,
    Gaussian,
    copies,
    divided,
    linear,
    sampled,
    times,
    without_curvature,
)

Variance = Literal["jacobian", "samples"]


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What :func:`perturb` returns: a value per example, in the order of the batches.

    ``sensitivity``: how far the example's own output (logits; of the diagonal alone, probabilities)
    would move if it were left out; up to the factor λ/N, and to first order. ``loss``: its loss at
    the mean, in nats. ``left_out``: its loss after the move, with the factor. Both are means over
    the example's targets, whose number is ``count``. ``shift``: the moves with the factor, shaped
    as the outputs, where asked for.
    """

    sensitivity: Tensor
    loss: Tensor
    left_out: Tensor
    count: Tensor
    shift: Tensor | None = None


class LeaveOneOut(NamedTuple):
    """``nll``: an estimate of the mean test loss, in nats; ``per_example``: each one's loss."""

    nll: float
    per_example: Tensor


def sensitivity(
    model: nn.Module,
    posterior: Gaussian,
    data: Any,
    likelihood: Likelihood = "categorical",
    variance: Variance = "jacobian",
    full: bool = True,
    **options: Any,
) -> Tensor:
    r"""How sensitive a model is to each of its training examples.

    ``full``: ‖V_i e_i‖₂ over the outputs. Otherwise Σ_c |e_c·h′_c·v_c| with v = diag V and h′ the
    derivative of the inverse link (p(1−p); 1 for ``gaussian``): the move of the probabilities.

    Args:
        model: as for :func:`perturb`, like the other arguments.
        posterior: of this model.
        data: the training examples.
        likelihood: of the loss it was trained with.
        variance: ``"jacobian"`` or ``"samples"``.
        full: the whole matrix V_i, or its diagonal.
        options: those of :func:`perturb`.

    Returns:
        (examples,): large is sensitive.

    Example:
        >>> import torch
        >>> from posterity import Posterior, sensitivity
        >>> model = torch.nn.Linear(2, 3)
        >>> mean = dict(model.named_parameters())
        >>> precision = {name: torch.full_like(m, 50.0) for name, m in mean.items()}
        >>> posterior = Posterior(mean, precision)
        >>> x, y = torch.randn(7, 2), torch.randint(3, (7,))
        >>> sensitivity(model, posterior, (x, y)).shape
        torch.Size([7])

    Source: Nickl et al. 2023, arXiv 2310.19273.
    """
    return perturb(model, posterior, data, likelihood, variance, full, **options).sensitivity


def leave_one_out(
    model: nn.Module,
    posterior: Gaussian,
    data: Any,
    likelihood: Likelihood = "categorical",
    variance: Variance = "jacobian",
    full: bool = True,
    **options: Any,
) -> LeaveOneOut:
    r"""The test loss from training data alone: −(1/N) Σ_i log p(y_i | f_i + (λ/N)·V_i e_i).

    Args:
        model: as for :func:`perturb`, like the other arguments.
        posterior: of this model; an IVON posterior at any step of training will do.
        data: training examples: all, or a random part (then pass ``n_train``).
        likelihood: of the loss it was trained with.
        variance: ``"jacobian"`` or ``"samples"``.
        full: the whole matrix V_i, or its diagonal.
        options: those of :func:`perturb`.

    Example:
        >>> import torch
        >>> from posterity import Posterior, leave_one_out
        >>> model = torch.nn.Linear(2, 1)
        >>> mean = dict(model.named_parameters())
        >>> precision = {name: torch.full_like(m, 50.0) for name, m in mean.items()}
        >>> posterior = Posterior(mean, precision)
        >>> x = torch.randn(7, 2)
        >>> found = leave_one_out(model, posterior, (x, x[:, :1]), "gaussian", noise=0.5)
        >>> abs(found.nll - found.per_example.mean().item()) < 1e-5
        True

    Source: Nickl et al. 2023, arXiv 2310.19273; the factor λ/N: Shen et al. 2024, Algorithm 1.
    """
    found = perturb(model, posterior, data, likelihood, variance, full, **options)
    weights = found.count.double()
    nll = (found.left_out.double() * weights).sum() / weights.sum()
    return LeaveOneOut(nll.item(), found.left_out)


def perturb(
    model: nn.Module,
    posterior: Gaussian,
    data: Any,
    likelihood: Likelihood = "categorical",
    variance: Variance = "jacobian",
    full: bool = True,
    *,
    n_train: float | None = None,
    noise: float = 1.0,
    order: Literal[1, 2] = 1,
    samples: int = 64,
    seed: int = 0,
    batch_size: int = 512,
    memory: float = 2**26,
    vectorize: bool = True,
    shifts: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Perturbation:
    r"""Sensitivity and leave-one-out loss of each example at the posterior's mean, in one pass.

    By Jacobians, V_i e_i = J_i(Σ·J_iᵀe_i) costs one backward and one forward-mode pass per example,
    whatever the number of outputs; the diagonal costs a backward pass per output. By samples,
    V_i is the covariance of the outputs over S samples (divided by S−1): S forward passes for any
    architecture, and an error of some 1/√S.

    Args:
        model: its output is logits (examples, …, classes), or an object with ``.logits``; for
            ``bernoulli`` logits, for ``gaussian`` means, of the targets' shape. It runs in eval
            mode, and its own weights are neither used nor touched.
        posterior: a :class:`Posterior` (of a Mixture, a component).
        data: a pair (inputs, targets), a Dataset of pairs, or a loader of pairs or of mappings with
            ``labels``; one that shuffles gives its own order. Inputs: a tensor, or a mapping of the
            model's keyword arguments. Targets: class numbers, -100 to leave one out (of tokens, one
            for each output position, shifted already); 0 or 1 for ``bernoulli``; values for
            ``gaussian``.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        variance: ``"jacobian"`` or ``"samples"``. In 16 bits take Jacobians: a sample's rounding
            would count as variance.
        full: V_i as it is, or its diagonal alone.
        n_train: N, how many the training loss was averaged over; default the number of targets of
            ``data``, of several outputs or tokens an example all of them. The factor λ/N is 1
            where the posterior's ``ess`` is unknown.
        noise: standard deviation of the observations, for ``gaussian``, in the targets' units.
        order: 2 takes the example's curvature out of the posterior too, f + (I − WH)⁻¹W e with
            W = (λ/N)·V_i and H = ∂²ℓ/∂f²: exact for a linear model with Gaussian noise. It forms
            V_i: (outputs × outputs) for each example. Only where no example's leverage, the
            largest eigenvalue of WH, reaches 1; a posterior that is too wide has such.
        samples: S, for ``variance="samples"``; sample s is ``posterior.state(seed, s)``.
        seed: of the stream of samples.
        batch_size: for a pair or a Dataset.
        memory: budget in bytes for the gradients of the examples that are worked on together.
        vectorize: work on several examples together (:func:`torch.func.vmap`); False takes one at
            a time, for models whose control flow depends on the data.
        shifts: keep the moves themselves: memory of all outputs.
        progress: wraps the batches: ``tqdm.tqdm``, ``rich.progress.track``.

    Raises:
        ValueError: the posterior does not fit the model, there are no targets, they do not fit the
            outputs, ``vectorize=True`` cannot run this model, or with ``order=2`` an example's
            leverage is 1 or more.

    Source: Nickl et al. 2023, arXiv 2310.19273.
    """
    loss = _loss(likelihood, noise)
    if variance not in ("jacobian", "samples") or order not in (1, 2):
        raise ValueError("variance is 'jacobian' or 'samples', and order 1 or 2")
    if samples < 2 or not memory > 0:
        raise ValueError(f"needs samples >= 2 and memory > 0, not {samples} and {memory}")
    if isinstance(posterior, Mixture):
        raise ValueError("a mixture has no one mean: pass one of its components")
    mean = placed(model, posterior.mean | copies(posterior.buffers))
    batches = Pairs(data, batch_size)
    if n_train is None and posterior.ess is not None:
        n_train = sum(int(_count(targets, likelihood).sum()) for _, targets in batches)
        if not n_train:
            raise ValueError("there are no targets")
    if n_train is not None and not n_train > 0:
        raise ValueError(f"needs n_train > 0, not {n_train}")
    factor = posterior.ess / n_train if posterior.ess and n_train else 1.0
    form: Form = "matrix" if order == 2 and full else "product" if full else "diagonal"
    if variance == "jacobian":
        variances = partial(linear, model, posterior, mean, form, memory, vectorize)
    else:
        variances = partial(sampled, model, posterior, form, samples, seed)
    scores, losses, counts, moves = [], [], [], []
    with evaluating(model):
        for inputs, targets in (progress or iter)(batches):
            if not len(targets):
                continue
            with torch.no_grad():
                f = floats(call(model, inputs, mean))
            y = _fitting(f, targets, likelihood)
            e = grad(lambda f, y: loss(f, y).sum())(f, y)
            v = variances(inputs, f, e)
            move = v * e if form == "diagonal" else v if form == "product" else times(v, e)
            score = move if full else _slope(f, likelihood) * move
            if likelihood == "categorical":  # outputs that have no target do not count
                score = score.masked_fill((y == IGNORED)[..., None], 0)
            shift = factor * move
            if order == 2:
                w = factor * (v if full else v.reshape(len(v), -1).diag_embed())
                shift = times(without_curvature(w, loss, f, y), e)
            n_targets = _count(y, likelihood)
            scores.append(score.reshape(len(score), -1).norm(2 if full else 1, dim=1))
            losses.append(torch.stack([loss(f, y), loss(f + shift, y)]) / n_targets.clamp(min=1))
            counts.append(n_targets)
            if shifts:
                moves.append(shift)
    if not scores:
        raise ValueError("there are no data")
    if not torch.cat(counts).any():
        raise ValueError("there are no targets")
    moved = torch.cat(moves) if shifts else None
    before, after = torch.cat(losses, 1)
    return Perturbation(torch.cat(scores), before, after, torch.cat(counts), moved)


def without(
    model: nn.Module,
    posterior: Posterior,
    data: Any,
    likelihood: Likelihood = "categorical",
    *,
    n_train: float | None = None,
    noise: float = 1.0,
    batch_size: int = 512,
) -> Posterior:
    r"""The posterior as if these training examples had not been there: m + Σ·(λ/N)·Σ_i ∇ℓ_i(m).

    To first order, so best for few examples or for a question of direction, such as how predictions
    would change if a class were missing. The precision stays.

    Args:
        model: as for :func:`perturb`, like the other arguments.
        posterior: of this model.
        data: the examples to leave out.
        likelihood: of the loss it was trained with.
        n_train: N, the number of targets in training; default the posterior's ``ess``, λ.
        noise: for ``gaussian``.
        batch_size: for a pair or a Dataset.

    Raises:
        ValueError: as :func:`perturb`.

    Example:
        >>> import torch
        >>> from posterity import Posterior
        >>> from posterity.perturbation import without
        >>> model = torch.nn.Linear(2, 3)
        >>> mean = dict(model.named_parameters())
        >>> precision = {name: torch.full_like(m, 50.0) for name, m in mean.items()}
        >>> posterior = Posterior(mean, precision)
        >>> fewer = without(model, posterior, (torch.ones(1, 2), torch.tensor([0])))
        >>> [bool(fewer.mean["bias"][c] < posterior.mean["bias"][c]) for c in range(3)]
        [True, False, False]

    Source: Nickl et al. 2023, arXiv 2310.19273, section 3.
    """
    loss = _loss(likelihood, noise)
    if isinstance(posterior, Mixture):
        raise ValueError("a mixture has no one mean: pass one of its components")
    if n_train is not None and not n_train > 0:
        raise ValueError(f"needs n_train > 0, not {n_train}")
    factor = posterior.ess / n_train if posterior.ess and n_train else 1.0
    mean = placed(model, posterior.mean | copies(posterior.buffers))
    trained, fixed = divided(mean, posterior)
    wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in trained.items()}
    total = {name: torch.zeros_like(p, dtype=wide[name]) for name, p in trained.items()}
    seen = 0
    with evaluating(model):
        for inputs, targets in Pairs(data, batch_size):
            if not len(targets):
                continue
            seen += int(_count(targets, likelihood).sum())

            def summed(weights: Tensors, inputs: Any = inputs, targets: Tensor = targets) -> Tensor:
                f = floats(call(model, inputs, weights | fixed))
                return loss(f, _fitting(f, targets, likelihood)).sum()

            for name, g in grad(summed)(trained).items():
                total[name] += g
    if not seen:
        raise ValueError("there are no targets")
    move = posterior.covariance({clean_name(name): g for name, g in total.items()})
    mean = {n: m + factor * move[n].to(m) for n, m in posterior.mean.items()}
    return posterior._but(mean=mean)


class Grouped(NamedTuple):
    """For each group, in ascending order: its number, mean score, standard error, and size."""

    group: Tensor
    mean: Tensor
    error: Tensor
    count: Tensor


def grouped(scores: Tensor, groups: Tensor) -> Grouped:
    """Mean sensitivity by class, annotator, source …: what if such a group were missing.

    Args:
        scores: (examples,).
        groups: (examples,) whole numbers.

    >>> grouped(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2])).mean.tolist()
    [5.0, 2.0]

    Source: Shen et al. 2024, arXiv 2402.17641, section 4.5.
    """
    if scores.shape != groups.shape or scores.dim() != 1:
        raise ValueError(f"scores {tuple(scores.shape)} and groups {tuple(groups.shape)} differ")
    group, which, count = groups.unique(return_inverse=True, return_counts=True)
    wide = scores.double()
    mean = torch.bincount(which, wide) / count
    variance = torch.bincount(which, (wide - mean[which]) ** 2) / (count - 1)
    return Grouped(group, mean, (variance / count).sqrt(), count)


def _categorical(f: Tensor, y: Tensor, noise: float) -> Tensor:
    each = cross_entropy(f.flatten(0, -2), y.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(len(f), -1).sum(1)


def _bernoulli(f: Tensor, y: Tensor, noise: float) -> Tensor:
    each = binary_cross_entropy_with_logits(f, y.to(f), reduction="none")
    return each.reshape(len(f), -1).sum(1)


def _gaussian(f: Tensor, y: Tensor, noise: float) -> Tensor:
    each = ((f - y) / noise) ** 2 / 2 + math.log(noise * math.sqrt(2 * math.pi))
    return each.reshape(len(f), -1).sum(1)


LOSSES = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}  # (examples,)


def _count(y: Tensor, likelihood: Likelihood) -> Tensor:
    """How many targets each example has."""
    if likelihood == "categorical":
        here = y.long() != IGNORED  # as whole numbers: small unsigned ones would wrap
    else:
        here = torch.ones_like(y, dtype=torch.bool)
    return here.view(len(y), y[:1].numel()).sum(1)


def _slope(f: Tensor, likelihood: Likelihood) -> Tensor:
    """The derivative of the inverse link."""
    if likelihood == "gaussian":
        return torch.ones_like(f)
    p = f.softmax(-1) if likelihood == "categorical" else f.sigmoid()
    return p * (1 - p)


def _loss(likelihood: str, noise: float) -> Callable[[Tensor, Tensor], Tensor]:
    if likelihood not in LOSSES:
        raise ValueError(f"unknown likelihood {likelihood!r}: there are {', '.join(LOSSES)}")
    if not noise > 0:
        raise ValueError(f"noise must be positive, not {noise}")
    return partial(LOSSES[likelihood], noise=noise)


def _fitting(f: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """The targets on the outputs' device, if they are targets of these outputs."""
    y = y.to(f.device)
    needed = f.shape[:-1] if likelihood == "categorical" else f.shape
    if y.shape != needed:
        raise ValueError(
            f"targets {tuple(y.shape)} do not fit outputs {tuple(f.shape)}: {likelihood} needs "
            f"{tuple(needed)}"
        )
    if likelihood == "categorical":
        whole, y = not y.is_floating_point(), y.long()
        if not whole or ((y < 0) & (y != IGNORED) | (y >= f.shape[-1])).any():
            raise ValueError(
                f"targets must be whole numbers in [0, {f.shape[-1] - 1}] or {IGNORED}"
            )
    elif likelihood == "bernoulli" and not ((y >= 0) & (y <= 1)).all():
        raise ValueError("bernoulli targets must be in [0, 1]")
    return y
