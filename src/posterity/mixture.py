"""Several posteriors of one network as one: Multi-IVON, deep ensembles."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from .binding import Tensors
from .posterior import Posterior
from .storage import loaded, save


class Mixture:
    r"""A mixture of posteriors of one model: Multi-IVON, deep ensembles.

    Args:
        components: posteriors of the same names and shapes, each with its own buffers.
        weights: of the components, positive; default equal.

    Sample ``index`` comes from component ``index mod K``, so S samples are divided evenly among K
    components (S ≥ K, best a multiple); with ``weights``, from where the golden-ratio sequence
    falls, whose counts stay within a few of S·weight.

    Raises:
        ValueError: no components, other names or shapes, weights not positive.

    Example:
        >>> import torch
        >>> from posterity import Mixture, Posterior
        >>> ones = {"w": torch.ones(3)}
        >>> mixture = Mixture([Posterior(ones, ones), Posterior({"w": torch.zeros(3)}, ones)])
        >>> mixture
        Mixture(2 components of 1 tensors, 3 parameters)
        >>> [mixture.component(index) for index in range(4)]
        [0, 1, 0, 1]

    Source: Lakshminarayanan et al. 2017, arXiv 1612.01474; Shen et al. 2024, arXiv 2402.17641.
    """

    FORMAT = "posterity.mixture"

    def __init__(self, components: Sequence[Posterior], weights: Sequence[float] | None = None):
        self.components = tuple(components)
        if not self.components:
            raise ValueError("a mixture needs at least one component")
        shapes = [{n: m.shape for n, m in c.mean.items()} for c in self.components]
        if odd := [k for k, shape in enumerate(shapes) if shape != shapes[0]]:
            raise ValueError(f"components {odd} have other names or shapes than component 0")
        self.weights: tuple[float, ...] | None = None  # None: equal
        if weights is not None:
            if len(weights) != len(shapes) or not all(0 < w < math.inf for w in weights):
                raise ValueError(f"needs {len(shapes)} positive finite weights, not {weights}")
            self.weights = tuple(w / sum(weights) for w in weights)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the first component's order."""
        return self.components[0].names

    def __len__(self) -> int:
        """The number of components."""
        return len(self.components)

    def __repr__(self) -> str:
        mean = self.components[0].mean
        size = sum(m.numel() for m in mean.values())
        return f"Mixture({len(self)} components of {len(mean)} tensors, {size:,} parameters)"

    def component(self, index: int) -> int:
        """Which component sample ``index`` comes from."""
        if self.weights is None:
            return index % len(self)
        level = (0.5 + index * (math.sqrt(5) - 1) / 2) % 1
        return min(bisect_right(list(accumulate(self.weights)), level), len(self) - 1)

    def sample(self, seed: int, index: int) -> Tensors:
        """Sample ``index``, as :meth:`Posterior.sample`."""
        return self.components[self.component(index)].sample(seed, index)

    def state(self, seed: int, index: int) -> Tensors:
        """Sample ``index`` and the buffers of its component, as :meth:`Posterior.state`."""
        return self.components[self.component(index)].state(seed, index)

    def sampled(self, model: nn.Module, seed: int, index: int) -> AbstractContextManager[nn.Module]:
        """A context in which the model holds sample ``index``, as :meth:`Posterior.sampled`."""
        return self.components[self.component(index)].sampled(model, seed, index)

    def log_prob(self, sample: Mapping[str, Tensor]) -> float:
        """log Σ_k w_k q_k(θ) in nats, in float64."""
        each = torch.tensor([c.log_prob(sample) for c in self.components], dtype=torch.float64)
        weights = torch.tensor(self.weights or [1 / len(self)] * len(self), dtype=torch.float64)
        return (each + weights.log()).logsumexp(0).item()

    def temper(self, t: float) -> Mixture:
        """Every component tempered, as :meth:`Posterior.temper`."""
        return Mixture([c.temper(t) for c in self.components], self.weights)

    def prune(self, snr: float) -> Mixture:
        """Every component pruned, as :meth:`Posterior.prune`."""
        return Mixture([c.prune(snr) for c in self.components], self.weights)

    def to(self, where: torch.device | str | int | torch.dtype) -> Mixture:
        """Every component moved or cast, as :meth:`Posterior.to`."""
        return Mixture([c.to(where) for c in self.components], self.weights)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, as :meth:`Posterior.save`."""
        packed = [c._packed() for c in self.components]
        tensors = {
            f"component/{k}/{key}": value
            for k, (part, _) in enumerate(packed)
            for key, value in part.items()
        }
        facts = {"weights": self.weights, "components": [facts for _, facts in packed]}
        save(path, self.FORMAT, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Mixture:
        """Read what :meth:`save` wrote, onto the CPU; errors as :meth:`Posterior.load`."""
        with loaded(path, cls.FORMAT) as (tensors, facts):
            parts: list[Tensors] = [{} for _ in facts["components"]]
            for key, value in tensors.items():
                _, k, rest = key.split("/", 2)
                parts[int(k)][rest] = value
            components = map(Posterior._unpacked, parts, facts["components"])
            return cls(list(components), facts["weights"])
