"""Bayesian model averaging: predictions averaged over samples of the posterior (docs/maths.md)."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from . import distributed as ranks
from .binding import Samples, call, evaluating, floats, items, placed

Likelihood = Literal["categorical", "bernoulli", "gaussian"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What :func:`predict` returns: one row per example, in the data's order.

    ``variance`` is the variance over the samples (divided by their number) of the probabilities,
    shaped as ``probs``; for ``gaussian`` it is the total variance Var_s[μ_s] + mean_s[noise²_s],
    in the targets' units squared, and ``noise_variance`` its second term.

    ``probs`` and ``log_probs`` end in a dimension of classes for ``categorical``; for ``bernoulli``
    they are P(y=1), shaped as the model's output. An attribute that the likelihood does not have
    raises an AttributeError that says so.
    """

    likelihood: Likelihood
    samples: int
    variance: Tensor
    _log_probs: Tensor | None = None  # the last dimension is classes: two for bernoulli
    _mutual_information: Tensor | None = None
    _mean: Tensor | None = None
    _noise_variance: Tensor | None = None

    def _of(self, name: str) -> Tensor:
        value: Tensor | None = getattr(self, f"_{name}")
        if value is None:
            raise AttributeError(f"a {self.likelihood} prediction has no {name}")
        return value

    @property
    def log_probs(self) -> Tensor:
        """log p̄(y|x) in nats: it does not underflow where ``probs`` does."""
        log_probs = self._of("log_probs")
        return log_probs[..., 1] if self.likelihood == "bernoulli" else log_probs

    @property
    def probs(self) -> Tensor:
        """p̄(y|x)."""
        return self.log_probs.exp()

    @property
    def entropy(self) -> Tensor:
        """H[p̄] in nats, without the dimension of classes: the total uncertainty."""
        return entropy(self._of("log_probs").exp())

    @property
    def mutual_information(self) -> Tensor:
        """H[mean_s p_s] − mean_s H[p_s] ≥ 0 in nats: the part of the entropy that data can reduce.

        Source: Houlsby et al. 2011, arXiv 1112.5745.
        """
        return self._of("mutual_information")

    @property
    def labels(self) -> Tensor:
        """The most probable class."""
        return self._of("log_probs").argmax(-1)

    @property
    def mean(self) -> Tensor:
        """mean_s μ_s, for ``gaussian``."""
        return self._of("mean")

    @property
    def noise_variance(self) -> Tensor:
        """mean_s noise²_s, for ``gaussian``: what no data can reduce."""
        return self._of("noise_variance")


