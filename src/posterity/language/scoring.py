"""How probable are given tokens under the averaged model?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad
from torch.utils.data import DataLoader, Dataset

from ..batches import Pairs
from ..binding import Samples, call, evaluating, floats
from ..metrics import IGNORED
from .averaging import Average, holding, number, placing


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
            ``input_ids``, maybe ``attention_mask`` and ``labels`` (not shifted, as Hugging Face's;
            where padding is on the left, a model that takes ``position_ids`` is told);
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
    samples = number(posterior, samples)
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size)
    elif isinstance(data, (Tensor, Mapping, tuple)):
        data = Pairs(_labelled(data), batch_size)
    found: list[_Scores] = []
    with evaluating(model), torch.no_grad():
        for batch in (progress or iter)(data):
            inputs, labels = _labelled(batch)
            inputs = placing(model, inputs)
            scores = _Scores(labels, _scored(inputs, labels, ignore_index))
            for index in range(samples):
                with holding(model, posterior, seed, index):
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


class _Scores:
    """Running totals of one batch: what its samples say of its labels, without the first."""

    def __init__(self, labels: Tensor, scored: Tensor):
        self.labels, self.scored = labels[:, 1:], scored[:, 1:]
        self.average = Average()
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
