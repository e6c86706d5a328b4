"""Laplace's approximation around a trained network (Daxberger et al. 2021, arXiv 2106.14806).

The Hessian is the generalised Gauss-Newton's; the prior is N(0, 1/τ) with the τ that maximises the
approximate evidence, as laplace-torch's default has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from posterity import Posterior
from posterity.binding import evaluating
from posterity_studies.baselines.ensemble import point
from posterity_studies.baselines.samples import Saved

GRID = torch.logspace(-3, 5, 161, dtype=torch.float64)  # of τ
CHUNK = 16  # examples whose Jacobians are held at once


def prior_precision(curvature: Tensor, squares: float) -> float:
    """τ that maximises ½[D log τ − τ‖m‖² − Σ log(curvature + τ)], the evidence but for constants.

    Args:
        curvature: the Hessian's D eigenvalues, or its diagonal.
        squares: ‖m‖².
    """
    fit = torch.stack([(curvature.double() + tau).log().sum() for tau in GRID])
    return GRID[(len(curvature) * GRID.log() - GRID * squares - fit).argmax()].item()


def diagonal(model: nn.Module, inputs: Tensor, prior: float | None = None) -> Posterior:
    """A diagonal Gaussian over all weights: Σ_i Σ_c p_c (J_iᵀ(e_c − p))², and the prior.

    Args:
        model: trained; softmax of its output are class probabilities.
        inputs: the training inputs.
        prior: τ; by default that of the highest evidence.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in weights.items()}

    def squares(x: Tensor) -> dict[str, Tensor]:
        f, pull, *_ = vjp(lambda w: functional_call(model, w, (x[None],))[0], weights)
        p = f.softmax(-1)
        rows = p.sqrt()[:, None] * (torch.eye(len(f), dtype=f.dtype) - p)
        return {name: g.square().sum(0) for name, g in vmap(pull)(rows)[0].items()}

    with evaluating(model), torch.no_grad():
        for x in inputs.split(CHUNK):
            for name, each in vmap(squares)(x).items():
                total[name] += each.sum(0)
    if prior is None:
        flat = torch.cat([h.flatten() for h in total.values()])
        prior = prior_precision(flat, sum(p.square().sum().item() for p in weights.values()))
    return Posterior(
        weights,
        {name: h + prior for name, h in total.items()},
        prior_precision=prior,
        ess=len(inputs),
        buffers=dict(model.named_buffers()),
    )


class LastLayer(Saved):
    """A full Gaussian over the last layer's weights and biases; all others are fixed.

    Args:
        fixed: the network as it was trained.
        names: of the layer's weight and bias.
        factor: L of the precision LLᵀ, of weight and bias side by side, flattened.
    """

    FORMAT = "posterity.last_layer"

    def __init__(self, fixed: Posterior, names: tuple[str, str], factor: Tensor):
        self.fixed, self.names, self.factor = fixed, names, factor

    def state(self, seed: int, index: int) -> dict[str, Tensor]:
        """Sample ``index``, and the buffers."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        noise = torch.randn(len(self.factor), 1, generator=generator, dtype=self.factor.dtype)
        off = torch.linalg.solve_triangular(self.factor.T, noise, upper=True)
        state = self.fixed.state(seed, index)
        weight, bias = self.names
        off = off.view(len(state[bias]), -1).to(state[bias].dtype)
        state[weight] += off[:, :-1]
        state[bias] += off[:, -1]
        return state

    def packed(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """All tensors, each under the name of its part."""
        tensors, facts = self.fixed._packed()
        return tensors | {"factor": self.factor}, facts | {"names": self.names}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> LastLayer:
        """As it was."""
        fixed = {name: t for name, t in tensors.items() if name != "factor"}
        return cls(Posterior._unpacked(fixed, facts), tuple(facts["names"]), tensors["factor"])


def last_layer(model: nn.Module, inputs: Tensor, prior: float | None = None) -> LastLayer:
    """A Gaussian over the last ``nn.Linear``: Σ_i (diag p − ppᵀ) ⊗ φφᵀ, and the prior.

    Args:
        model: trained; its last linear layer (with a bias) gives the logits.
        inputs: the training inputs.
        prior: τ; by default that of the highest evidence.
    """
    name, layer = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    classes, width = layer.weight.shape
    total = torch.zeros(classes, width + 1, classes, width + 1, dtype=torch.float64)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        with evaluating(model), torch.no_grad():
            for x in inputs.split(1000):
                p = model(x).softmax(-1)
                phi = nn.functional.pad(seen.pop(), (0, 1), value=1.0)
                for c in range(classes):
                    for d in range(c, classes):
                        w = p[:, c] * (float(c == d) - p[:, d])
                        total[c, :, d] += (phi * w[:, None]).T @ phi
    finally:
        hook.remove()
    for c in range(classes):
        for d in range(c):
            total[c, :, d] = total[d, :, c].T
    hessian = total.view(classes * (width + 1), -1)
    if prior is None:
        curvature = torch.linalg.eigvalsh(hessian).clamp_min(0)
        squares = sum(p.square().sum().item() for p in layer.parameters())
        prior = prior_precision(curvature, squares)
    factor = torch.linalg.cholesky(hessian + prior * torch.eye(len(hessian), dtype=hessian.dtype))
    return LastLayer(point(model), (f"{name}.weight", f"{name}.bias"), factor)