def predict(
    model: nn.Module,
    posterior: Samples | None,
    data: Any,
    samples: int = 64,
    average: Literal["probs", "logits"] = "probs",
    likelihood: Likelihood = "categorical",
    seed: int = 0,
    *,
    batch_size: int = 512,
    noise: float | Tensor | None = None,
    functional: bool = False,
    distributed: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Prediction:
    r"""Average a model's predictions over posterior samples: p̄(y|x) = (1/S) Σ_s p(y|x, θ_s).

    Args:
        model: its output is logits (…, classes), for example (examples, tokens, vocabulary), or an
            object with ``.logits``; for ``bernoulli`` logits of any shape; for ``gaussian`` the
            mean, or a tuple (mean, log noise variance). Runs in eval mode, without gradients.
        posterior: a Posterior, a Mixture (``samples`` is its total), or None for the model as it
            stands: one pass.
        data: a tensor; a mapping of tensors (the model's keyword arguments); a pair, of either and
            targets; a Dataset; or a loader of batches of either, or of (inputs, targets).
            Targets are ignored; batches are moved to the model's device.
        samples: S; sample s is ``posterior.sample(seed, s)``.
        average: ``"probs"``, or ``"logits"``: the mean of log-probabilities, normalised.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        seed: of the stream of samples.
        batch_size: for a tensor, a mapping or a Dataset.
        noise: standard deviation of the observation noise, for ``gaussian`` models that do not
            return it; 0 leaves the variance over the samples alone. In the targets' units.
        functional: never write to the model (``torch.func.functional_call`` on a structural copy
            that shares its tensors), so that several threads can predict with one model.
        distributed: every rank of the process group calls this with the same arguments and data,
            draws its own part of the samples, and returns the whole's prediction.
        progress: wraps the range of samples: ``tqdm.tqdm``, ``rich.progress.track``.

    Memory does not grow with S. A loader is traversed once per sample, so it must not shuffle; a
    one-shot iterator is kept as a list. Infinities and NaNs are not masked.

    Raises:
        ValueError: the posterior does not fit the model, the data are empty or change between
            traversals, arguments contradict each other.

    Example:
        >>> import torch
        >>> from posterity import Posterior, predict
        >>> model = torch.nn.Linear(2, 3)
        >>> mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> precision = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> prediction = predict(model, Posterior(mean, precision), torch.randn(5, 2), samples=8)
        >>> prediction.probs.shape, prediction.entropy.shape
        (torch.Size([5, 3]), torch.Size([5]))

    Source: Shen et al. 2024, arXiv 2402.17641, section 4.2.
    """
    _check(model, posterior, data)
    if likelihood not in ("categorical", "bernoulli", "gaussian"):
        raise ValueError(f"unknown likelihood {likelihood!r}")
    if average not in ("probs", "logits") or (average == "logits" and likelihood == "gaussian"):
        raise ValueError(f"average={average!r} does not exist for {likelihood}")
    if noise is not None and likelihood != "gaussian":
        raise ValueError(f"a {likelihood} likelihood has no noise")
    if samples < 1:
        raise ValueError(
            f"needs at least one sample, not {samples}; posterior=None takes the model as it is"
        )
    samples = 1 if posterior is None else samples
    shared = distributed and posterior is not None and not ranks.alone()
    if shared and samples < ranks.world():
        raise ValueError(f"{samples} samples cannot be divided among {ranks.world()} ranks")
    mine = range(samples)[ranks.rank() :: ranks.world()] if shared else range(samples)
    model = _skeleton(model) if functional else model
    batches = _batches(data, batch_size)
    make = partial(_Classes, likelihood == "bernoulli", average)
    if likelihood == "gaussian":
        make = partial(_Gaussian, noise)
    totals: list[_Classes | _Gaussian] = []  # one running total for each batch
    with evaluating(model), torch.no_grad():
        for index in (progress or iter)(mine):
            with _sampled(model, posterior, seed, index, functional) as forward:
                for number, batch in enumerate(batches):
                    if index == mine[0]:
                        totals.append(make())
                    totals[number].add(forward(batch))
    if not any(len(running) for running in totals):
        raise ValueError("there are no data")
    if shared:
        _agree(batches)
        for running in totals:
            running.merge()
    return Prediction(likelihood, samples, **_joined([total.result() for total in totals]))


class _Running:
    """Mean and variance of a stream of tensors (Welford): memory of two."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.spread = torch.zeros(())

    def add(self, x: Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.mean, self.spread = x.clone(), torch.zeros_like(x)
            return
        before = x - self.mean
        self.mean += before / self.count
        self.spread += before.mul_(x - self.mean)

    def merge(self) -> None:
        """Take up what the other ranks have seen (Chan et al. 1979)."""
        count, seen = self.count, ranks.total(self.mean.new_tensor(float(self.count)))
        mean = ranks.total(self.mean * (count / seen))
        self.spread = ranks.total(self.spread + count * (self.mean - mean) ** 2)
        self.mean, self.count = mean, int(seen)

    @property
    def variance(self) -> Tensor:
        return self.spread / self.count


def _check(model: Any, posterior: Any, data: Any) -> None:
    """Raise TypeError for what is no module, posterior or data; warn of lacking statistics."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"predict(model, posterior, data): the model is a {type(model).__name__}")
    if posterior is not None and not hasattr(posterior, "sampled"):
        raise TypeError(
            f"the posterior is a {type(posterior).__name__}: Posterior.load(path) reads one, "
            "opt.posterior(model) makes one, and None takes the model as it is"
        )
    if type(data).__module__ == "numpy":
        raise TypeError("the data are numpy's: pass torch.from_numpy(x)")
    if getattr(posterior, "buffers", None) != {}:
        return  # they came along, or there is no posterior
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    fresh = [n for n, m in norms if m.running_var is not None and (m.running_var == 1).all()]
    if fresh:
        warnings.warn(
            f"neither model nor posterior has running statistics of {fresh[0]}: make the posterior "
            "by opt.posterior(model), or call update_bn",
            stacklevel=3,
        )


class _Classes:
    """Running totals of one batch's class probabilities."""

    def __init__(self, bernoulli: bool, average: str):
        self.bernoulli = bernoulli
        self.join = torch.logaddexp if average == "probs" else torch.add
        self.probs, self.entropy = _Running(), _Running()
        self.total: Tensor | None = None

    def add(self, output: Any) -> None:
        logits = floats(output)
        if logits.dim() < 2 - self.bernoulli:
            raise ValueError(
                f"the model gave {tuple(logits.shape)}, not (examples, …): the data's first "
                "dimension is that of examples, x[None] for one"
            )
        if self.bernoulli:
            log_probs = torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1)
        elif logits.shape[-1] > 1:
            log_probs = log_softmax(logits, -1)
        else:
            raise ValueError("one class only: for a single logit use likelihood='bernoulli'")
        probs = log_probs.exp()
        self.probs.add(probs)
        self.entropy.add(entropy(probs))
        self.total = log_probs if self.total is None else self.join(self.total, log_probs)

    def __len__(self) -> int:
        return len(self.probs.mean)

    def merge(self) -> None:
        """Take up what the other ranks have seen."""
        assert self.total is not None
        self.probs.merge()
        self.entropy.merge()
        if self.join is torch.add:
            self.total = ranks.total(self.total)
        else:  # the logarithm of a sum of exponentials
            high = ranks.largest(self.total).nan_to_num(neginf=0.0)
            self.total = high + ranks.total((self.total - high).exp()).log()

    def result(self) -> dict[str, Tensor]:
        assert self.total is not None
        if self.join is torch.add:
            self.total /= self.probs.count
        information = entropy(self.probs.mean) - self.entropy.mean
        variance = self.probs.variance
        return {
            "_log_probs": log_softmax(self.total, -1),  # of sums over samples: also divides by S
            "_mutual_information": information.clamp_(min=0),  # rounding alone makes it negative
            "variance": variance[..., 1] if self.bernoulli else variance,
        }


