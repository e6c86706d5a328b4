"""Minimum-Bayes-risk decoding over what the samples wrote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        candidates: n sequences or texts, as from :func:`~posterity.language.candidates`.
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
