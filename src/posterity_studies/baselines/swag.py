"""SWAG (Maddox et al. 2019, arXiv 1902.02476): a Gaussian through the iterates of SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from posterity import Posterior
from posterity.binding import clean_name
from posterity_studies.baselines.samples import Saved

Tensors = dict[str, Tensor]


class LowRank(Saved):
    """N(m, ½ diag(σ²) + DDᵀ/(2(K−1))): half a Gaussian's variance, and K deviations from m.

    Args:
        diagonal: m and the variance that is diagonal, ½σ².
        deviations: D, name → tensor (K, \\*shape of the mean).
    """

    FORMAT = "posterity.low_rank"

    def __init__(self, diagonal: Posterior, deviations: Mapping[str, Tensor]):
        self.diagonal, self.deviations = diagonal, dict(deviations)
        self.rank = len(next(iter(self.deviations.values())))
        if self.rank < 2:
            raise ValueError("SWAG has collected fewer than two deviations: start earlier")

    def state(self, seed: int, index: int) -> Tensors:
        """Sample ``index``, and the buffers."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        factors = torch.randn(self.rank, generator=generator) / math.sqrt(2 * (self.rank - 1))
        state = self.diagonal.state(seed, index)
        for name, each in self.deviations.items():
            state[name] += torch.tensordot(factors, each, 1)
        return state

    def packed(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """All tensors, each under the name of its part."""
        tensors, facts = self.diagonal._packed()
        return tensors | {f"deviation/{n}": d for n, d in self.deviations.items()}, facts

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> LowRank:
        """As it was."""
        parted: tuple[Tensors, Tensors] = {}, {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            if part == "deviation":
                parted[1][rest] = tensor
            else:
                parted[0][name] = tensor
        return cls(Posterior._unpacked(parted[0], facts), parted[1])


class Swag(torch.optim.SGD):
    """SGD that from step ``start`` on gathers every ``every``-th iterate, at the rate ``swag_lr``.

    What it gathers is its state (``mean``, ``spread`` around it, the last ``rank``
    ``deviations``), so that a checkpoint holds it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        swag_lr: float,
        start: int,
        every: int,
        rank: int = 20,
        **settings: Any,
    ):
        super().__init__(params, lr, **settings)
        told = {"swag_lr": swag_lr, "start": start, "every": every, "rank": rank}
        for group in self.param_groups:
            group |= {**told, "steps": 0, "gathered": 0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """A step of SGD; then gather, where it is time."""
        for group in self.param_groups:
            group["steps"] += 1
            if group["steps"] >= group["start"]:
                group["lr"] = group["swag_lr"]  # whatever a schedule has set
        loss = super().step(closure)
        for group in self.param_groups:
            since = group["steps"] - group["start"]
            if since < 0 or since % group["every"]:
                continue
            group["gathered"] += 1
            for p in group["params"]:
                self._gather(p, group["gathered"], group["rank"])
        return loss

    def _gather(self, p: Tensor, n: int, rank: int) -> None:
        state = self.state[p]
        if n == 1:
            state["mean"], state["spread"] = p.clone(), torch.zeros_like(p)
            state["deviations"] = p.new_zeros(rank, *p.shape)
        before = p - state["mean"]
        state["mean"] += before / n
        deviation = state["deviations"][(n - 1) % rank] = p - state["mean"]
        state["spread"] += before * deviation  # Welford's: n times the variance

    def posterior(self, model: nn.Module) -> LowRank:
        """The Gaussian through what was gathered; buffers are the model's.

        Raises:
            ValueError: fewer than three iterates were gathered.
        """
        n = self.param_groups[0]["gathered"]
        means, precisions, deviations = {}, {}, {}
        for own, p in model.named_parameters():
            name, state = clean_name(own), self.state[p]
            if n < 3:
                raise ValueError(f"SWAG has gathered {n} iterates: start earlier")
            means[name] = state["mean"]
            precisions[name] = 2 * n / state["spread"].clamp_min(1e-16)
            # the first deviation, of an iterate from itself, is zero until it is overwritten
            deviations[name] = state["deviations"][: min(n, len(state["deviations"]))].clone()
        buffers = {clean_name(name): b for name, b in model.named_buffers()}
        return LowRank(Posterior(means, precisions, buffers=buffers), deviations)
