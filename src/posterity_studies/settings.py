"""Settings of each optimizer, and how they build it: a recipe holds one for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from posterity import IVON
from posterity_studies import baselines

BETA1 = 0.9  # where no setting says another; and SGD's momentum


class Settings(Protocol):
    """Numbers that ``posterity tune`` may search; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model, ``n_train`` examples and so many steps in all."""
        ...


@dataclass(frozen=True)
class Adamw:
    """AdamW, PyTorch's fused implementation."""

    lr: float
    weight_decay: float
    beta2: float = 0.999

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        betas = (BETA1, self.beta2)
        return torch.optim.AdamW(
            model.parameters(), self.lr, betas=betas, weight_decay=self.weight_decay, fused=True
        )


@dataclass(frozen=True)
class Sgd:
    """SGD with momentum, PyTorch's fused implementation."""

    lr: float
    weight_decay: float
    momentum: float = BETA1

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        return torch.optim.SGD(
            model.parameters(),
            self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=True,
        )


@dataclass(frozen=True)
class Ivon:
    """IVON with λ = N/``temperature``, N training examples; ``memory`` is 1/(1−β2), in steps.

    ``clip_radius`` bounds each weight's step to lr·(h0+δ) times itself: without a bound one batch
    at an unlucky sample can throw the network far off.
    """

    lr: float
    hess_init: float
    weight_decay: float
    temperature: float = 1.0
    memory: float = 1e4
    clip_radius: float = math.inf

    def __post_init__(self):
        if not (self.temperature > 0 and self.memory >= 1):
            raise ValueError(
                "needs temperature > 0, the training examples over λ, and memory >= 1, the steps "
                f"that h remembers; got {self.temperature} and {self.memory}"
            )

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        return IVON(
            model.parameters(),
            self.lr,
            ess=n_train / self.temperature,
            hess_init=self.hess_init,
            betas=(BETA1, 1 - 1 / self.memory),
            weight_decay=self.weight_decay,
            clip_radius=self.clip_radius,
            seed=seed,
        )


@dataclass(frozen=True)
class Untouched:
    """IVON with :meth:`posterity.IVON.defaults_for` a task.

    ``settings`` are those of a thousand examples and steps: a finished run is one of the same.
    """

    task: str
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "settings", IVON.defaults_for(self.task, 1000, 1000))

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        return IVON(trainable(model), **IVON.defaults_for(self.task, n_train, steps), seed=seed)


@dataclass(frozen=True)
class IvonSamples(Ivon):
    """IVON with ``mc_samples`` samples a step: as many forward and backward passes."""

    mc_samples: int = 2

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        opt = super().build(model, n_train, steps, seed)
        opt.param_groups[0]["mc_samples"] = self.mc_samples
        return opt


