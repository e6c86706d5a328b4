"""Diagonal Gaussians trained as IVON's is: Bayes by backprop, and VOGN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, softplus

from posterity import Posterior
from posterity.binding import clean_name

CHUNK = 16  # examples whose gradients are held at once


class MeanField(torch.optim.Optimizer):
    """q(θ) = N(m, diag(σ²)); the parameters at rest are m. Subclasses know σ and take the step.

    ``weight_decay`` is δ and ``ess`` is λ as in IVON: the prior's precision is λδ.
    """

    def std(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """σ of a parameter."""
        raise NotImplementedError

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group, self.state[p]

    @contextmanager
    def sampled_params(self, train: bool = True) -> Iterator[None]:
        """A context in which the parameters are a sample of q, drawn by PyTorch's generator."""
        kept = []
        with torch.no_grad():
            for p, group, state in self._parameters():
                state["noise"] = torch.randn_like(p)
                kept.append(p.clone())
                p.addcmul_(self.std(p, group), state["noise"])
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _, _), mean in zip(self._parameters(), kept, strict=True):
                    p.copy_(mean)

    def posterior(self, model: nn.Module) -> Posterior:
        """The Gaussian, with its prior."""
        known = {p: group for group in self.param_groups for p in group["params"]}
        mean = {clean_name(name): p for name, p in model.named_parameters()}
        group = self.param_groups[0]
        return Posterior(
            mean,
            {name: self.std(p, known[p]) ** -2 for name, p in mean.items()},
            prior_precision=group["ess"] * group["weight_decay"],
            ess=group["ess"],
            buffers={clean_name(name): b for name, b in model.named_buffers()},
        )


class BayesByBackprop(MeanField):
    """Blundell et al. 2015 (arXiv 1505.05424): Adam on m and ρ of σ = log(1 + exp ρ).

    It minimises E_q[ℓ̄] + KL(q‖p)/λ by one sample a step.
    """

    def __init__(
        self, params: Any, lr: float, *, ess: float, weight_decay: float, std_init: float = 0.02
    ):
        super().__init__(params, {"lr": lr, "ess": ess, "weight_decay": weight_decay, "t": 0})
        for p, _, state in self._parameters():
            state["rho"] = torch.full_like(p, math.log(math.expm1(std_init)))
            state["moments"] = p.new_zeros(4, *p.shape)

    def std(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """σ = softplus(ρ)."""
        return softplus(self.state[p]["rho"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore
        """Adam on the gradients at the last sample and those of the KL divergence."""
        for group in self.param_groups:
            group["t"] += 1
        for p, group, state in self._parameters():
            if p.grad is None:
                continue
            std, rho = self.std(p, group), state["rho"]
            to_std = (
                p.grad * state["noise"] + group["weight_decay"] * std - 1 / (group["ess"] * std)
            )
            slopes = p.grad + group["weight_decay"] * p, to_std * rho.sigmoid()
            for x, slope, m, v in zip((p, rho), slopes, *state["moments"].split(2), strict=True):
                m.lerp_(slope, 0.1)
                v.lerp_(slope.square(), 0.001)
                t = group["t"]
                x.addcdiv_(m / (1 - 0.9**t), (v / (1 - 0.999**t)).sqrt() + 1e-8, value=-group["lr"])


class Vogn(MeanField):
    """Osawa et al. 2019 (arXiv 1906.02506): as IVON, with h the squares of examples' gradients.

    h ← β2 h + (1−β2) mean_i g_i², g ← β1 g + (1−β1) ĝ, m ← m − lr·(g+δm)/(h+δ),
    σ² = 1/(λ(h+δ)); g is debiased. The steps are IVON's, for the same ``lr`` and ``hess_init``.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        ess: float,
        hess_init: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        settings = {"lr": lr, "ess": ess, "hess_init": hess_init, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "betas": betas, "t": 0})
        for p, group, state in self._parameters():
            state["momentum"] = torch.zeros_like(p)
            state["hess"] = torch.full_like(p, group["hess_init"])

    def std(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """σ = 1/√(λ(h+δ))."""
        return (group["ess"] * (self.state[p]["hess"] + group["weight_decay"])).rsqrt()

    def backward(self, model: nn.Module, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """Gradients and their squares, example by example; ``share`` times the summed loss."""
        losses = []
        for x, y in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
            each, found = per_example(model, x, y)
            losses.append(found.sum())
            for name, p in model.named_parameters():
                g = each[name]
                total, square = g.sum(0) * share, g.square_().sum(0) * share
                state = self.state[p]
                state["squares"] = square + state["squares"] if len(losses) > 1 else square
                p.grad = total if p.grad is None else p.grad + total
        return torch.stack(losses).sum() * share

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore
        """One update by what :meth:`backward` left."""
        for group in self.param_groups:
            group["t"] += 1
        for p, group, state in self._parameters():
            if p.grad is None:
                continue
            (beta1, beta2), delta = group["betas"], group["weight_decay"]
            state["momentum"].lerp_(p.grad, 1 - beta1)
            state["hess"].lerp_(state["squares"], 1 - beta2)
            slope = state["momentum"] / (1 - beta1 ** group["t"]) + delta * p
            scale = group["lr"] * (group["hess_init"] + delta)
            p.addcdiv_(slope, state["hess"] + delta, value=-scale)


def per_example(
    model: nn.Module, inputs: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Each example's gradient of the cross-entropy (examples, \\*shape of the weight), its loss.

    Raises:
        ValueError: the examples of a batch depend on each other, as in BatchNorm.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        raise ValueError("with BatchNorm an example has no gradient of its own: use another norm")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = cross_entropy(functional_call(model, weights, (x[None],)), y[None])
        return found, found.detach()

    return vmap(grad(loss, has_aux=True), (None, 0, 0))(weights, inputs, targets)
