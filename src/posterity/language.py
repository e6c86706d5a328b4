r"""Language models under a posterior: perplexity, generation and decoding, token by token.

A model is anything that maps tokens (batch, tokens) to logits (batch, tokens, vocabulary), or to an
object with ``.logits``: position t scores token t + 1. The shift is made here, and what is returned
stands where its token stands.

Source: Shen et al. 2024, arXiv 2402.17641; Daheim et al. 2025, arXiv 2503.05318.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad
from torch.utils.data import DataLoader, Dataset

from .batches import Pairs
from .binding import Samples, call, evaluating, floats, placed
from .metrics import IGNORED

__all__ = [
    "Choice",
    "Generation",
    "Perplexity",
    "candidates",
    "generate",
    "mbr",
    "perplexity",
    "token_f1",
]

CACHES = ("cache", "past_key_values")  # transformers' newer and older name of it


@dataclass(frozen=True, eq=False)
class Perplexity:
    """What :func:`perplexity` returns: a row per sequence, in the data's order, in nats.

    ``per_token``: log p̄(token | those before it). ``entropy``: H[p̄] of that prediction.
    ``mutual_information``: H[p̄] − mean_s H[p_s], the part of it that data can reduce. Each is
    (sequences, tokens), and NaN where ``scored`` is false: the first token, ignored ones, padding.
    ``per_sequence``: log (1/S) Σ_s Π_t p_s(token t), (sequences,): whole sequences averaged.
    """

    per_token: Tensor
    per_sequence: Tensor
    entropy: Tensor
    mutual_information: Tensor
    scored: Tensor

    @property
    def nll(self) -> float:
        """Mean −log p̄ over all scored tokens, in nats per token (summed in float64)."""
        return -self.per_token[self.scored].double().mean().item()

    @property
    def perplexity(self) -> float:
        """exp of the ``nll``; infinite where that overflows."""
        return torch.tensor(self.nll, dtype=torch.float64).exp().item()


def perplexity(
    model: nn.Module,
    posterior: Samples | None,
    data: Any,
    samples: int = 16,
    seed: int = 0,
    *,
    batch_size: int = 16,
    ignore_index: int = IGNORED,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Perplexity:
    r"""Likelihood of each token under the averaged model: log (1/S) Σ_s p(token | context, θ_s).

    Args:
        model: a causal language model. Runs in eval mode, without gradients.
        posterior: a Posterior, a Mixture (``samples`` is its total), or None for the model as it
            stands.
        data: tokens (sequences, tokens); a mapping of the model's keyword arguments with
            ``input_ids``, maybe ``attention_mask`` and ``labels`` (not shifted, as Hugging Face's);
            a pair, of either and labels; a Dataset; or batches of any of these, whose lengths may
            differ. Without labels the tokens themselves are scored.
        samples: S; sample s is ``posterior.sample(seed, s)``.
        seed: of the stream of samples.
        batch_size: sequences at a time, where ``data`` is not in batches.
        ignore_index: the label that is not scored. A token that ``attention_mask`` hides is not
            scored either, nor is the first one after hidden ones.
        progress: wraps the batches: ``tqdm.tqdm``, ``rich.progress.track``.

    The samples take turns at each batch, which is seen once: memory is that of one batch, some
    five times its logits. The price is S draws a batch, little beside the forward passes of
    hundreds of tokens.

    Raises:
        ValueError: the posterior does not fit the model, there is nothing to score, labels and
            tokens differ in shape, or a label is outside of the vocabulary.

    Example:
        >>> import torch
        >>> from posterity import Posterior
        >>> from posterity.language import perplexity
        >>> model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
        >>> mean = {name: p.detach() for name, p in model.named_parameters()}
        >>> posterior = Posterior(mean, {name: torch.ones_like(m) for name, m in mean.items()})
        >>> found = perplexity(model, posterior, torch.randint(7, (3, 12)), samples=4)
        >>> found.per_token.shape, int(found.scored.sum())
        (torch.Size([3, 12]), 33)

    Source: Shen et al. 2024, arXiv 2402.17641, section 4.1.
    """
    samples = _number(posterior, samples)
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size)
    elif isinstance(data, (Tensor, Mapping, tuple)):
        data = Pairs(_labelled(data), batch_size)
    found: list[_Scores] = []
    with evaluating(model), torch.no_grad():
        for batch in (progress or iter)(data):
            inputs, labels = _labelled(batch)
            scores = _Scores(labels, _scored(inputs, labels, ignore_index))
            for index in range(samples):
                with _holding(model, posterior, seed, index):
                    scores.add(floats(call(model, inputs)))
            scores.forget()
            found.append(scores)
    if not any(scores.scored.any() for scores in found):
        raise ValueError("there are no tokens to score: needs two or more in a sequence")
    return _joined(found)


def _joined(found: Sequence[_Scores]) -> Perplexity:
    """The batches' results, one after another, the shorter ones filled up at the end."""
    longest = max(scores.scored.shape[1] for scores in found)

    def rows(values: Iterable[Tensor], fill: float) -> Tensor:
        return torch.cat([pad(v, (1, longest - v.shape[1]), value=fill) for v in values])

    return Perplexity(
        per_sequence=torch.cat([s.sequences for s in found]),
        per_token=rows((s.tokens for s in found), math.nan),
        entropy=rows((s.entropy for s in found), math.nan),
        mutual_information=rows((s.mutual_information for s in found), math.nan),
        scored=rows((s.scored for s in found), False),
    )


class _Average:
    """Running totals over samples: class probabilities, and their entropies."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.entropies = torch.zeros(())

    def add(self, log_probs: Tensor) -> None:
        """One sample's log-probabilities (…, classes)."""
        probs = log_probs.exp()
        self.count += 1
        self.entropies = _entropy(probs) + self.entropies
        self.total = probs.add_(self.total)

    @property
    def probs(self) -> Tensor:
        """p̄, the mean over the samples."""
        return self.total / self.count

    def uncertainty(self) -> tuple[Tensor, Tensor]:
        """H[p̄] and H[p̄] − mean_s H[p_s], in nats."""
        entropy = _entropy(self.probs)
        return entropy, (entropy - self.entropies / self.count).clamp_(min=0)


class _Scores:
    """Running totals of one batch: what its samples say of its labels, without the first."""

    def __init__(self, labels: Tensor, scored: Tensor):
        self.labels, self.scored = labels[:, 1:], scored[:, 1:]
        self.average = _Average()
        self.tokens = self.sequences = torch.tensor(-math.inf)  # the logarithm of nothing

    def add(self, logits: Tensor) -> None:
        """One sample's logits, (batch, tokens, vocabulary)."""
        if logits.dim() != 3 or logits.shape[1] != self.labels.shape[1] + 1:
            raise ValueError(
                f"the model gave {tuple(logits.shape)}, not (batch, tokens, vocabulary) for labels "
                f"of {self.labels.shape[1] + 1} tokens"
            )
        log_probs = log_softmax(logits[:, :-1], -1)
        if not self.average.count:
            self.scored = self.scored.to(logits.device)
            self.labels = self.labels.to(logits.device).long().masked_fill(~self.scored, 0)
            if not ((self.labels >= 0) & (self.labels < logits.shape[-1])).all():
                raise ValueError(f"labels must be in [0, {logits.shape[-1] - 1}], or ignored")
        each = log_probs.gather(-1, self.labels[..., None])[..., 0].masked_fill(~self.scored, 0)
        self.tokens = torch.logaddexp(each, self.tokens.to(each))
        self.sequences = torch.logaddexp(each.sum(-1), self.sequences.to(each))
        self.average.add(log_probs)

    def forget(self) -> None:
        """Divide by the number of samples, and keep nothing of the vocabulary's size."""
        less = math.log(self.average.count)
        self.sequences = self.sequences - less
        self.tokens, self.entropy, self.mutual_information = (
            values.masked_fill(~self.scored, math.nan)
            for values in (self.tokens - less, *self.average.uncertainty())
        )
        del self.average


@dataclass(frozen=True, eq=False)
class Generation:
    """What :func:`generate` returns, (batch, new tokens) each; values in nats.

    ``log_probs``: log p̄ of each token, before any temperature. ``entropy`` and
    ``mutual_information``: of the distribution it was taken from, as in :class:`Perplexity`. After
    the ``stop`` token a row goes on with ``stop``, and NaN.
    """

    tokens: Tensor
    log_probs: Tensor
    entropy: Tensor
    mutual_information: Tensor


def generate(
    model: nn.Module,
    posterior: Samples | None,
    prompt: Tensor | Mapping[str, Tensor],
    max_new_tokens: int,
    samples: int = 8,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    cache: bool | None = None,
    keep: bool = True,
) -> Generation:
    r"""Generate from the averaged model: each token from p̄ = (1/S) Σ_s p(· | context, θ_s).

    Args:
        model: a causal language model. Runs in eval mode, without gradients.
        posterior: a Posterior, a Mixture, or None for the model as it stands.
        prompt: tokens (batch, tokens), or a mapping of ``input_ids`` and ``attention_mask``.
            Padding belongs on the left; the model is then told ``position_ids`` too.
        max_new_tokens: how many, at most.
        samples: S; sample s is ``posterior.sample(seed, s)``, the same for every token.
        temperature: 0 takes the most probable token; otherwise it is drawn from p̄^(1/temperature).
        seed: of the stream of weight samples.
        generator: that draws the tokens; default one on the CPU, from ``seed``.
        stop: the token that ends a sequence; it is returned, too.
        cache: keep the keys and values of each sample as Hugging Face's models do, so that a step
            reads one token only; default: if the model's ``config.use_cache`` says so.
        keep: hold the S samples in memory, S times the posterior's size (of an adapter: little).
            False draws each sample again for each token: some twenty times the forward pass over
            one token.

    A token costs S forward passes, and a cache S times its memory.

    Raises:
        ValueError: the posterior does not fit the model, the prompt is empty or padded on the
            right, or ``cache=True`` of a model that returns none.

    Example:
        >>> import torch
        >>> from posterity import Posterior
        >>> from posterity.language import generate
        >>> model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
        >>> mean = {name: p.detach() for name, p in model.named_parameters()}
        >>> posterior = Posterior(mean, {name: torch.ones_like(m) for name, m in mean.items()})
        >>> found = generate(model, posterior, torch.tensor([[1, 2, 3]]), max_new_tokens=5)
        >>> found.tokens.shape, found.mutual_information.shape
        (torch.Size([1, 5]), torch.Size([1, 5]))

    Source: Daheim et al. 2025, arXiv 2503.05318 (averaging at the level of tokens).
    """
    samples = _number(posterior, samples)
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError("needs max_new_tokens of 1 or more, and a temperature of 0 or more")
    reader = _Reader(model, prompt, samples, cache)
    generator = generator or torch.Generator().manual_seed(seed)
    steps: list[tuple[Tensor, ...]] = []
    with evaluating(model), torch.no_grad():
        forwards = _forwards(model, posterior, samples, seed, keep)
        done = torch.zeros(len(reader.tokens), dtype=torch.bool)
        for _ in range(max_new_tokens):
            average = _Average()
            for index, forward in enumerate(forwards):
                average.add(log_softmax(reader.read(index, forward), -1))
            probs = average.probs
            if temperature:
                weights = (probs.log() / temperature).softmax(-1).to(generator.device)
                token = torch.multinomial(weights, 1, generator=generator)[:, 0].to(probs.device)
            else:
                token = probs.argmax(-1)
            values = probs.gather(-1, token[:, None])[:, 0].log(), *average.uncertainty()
            if stop is not None:
                done = done.to(probs.device)
                values = [value.masked_fill(done, math.nan) for value in values]
                token = token.masked_fill(done, stop)
                done = done | (token == stop)
            steps.append((token, *values))
            if done.all():
                break
            reader.append(token)
    return Generation(*(torch.stack(column, 1) for column in zip(*steps, strict=True)))


class _Reader:
    """The tokens so far, and what each sample has read of them."""

    def __init__(
        self,
        model: nn.Module,
        prompt: Tensor | Mapping[str, Tensor],
        samples: int,
        cache: bool | None,
    ):
        self.named = isinstance(prompt, Mapping)
        inputs = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
        if "input_ids" not in inputs or inputs.keys() - {"input_ids", "attention_mask"}:
            raise ValueError("a prompt is a tensor, or input_ids and attention_mask by name")
        self.tokens, self.mask = inputs["input_ids"], inputs.get("attention_mask")
        if self.tokens.dim() != 2 or not self.tokens.numel():
            raise ValueError(f"a prompt needs (batch, tokens), not {tuple(self.tokens.shape)}")
        self.padded = self.mask is not None and not bool(self.mask.all())
        if self.mask is not None and not bool(self.mask[:, -1].all()):
            raise ValueError("the prompts are padded on the right: pad them on the left")
        self.new = self.tokens
        use = getattr(getattr(model, "config", None), "use_cache", False)
        self.caching = bool(use) if cache is None else cache
        self.caches: list[dict[str, Any]] = [{} for _ in range(samples)]

    def read(self, index: int, forward: Callable[[Any], Any]) -> Tensor:
        """Sample ``index``'s logits of the next token, (batch, vocabulary)."""
        new = self.new if self.caching else self.tokens
        batch: dict[str, Any] = {"input_ids": new}
        if self.mask is not None:
            batch["attention_mask"] = self.mask
        if self.mask is not None and self.padded:
            places = self.mask.long().cumsum(-1) - 1
            batch["position_ids"] = places.clamp(min=0)[:, -new.shape[1] :]
        if self.caching:
            batch |= {"use_cache": True, **self.caches[index]}
        output = forward(batch if self.named or self.caching else new)
        if self.caching:
            found = {name: getattr(output, name, None) for name in CACHES}
            self.caches[index] = dict([(n, c) for n, c in found.items() if c is not None][:1])
            if not self.caches[index]:
                raise ValueError("the model returned no cache of keys and values: pass cache=False")
        return floats(getattr(output, "logits", output)[:, -1])

    def append(self, token: Tensor) -> None:
        """The next token of each row."""
        self.new = token[:, None].to(self.tokens)
        self.tokens = torch.cat([self.tokens, self.new], 1)
        if self.mask is not None:
            self.mask = pad(self.mask, (0, 1), value=1)


def candidates(
    model: nn.Module,
    posterior: Samples | None,
    prompt: Tensor | Mapping[str, Tensor],
    max_new_tokens: int,
    per_sample: int = 1,
    samples: int = 8,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    cache: bool | None = None,
) -> list[list[int]]:
    """Continuations of one prompt for :func:`mbr`, ``per_sample`` by each of S weight samples.

    Each sequence is written by one sample from first to last token, so the candidates also differ
    in what the samples believe. Arguments as for :func:`generate`; the prompt is (1, tokens). It
    costs per_sample·S sequences, ``per_sample`` at a time.

    Returns:
        Token numbers up to ``stop`` (left out), those of sample 0 first.

    Raises:
        ValueError: as :func:`generate`, or there are several prompts.
    """
    samples = _number(posterior, samples)
    inputs = prompt if isinstance(prompt, Mapping) else {"": prompt}
    if per_sample < 1 or any(len(value) != 1 for value in inputs.values()):
        raise ValueError("needs one prompt, (1, tokens), and per_sample of 1 or more")
    copies = {name: value.expand(per_sample, -1) for name, value in inputs.items()}
    generator = generator or torch.Generator().manual_seed(seed)
    how = {"temperature": temperature, "generator": generator, "stop": stop, "cache": cache}
    found: list[list[int]] = []
    for index in range(samples):
        with _holding(model, posterior, seed, index):
            written = generate(model, None, copies.get("", copies), max_new_tokens, **how)
        found += [row[: row.index(stop)] if stop in row else row for row in written.tokens.tolist()]
    return found


class Choice(NamedTuple):
    """``best``: the candidate of the highest expected utility; ``index``; ``utility``: of each."""

    best: Any
    index: int
    utility: Tensor


def token_f1(a: Sequence[Any] | str, b: Sequence[Any] | str) -> float:
    """F1 of the tokens that two sequences share, in any order; strings are split at spaces.

    >>> token_f1("the cat sat", "the cat ran")
    0.6666666666666666
    """
    first, second = (Counter(x.split() if isinstance(x, str) else x) for x in (a, b))
    both = first.total() + second.total()
    return 2 * (first & second).total() / both if both else 1.0


def mbr(
    candidates: Sequence[Any],
    utility: Callable[[Any, Any], float] = token_f1,
    weights: Sequence[float] | None = None,
) -> Choice:
    r"""Minimum-Bayes-risk decoding: argmax_i Σ_j w_j u(y_i, y_j) over all candidates.

    The candidate that agrees best with what the posterior's samples wrote (averaging at the level
    of sequences). Its own term is in the sum, which changes nothing where weights and u(y, y) are
    equal. Of equals, the first.

    Args:
        candidates: n sequences or texts, as from :func:`candidates`.
        utility: u(candidate, reference), higher is better; called n² times.
        weights: w, of the samples that wrote them; default equal. Normalised here.

    Raises:
        ValueError: no candidates, or weights that are negative, all zero, or of another number.

    Example:
        >>> from posterity.language import mbr
        >>> mbr(["a cat sat", "the cat sat", "the cat ran", "no"]).best
        'the cat sat'

    Source: Daheim et al. 2025, arXiv 2503.05318; Eikema & Aziz 2020, arXiv 2005.10283.
    """
    if not candidates:
        raise ValueError("there are no candidates")
    each = torch.tensor(weights or [1.0] * len(candidates), dtype=torch.float64)
    if len(each) != len(candidates) or not (each >= 0).all() or not 0 < each.sum() < math.inf:
        raise ValueError(f"needs {len(candidates)} weights, none negative, not all zero")
    table = [[float(utility(a, b)) for b in candidates] for a in candidates]
    expected = torch.tensor(table, dtype=torch.float64) @ (each / each.sum())
    index = int(expected.argmax())
    return Choice(candidates[index], index, expected)


def _number(posterior: Samples | None, samples: int) -> int:
    if samples < 1:
        raise ValueError(f"needs at least one sample, not {samples}")
    return 1 if posterior is None else samples


def _holding(
    model: nn.Module, posterior: Samples | None, seed: int, index: int
) -> AbstractContextManager[Any]:
    """A context in which the model holds sample ``index``."""
    return nullcontext() if posterior is None else posterior.sampled(model, seed, index)


def _forwards(
    model: nn.Module, posterior: Samples | None, samples: int, seed: int, keep: bool
) -> list[Callable[[Any], Any]]:
    """The forward pass of each sample, as a function of a batch."""

    def written(batch: Any, index: int) -> Any:
        with _holding(model, posterior, seed, index):
            return call(model, batch)

    if posterior is None or not keep:
        return [partial(written, index=index) for index in range(samples)]
    states = (placed(model, posterior.state(seed, index)) for index in range(samples))
    return [partial(call, model, state=state) for state in states]


def _labelled(batch: Any) -> tuple[Any, Tensor]:
    """What the model is given, and the labels; without any, the tokens themselves."""
    inputs, labels = batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        inputs, labels = batch[0], batch[-1] if len(batch) == 2 else None
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
        own = inputs.pop("labels", None)
        labels = own if labels is None else labels
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise ValueError("needs tokens (sequences, tokens), or a mapping with input_ids")
    labels = tokens if labels is None else labels
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
        raise ValueError(f"labels must be shaped as the tokens, {tuple(tokens.shape)}")
    return inputs, labels


def _scored(inputs: Any, labels: Tensor, ignore_index: int) -> Tensor:
    """Which tokens are predicted from others; the first never is."""
    scored = labels != ignore_index
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is not None:
        seen = mask.to(labels.device).bool()
        scored &= seen & pad(seen[:, :-1], (1, 0))
    return scored


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)
