"""MC-dropout (Gal and Ghahramani 2016, arXiv 1506.02142): dropout stays on to predict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from posterity_studies.baselines.samples import Saved
from posterity_studies.models.resnet import FilterResponse


class Dropout(Saved):
    """A distribution over masks: every rectifier forgets a share ``rate`` of its outputs.

    Rectifiers are ``nn.ReLU``, and filter-response norms, which rectify too.

    A mask is drawn for each example, layer and forward pass.
    """

    FORMAT = "posterity.dropout"

    def __init__(self, rate: float):
        if not 0 < rate < 1:
            raise ValueError(f"a dropout rate must be in (0, 1), not {rate}")
        self.rate = rate

    @contextmanager
    def masked(self, model: nn.Module) -> Iterator[nn.Module]:
        """A context in which outputs are forgotten at random."""
        layers = [m for m in model.modules() if isinstance(m, (nn.ReLU, FilterResponse))]
        if not layers:
            raise ValueError("MC-dropout follows rectifiers, and the model has none")
        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_hook(self._forget).remove)
            yield model

    def _forget(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, self.rate)

    @contextmanager
    def sampled(self, model: nn.Module, seed: int, index: int) -> Iterator[nn.Module]:
        """A context in which masks follow seed and index; the generator is as before after it."""
        with torch.random.fork_rng(devices=[]), self.masked(model):
            torch.manual_seed(1_000_003 * seed + index)
            yield model

    def state(self, seed: int, index: int) -> dict[str, Tensor]:
        """There is none: what differs between samples are no weights."""
        raise ValueError("MC-dropout has no samples of weights: use predict(functional=False)")

    def packed(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The rate."""
        return {}, {"rate": self.rate}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Dropout:
        """As it was."""
        return cls(facts["rate"])


class McDropout(torch.optim.SGD):
    """SGD on a network with dropout, which is no part of the network itself."""

    def __init__(self, model: nn.Module, lr: float, rate: float, **settings: Any):
        super().__init__(model.parameters(), lr, **settings)
        self.model, self.dropout = model, Dropout(rate)

    def sampled_params(self, train: bool = True) -> Any:
        """A context in which the network has dropout."""
        return self.dropout.masked(self.model)

    def posterior(self, model: nn.Module) -> Dropout:
        """The distribution over masks."""
        return self.dropout
