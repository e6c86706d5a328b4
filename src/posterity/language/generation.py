"""Tokens written by the averaged model, or by each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from ..binding import Samples, call, evaluating, floats, placed
from .averaging import Average, holding, number, places, takes_places

CACHES = ("cache", "past_key_values")  # transformers' newer and older name of it


@dataclass(frozen=True, eq=False)
class Generation:
    """What :func:`generate` returns, (batch, new tokens) each; values in nats.

    ``log_probs``: log p̄ of each token, before any temperature. ``entropy`` and
    ``mutual_information``: of the distribution it was taken from, as in
    :class:`~posterity.language.Perplexity`. After the ``stop`` token a row goes on with ``stop``,
    and NaN.
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
            Padding belongs on the left; a model that takes ``position_ids`` is then told.
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
    samples = number(posterior, samples)
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError("needs max_new_tokens of 1 or more, and a temperature of 0 or more")
    reader = _Reader(model, prompt, samples, cache)
    generator = generator or torch.Generator().manual_seed(seed)
    steps: list[tuple[Tensor, ...]] = []
    with evaluating(model), torch.no_grad():
        forwards = _forwards(model, posterior, samples, seed, keep)
        done = torch.zeros(len(reader.tokens), dtype=torch.bool)
        for _ in range(max_new_tokens):
            average = Average()
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
        if self.mask is not None and not bool(self.mask[:, -1].all()):
            raise ValueError("the prompts are padded on the right: pad them on the left")
        padded = self.mask is not None and not bool(self.mask[:, 0].all())
        self.placing = padded and takes_places(model)
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
        if self.mask is not None and self.placing:
            batch["position_ids"] = places(self.mask)[:, -new.shape[1] :]
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
    """Continuations of one prompt, ``per_sample`` by each of S weight samples, to choose among.

    Each sequence is written by one sample from first to last token, so the candidates also differ
    in what the samples believe; :func:`~posterity.language.mbr` chooses one. Arguments as for
    :func:`generate`; the prompt is (1, tokens). It costs per_sample·S sequences, ``per_sample`` at
    a time.

    Returns:
        Token numbers up to ``stop`` (left out), those of sample 0 first.

    Raises:
        ValueError: as :func:`generate`, or there are several prompts.
    """
    samples = number(posterior, samples)
    inputs = prompt if isinstance(prompt, Mapping) else {"": prompt}
    if per_sample < 1 or any(len(value) != 1 for value in inputs.values()):
        raise ValueError("needs one prompt, (1, tokens), and per_sample of 1 or more")
    copies = {name: value.expand(per_sample, -1) for name, value in inputs.items()}
    generator = generator or torch.Generator().manual_seed(seed)
    how = {"temperature": temperature, "generator": generator, "stop": stop, "cache": cache}
    found: list[list[int]] = []
    for index in range(samples):
        with holding(model, posterior, seed, index):
            written = generate(model, None, copies.get("", copies), max_new_tokens, **how)
        found += [row[: row.index(stop)] if stop in row else row for row in written.tokens.tolist()]
    return found


def _forwards(
    model: nn.Module, posterior: Samples | None, samples: int, seed: int, keep: bool
) -> list[Callable[[Any], Any]]:
    """The forward pass of each sample, as a function of a batch."""

    def written(batch: Any, index: int) -> Any:
        with holding(model, posterior, seed, index):
            return call(model, batch)

    if posterior is None or not keep:
        return [partial(written, index=index) for index in range(samples)]
    states = (placed(model, posterior.state(seed, index)) for index in range(samples))
    return [partial(call, model, state=state) for state in states]