class _Gaussian:
    """Running totals of one batch's means and noise variances."""

    def __init__(self, noise: float | Tensor | None):
        self.noise = noise
        self.location, self.noises = _Running(), _Running()

    def add(self, output: Any) -> None:
        if isinstance(output, tuple) == (self.noise is not None):
            raise ValueError(
                "a gaussian likelihood needs either noise=… (0 for the variance over the samples "
                "alone) or a model that returns (mean, log noise variance)"
            )
        if isinstance(output, tuple):
            mean, noise_variance = floats(output[0]), floats(output[1]).exp()
        else:
            mean = floats(output)
            noise_variance = torch.as_tensor(self.noise, dtype=mean.dtype, device=mean.device) ** 2
        self.location.add(mean)
        self.noises.add(noise_variance.expand_as(mean))

    def __len__(self) -> int:
        return len(self.location.mean)

    def merge(self) -> None:
        """Take up what the other ranks have seen."""
        self.location.merge()
        self.noises.merge()

    def result(self) -> dict[str, Tensor]:
        return {
            "_mean": self.location.mean,
            "_noise_variance": self.noises.mean,
            "variance": self.location.variance + self.noises.mean,
        }


def entropy(probs: Tensor) -> Tensor:
    """−Σ_c p_c log p_c in nats, (…, classes) → (…)."""
    return torch.special.entr(probs).sum(-1)


def _joined(results: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The batches' results, one after another."""
    shapes = {tuple(result["variance"].shape[1:]) for result in results}
    if len(shapes) > 1:
        raise ValueError(
            f"batches differ in more than length: {shapes}; pad them, or call for each"
        )
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


@contextmanager
def _sampled(
    model: nn.Module, posterior: Samples | None, seed: int, index: int, functional: bool
) -> Iterator[Callable[[Any], Any]]:
    """The forward pass of one sample, as a function of a batch."""
    if posterior is None:
        yield partial(call, model)
    elif functional:
        yield partial(call, model, state=placed(model, posterior.state(seed, index)))
    else:
        with posterior.sampled(model, seed, index):
            yield partial(call, model)


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares parameters and buffers.

    ``functional_call`` swaps tensors inside the modules while it runs: they must be one's own.
    """
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def _batches(data: Any, size: int) -> Iterable[Any]:
    """Batches of inputs that can be traversed again and again."""
    if isinstance(data, Dataset):
        data = DataLoader(data, size)
    elif isinstance(data, tuple):
        data = data[0]
    if isinstance(data, Tensor):
        return data.split(size)
    if isinstance(data, Mapping):
        odd = [name for name, value in data.items() if not isinstance(value, Tensor)]
        if odd or len({len(value) for value in data.values()}) != 1:
            raise ValueError(f"a mapping must hold tensors of one length {odd or ''}")
        parts = [[(name, part) for part in value.split(size)] for name, value in data.items()]
        return [dict(batch) for batch in zip(*parts, strict=True)]
    inputs = _Inputs(data)
    return list(inputs) if iter(data) is data else inputs


class _Inputs:
    """The inputs of a loader, the same in every traversal: totals of others would be mixed up."""

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self.first: list[int] | None = None  # fingerprints of the first traversal

    def __iter__(self) -> Iterator[Any]:
        prints: list[int] = []
        for batch in self.loader:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            prints.append(_fingerprint(inputs))
            self._compare(prints[-1:], slice(len(prints) - 1, len(prints)))
            yield inputs
        self._compare(prints, slice(None))
        self.first = prints

    def _compare(self, prints: list[int], where: slice) -> None:
        if self.first is not None and prints != self.first[where]:
            raise ValueError(
                "the data changed between two traversals: a loader must neither shuffle nor "
                "augment at random here"
            )


def _agree(batches: Iterable[Any]) -> None:
    """Raise ValueError where ranks predict other data: their totals would be mixed up."""
    known = batches.first if isinstance(batches, _Inputs) else [*map(_fingerprint, batches)]
    mine = torch.tensor([float(zlib.crc32(repr(known).encode()))], dtype=torch.float64)
    if not torch.equal(ranks.largest(mine), -ranks.largest(-mine)):
        raise ValueError(
            "distributed=True divides the samples: every rank must pass all the data, not its part"
        )


def _fingerprint(inputs: Any) -> int:
    """A checksum of the values, in order."""
    total = 0
    for _, value in items(inputs):
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            total = zlib.crc32(flat.view(torch.uint8).numpy().data, total)
    return total
