"""Algorithm 1 of Shen et al. (ICML 2024, arXiv 2402.17641) in plain PyTorch, to be read.

Every fast implementation is tested against these few lines. All functions take lists of tensors,
one entry per parameter, and a group's settings as keywords; they write in place. Symbols: mean m,
Hessian h (without the prior), momentum g, effective sample size λ = ``ess``, prior precision over
λ δ = ``weight_decay``, a sample θ = m + σε. Numbers in brackets are the paper's lines (1)–(7),
which docs/maths.md explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Noise = Iterable[Tensor]  # standard normals, one tensor per parameter


def floor(hess_init: float, weight_decay: float) -> float:
    """The least h+δ. Exact arithmetic keeps it positive by itself; float32 does not."""
    return 2.0**-20 * (hess_init + weight_decay)


def curvature(h: Tensor, *, hess_init: float, weight_decay: float) -> Tensor:
    """h+δ: the posterior precision over λ."""
    return (h + weight_decay).clamp_min(floor(hess_init, weight_decay))


def perturbation(h: Tensor, noise: Tensor, *, ess: float, **prior: float) -> Tensor:
    """σε with σ = 1/√(λ(h+δ)) (7)."""
    return (ess * curvature(h, **prior)).rsqrt_() * noise.view(h.shape)


def at_rest(p: Tensor, m: Tensor) -> Tensor:
    """The mean that p holds: in low precision m, whose rounding it is, or other weights."""
    return p if p.dtype == m.dtype else torch.where(m.to(p.dtype) == p, m, p.to(m.dtype))


def sample(
    params: Tensors, means: Tensors, hess: Tensors, noise: Noise, keep: bool = False, **width: float
):
    """θ ~ N(m, σ²), rounded to the parameter's dtype; ``keep``: m, in θ's place, is kept first."""
    for p, m, h, e in zip(params, means, hess, noise, strict=True):
        if keep:
            m.copy_(at_rest(p, m))
        p.copy_(m + perturbation(h, e, **width))


def restore(params: Tensors, means: Tensors):
    """θ → m, which was kept."""
    for p, m in zip(params, means, strict=True):
        p.copy_(m)


def unsample(params: Tensors, hess: Tensors, noise: Noise, **width: float):
    """θ → m up to one rounding, where no copy of the mean was kept."""
    for p, h, e in zip(params, hess, noise, strict=True):
        p.sub_(perturbation(h, e, **width))


def product(grad: Tensor, displacement: Tensor, hess_approx: str) -> Tensor:
    """What is averaged over samples for (2): ĝ·(θ−m) for "price", ĝ² for "gradsq"."""
    return grad * (displacement if hess_approx == "price" else grad)


def accumulate(
    grad_sums: Tensors,
    product_sums: Tensors,
    grads: Tensors,
    means: Tensors,
    hess: Tensors,
    noise: Noise,
    hess_approx: str,
    **width: float,
):
    """Add a sample's gradient and product to the sums over samples.

    θ−m is taken as the parameter held it, except in low precision, where its rounding would
    outweigh σε.
    """
    for total, products, grad, m, h, e in zip(
        grad_sums, product_sums, grads, means, hess, noise, strict=True
    ):
        displacement = perturbation(h, e, **width)
        if grad.dtype == m.dtype:
            displacement = (m + displacement) - m
        ghat = grad.to(m.dtype)  # (1)
        total += ghat
        products += product(ghat, displacement, hess_approx)


def update(
    means: Tensors,
    grads: Tensors,
    products: Tensors,
    momentum: Tensors,
    hess: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    ess: float,
    hess_init: float,
    betas: tuple[float, float],
    weight_decay: float,
    hess_approx: str,
    gradsq_scale: float | None,
    clip_radius: float,
    rescale_lr: bool,
    debias: bool,
    scale: float | Tensor = 1.0,
    product_scale: float | Tensor = 1.0,
):
    """Lines (2) to (6): momentum, Hessian and mean from scaled sums of gradients and products."""
    beta1, beta2 = betas
    rho = 1 - beta2  # in double: float32 would lose a tenth of a percent at β2 = .99999
    prior = {"hess_init": hess_init, "weight_decay": weight_decay}
    least = floor(**prior) - weight_decay
    if rescale_lr:
        lr = lr * (hess_init + weight_decay)
    for m, ghat, gd, g, h, t in zip(means, grads, products, momentum, hess, steps, strict=True):
        t += 1
        ghat, gd = ghat * scale, gd * product_scale
        h.clamp_min_(least)  # δ may have been lowered since
        u = curvature(h, **prior)
        hhat = gd * (ess * u) if hess_approx == "price" else gd * gradsq_scale  # (2)
        g.lerp_(ghat, 1 - beta1)  # (3)
        if rho:  # else h rests, whatever ĥ is
            r = rho * (hhat - h)
            h += r + r.square() / (2 * u)  # (4)
        h.clamp_min_(least)
        gbar = g / (1 - beta1 ** t.double()) if debias else g  # (5)
        step = (gbar + weight_decay * m) / curvature(h, **prior)  # (6), with the new h
        m -= lr * step.clamp_(-clip_radius, clip_radius)


def step(
    params: Tensors,
    means: Tensors,
    grads: Tensors,
    momentum: Tensors,
    hess: Tensors,
    steps: Tensors,
    noise: Noise,
    live: bool,
    **s,
):
    """The update from one sample; where θ is live, and m not kept, ``means`` holds θ itself."""
    width = {k: s[k] for k in ("ess", "hess_init", "weight_decay")}
    for p, m, h, e in zip(params, means, hess, noise, strict=True):
        if live and m is p:
            unsample([p], [h], [e], **width)
    sums, products = ([torch.zeros_like(h) for h in hess] for _ in range(2))
    accumulate(sums, products, grads, means, hess, noise, s["hess_approx"], **width)
    update(means, sums, products, momentum, hess, steps, **s)
    for p, m in zip(params, means, strict=True):
        if m is not p:
            p.copy_(m)
