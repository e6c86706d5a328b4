"""The optimizers that are compared, and one step of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ivon
import torch
from torch import Tensor
from torch.optim import Optimizer

from posterity import IVON

Closure = Callable[[], Any]  # forward and backward pass


class Peer(NamedTuple):
    """How to build an optimizer, and how it takes a step around a forward and backward pass."""

    build: Callable[[list[Tensor]], Optimizer]
    step: Callable[[Any, Closure], None]
    slow: bool = False


def plain(opt: Optimizer, closure: Closure) -> None:
    closure()
    opt.step()


def train(opt: IVON, closure: Closure) -> None:
    opt.train()
    closure()
    opt.step()


def context(opt: IVON | ivon.IVON, closure: Closure) -> None:
    with opt.sampled_params(train=True):
        closure()
    opt.step()


def ours(fused: bool = True, **settings: Any) -> Callable[[list[Tensor]], IVON]:
    return lambda p: IVON(p, 1e-3, ess=1e6, seed=0, fused=fused, **settings)


BASE = "AdamW, fused"
PEERS = {
    BASE: Peer(lambda p: torch.optim.AdamW(p, 1e-5, fused=True), plain),
    "AdamW, foreach": Peer(lambda p: torch.optim.AdamW(p, 1e-5, foreach=True), plain),
    "SGD, fused": Peer(lambda p: torch.optim.SGD(p, 1e-5, momentum=0.9, fused=True), plain),
    "IVON": Peer(ours(), train),
    "IVON, context": Peer(ours(), context),
    "IVON, no mean": Peer(ours(store_mean=False), train),
    "IVON, no mean, context": Peer(ours(store_mean=False), context),
    "IVON, reference": Peer(ours(fused=False), train, slow=True),
    "ivon-opt": Peer(lambda p: ivon.IVON(p, 1e-3, ess=1e6), context, slow=True),
}


def nothing() -> None:
    """The closure where gradients are given: what is left is the optimizer's own cost."""


def parameters(
    shapes: list[tuple[int, ...]], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Parameters of these shapes with gradients, the same values in any dtype."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        value, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        p = torch.nn.Parameter(value.to(device, dtype))
        p.grad = grad.mul_(0.01).to(device, dtype)
        made.append(p)
    return made
