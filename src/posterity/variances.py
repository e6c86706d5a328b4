"""The covariance of a model's outputs under a posterior, V_i = J_i Σ J_iᵀ, of each example.

By Jacobians at the mean, or over samples; as a product with a vector, as a diagonal, or whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import hessian, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .binding import Tensors, call, clean_name, floats, placed

Form = Literal["product", "diagonal", "matrix"]  # V·e, diag V, or V itself


class Gaussian(Protocol):
    """What is asked of a posterior here; its covariance need not be diagonal."""

    mean: Tensors
    buffers: Tensors
    ess: float | None

    def covariance(self, vector: Mapping[str, Tensor]) -> Tensors:
        """Σv."""
        ...

    def state(self, seed: int, index: int) -> Tensors:
        """Sample ``index``, and copies of the buffers; only for ``variance="samples"``."""
        ...


def divided(state: Tensors, posterior: Gaussian) -> tuple[Tensors, Tensors]:
    """What is written into a model: the weights, and the buffers."""
    weights = {name for name in state if clean_name(name) in posterior.mean}
    rest = {name: value for name, value in state.items() if name not in weights}
    return {name: value for name, value in state.items() if name in weights}, rest


def copies(buffers: Tensors) -> Tensors:
    """What a forward pass may write to."""
    return {name: value.clone() for name, value in buffers.items()}


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(examples, outputs, outputs) · (examples, …)."""
    return (matrices @ vectors.reshape(len(vectors), -1, 1)).view_as(vectors)


def linear(
    model: nn.Module,
    posterior: Gaussian,
    mean: Tensors,
    form: Form,
    memory: float,
    vectorize: bool,
    inputs: Any,
    f: Tensor,
    e: Tensor,
) -> Tensor:
    """V_i = J_i Σ J_iᵀ of each example, by Jacobians at the mean."""
    trained, fixed = divided(mean, posterior)
    names = {name: clean_name(name) for name in trained}
    size = 16 * sum(p.numel() for p in trained.values())  # four vectors of the weights
    shape, outputs = e.shape[1:], e[0].numel()
    rows = 1 if form == "product" else int(min(max(memory // size, 1), outputs))

    def covariance(vector: Tensors) -> Tensors:
        spread = posterior.covariance({clean: vector[name] for name, clean in names.items()})
        return {name: spread[clean].to(vector[name].device) for name, clean in names.items()}

    def forward(net: Callable[[Tensors], Tensor], spread: Tensors) -> Tensor:
        """J·spread; scaled, for weights of 16 bits may not hold a number so small."""
        sizes = [s.abs().amax() for s in spread.values() if s.numel()]
        scale = torch.stack(sizes).amax().clamp_min(torch.finfo(torch.float32).tiny)
        unit = {name: (s / scale).to(trained[name]) for name, s in spread.items()}
        return scale * jvp(net, (trained,), (unit,))[1]

    def one(x: Any, e: Tensor) -> Tensor:
        batch = {k: v[None] for k, v in x.items()} if isinstance(x, Mapping) else x[None]

        def net(weights: Tensors) -> Tensor:
            return floats(call(model, batch, weights | fixed))[0]

        back = vjp(net, trained)[1]
        if form == "product":
            return forward(net, covariance(back(e)[0]))

        def row(output: Tensor) -> Tensor:
            unit = (torch.arange(outputs, device=e.device) == output).to(e).view(shape)
            gradient = back(unit)[0]
            spread = covariance(gradient)
            if form == "matrix":
                return forward(net, spread).flatten()
            return torch.stack([(gradient[n] * spread[n]).sum() for n in names]).sum()

        found = vmap(row, chunk_size=rows)(torch.arange(outputs, device=e.device))
        return found if form == "matrix" else found.view(shape)

    with sdpa_kernel(SDPBackend.MATH):  # the other attentions have no forward mode
        if not vectorize:
            return torch.stack([one(_row(inputs, i), e[i]) for i in range(len(e))])
        together = int(min(max(memory // (size * rows), 1), len(e)))
        try:
            return vmap(one, chunk_size=together)(inputs, e)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise ValueError(
                "this model cannot work on several examples at once (torch.func.vmap: "
                f"{str(error).splitlines()[0][:150]}); pass vectorize=False"
            ) from error


def _row(inputs: Any, i: int) -> Any:
    return {k: v[i] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[i]


@torch.no_grad()
def sampled(
    model: nn.Module,
    posterior: Gaussian,
    form: Form,
    samples: int,
    seed: int,
    inputs: Any,
    f: Tensor,
    e: Tensor,
) -> Tensor:
    """V_i of each example, as the covariance of its outputs over samples.

    Deviations are taken from the output at the mean: the sums then do not cancel.
    """
    flat = e.reshape(len(e), -1)

    def against(d: Tensor) -> Tensor:
        """What the deviations are multiplied with, to sum up to the form that is asked for."""
        if form == "diagonal":
            return d
        return (d * flat).sum(1, keepdim=True) if form == "product" else d[:, None, :]

    first = torch.zeros_like(flat)
    second = other = torch.zeros(()).to(flat)
    for index in range(samples):
        state = placed(model, posterior.state(seed, index))
        d = (floats(call(model, inputs, state)) - f).view_as(flat)
        left = d[:, :, None] if form == "matrix" else d
        first += d
        other = other + against(d)
        second = second + left * against(d)
    left = first[:, :, None] if form == "matrix" else first
    found = (second - left * other / samples) / (samples - 1)
    return found if form == "matrix" else found.view_as(f)


def without_curvature(w: Tensor, loss: Callable, f: Tensor, y: Tensor) -> Tensor:
    """(I − WH)⁻¹W with H = ∂²ℓ/∂f²: the covariance that is left without the example's own part."""
    one = hessian(lambda f, y: loss(f[None], y[None])[0])
    curvature = vmap(one)(f, y).view_as(w)
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    leverage = torch.linalg.eigvals(w @ curvature).real.amax(1)
    if beyond := int((leverage >= 1).sum()):
        raise ValueError(
            f"the leverage of {beyond} of {len(w)} examples reaches 1: for so wide a posterior "
            "leaving one out has no second order; pass order=1"
        )
    return torch.linalg.solve(eye - w @ curvature, w)