@dataclass(frozen=True)
class Adahessian:
    """AdaHessian with decoupled weight decay, pytorch-optimizer's."""

    lr: float
    weight_decay: float

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        from posterity_studies.baselines.adahessian import AdaHessian  # three seconds

        return AdaHessian(model.parameters(), self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Dropout(Sgd):
    """SGD on a network with dropout of ``rate``, which stays on to predict."""

    rate: float = 0.05

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        rest = {"momentum": self.momentum, "weight_decay": self.weight_decay, "fused": True}
        return baselines.McDropout(model, self.lr, self.rate, **rest)


@dataclass(frozen=True)
class Swag(Sgd):
    """SGD, and from the share ``start`` of all steps on, at ``swag_lr``, a Gaussian through it."""

    swag_lr: float = 0.01
    start: float = 0.75
    rank: int = 20

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        start = round(self.start * steps)
        return baselines.Swag(
            model.parameters(),
            self.lr,
            swag_lr=self.swag_lr,
            start=start,
            every=max((steps - start) // self.rank, 1),
            rank=self.rank,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True)
class Backprop:
    """Bayes by backprop with λ = N/``temperature``."""

    lr: float
    weight_decay: float
    std_init: float = 0.02
    temperature: float = 1.0

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        return baselines.BayesByBackprop(
            model.parameters(),
            self.lr,
            ess=n_train / self.temperature,
            weight_decay=self.weight_decay,
            std_init=self.std_init,
        )


@dataclass(frozen=True)
class Vogn:
    """VOGN with λ = N/``temperature``; ``memory`` is 1/(1−β2), in steps."""

    lr: float
    hess_init: float
    weight_decay: float
    temperature: float = 1.0
    memory: float = 1e3

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        return baselines.Vogn(
            model.parameters(),
            self.lr,
            ess=n_train / self.temperature,
            hess_init=self.hess_init,
            weight_decay=self.weight_decay,
            betas=(BETA1, 1 - 1 / self.memory),
        )


Weights = Callable[[nn.Module], list[Any]]  # what an optimizer takes


def matrices_apart(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for language models: vectors and scalars have no weight decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]


@dataclass(frozen=True)
class LanguageAdamw(Adamw):
    """AdamW for language models: no decay of vectors, β2 = .95."""

    weight_decay: float = 0.1
    beta2: float = 0.95
    beta1: float = BETA1

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        betas, decay = (self.beta1, self.beta2), self.weight_decay
        groups = matrices_apart(model)
        return torch.optim.AdamW(groups, self.lr, betas=betas, weight_decay=decay, fused=True)


@dataclass(frozen=True)
class LanguageIvon:
    """IVON for language models: λ itself, for a corpus has more tokens than are seen.

    Without ``memory`` h remembers a tenth of the steps, and so forgets its start. The defaults are
    the paper's for GPT-2 (124M).
    """

    lr: float = 300.0
    ess: float = 1e10
    hess_init: float = 1e-3
    memory: float | None = 1e5
    weight_decay: float = 1e-6
    clip_radius: float = 1e-3
    beta1: float = BETA1
    rescale: ClassVar[bool] = True
    weights: ClassVar[Weights] = staticmethod(matrices_apart)

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        memory = self.memory or max(steps / 10, 1)
        return IVON(
            self.weights(model),
            self.lr,
            ess=self.ess,
            hess_init=self.hess_init,
            betas=(self.beta1, 1 - 1 / memory),
            weight_decay=self.weight_decay,
            clip_radius=self.clip_radius,
            rescale_lr=self.rescale,
            seed=seed,
            **self.sampling(),
        )

    def sampling(self) -> dict[str, Any]:
        """How samples are drawn, where not one a step."""
        return {}


@dataclass(frozen=True)
class PairedIvon(LanguageIvon):
    """The same, with h learnt from a pair of samples at every ``every``-th step."""

    every: int = 10

    def sampling(self) -> dict[str, Any]:
        """Pairs on the same batch, and single samples in between."""
        return {"mc_samples": 2, "antithetic": True, "hess_every": self.every}


def trainable(model: nn.Module) -> list[Any]:
    """Weights that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class FinetuneAdamw:
    """AdamW of what is not frozen; vectors decay too, for few of them are trained."""

    lr: float = 1e-5
    weight_decay: float = 0.01

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        decay = self.weight_decay
        return torch.optim.AdamW(trainable(model), self.lr, weight_decay=decay, fused=True)


@dataclass(frozen=True)
class FinetuneIvon(LanguageIvon):
    """IVON as the paper finetunes: steps clipped and not rescaled."""

    lr: float = 0.03
    ess: float = 1e7
    memory: float | None = None
    rescale: ClassVar[bool] = False
    weights: ClassVar[Weights] = staticmethod(trainable)


@dataclass(frozen=True)
class FromAdamw(FinetuneAdamw):
    """IVON in the place of that AdamW: :meth:`posterity.IVON.from_adamw`.

    ``settings`` are those of a thousand examples and steps: a finished run is one of the same.
    """

    settings: dict[str, Any] = field(init=False)

    def __post_init__(self):
        (group,) = self.build(nn.Linear(1, 1), 1000, 1000, 0).param_groups
        told = {k: v for k, v in group.items() if k in IVON.defaults_for("finetuning", 1, 1)}
        object.__setattr__(self, "settings", told)

    def build(self, model: nn.Module, n_train: int, steps: int, seed: int) -> torch.optim.Optimizer:
        """The optimizer for a model."""
        adamw = super().build(model, n_train, steps, seed)
        assert isinstance(adamw, torch.optim.AdamW)
        return IVON.from_adamw(adamw, "finetuning", n_train=n_train, steps=steps, seed=seed)
