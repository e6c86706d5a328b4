"""A tiny network, its optimizer, and the three ways to train it, for the tests of IVON."""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from posterity import IVON

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))
LR = {"lr": 0.3, "ess": 24, "hess_init": 0.1, "betas": (0.9, 0.95), "weight_decay": 1e-2, "seed": 3}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def make(dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Sequential, IVON]:
    model = network(dtype)
    return model, IVON(model.parameters(), **{**LR, **settings})


def loss(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    dtype = next(model.parameters()).dtype
    return ((model(X[rows].to(dtype)) - Y[rows]) ** 2).mean()


def backward(model: nn.Module, rows: slice = slice(None), scale: float = 1.0) -> Tensor:
    value = loss(model, rows)
    (value * scale).backward()
    return value


def nothing() -> None: ...


def context(opt: IVON, grads: Callable[[], Tensor], between=nothing) -> None:
    opt.zero_grad()
    with opt.sampled_params(train=True):
        grads()
    between()
    opt.step()


def closure(opt: IVON, grads: Callable[[], Tensor], between=nothing) -> Tensor:
    def evaluate():
        opt.zero_grad()
        value = grads()
        between()
        return value

    return opt.step(evaluate)


def train(opt: IVON, grads: Callable[[], Tensor], between=nothing) -> None:
    opt.zero_grad()
    opt.train()
    grads()
    between()
    opt.step()


WAYS = {"context": context, "closure": closure, "train": train}


def samples(model: nn.Module, opt: IVON, k: int, each=nothing) -> None:
    """k Monte Carlo samples, without the step."""
    opt.zero_grad()
    for _ in range(k):
        with opt.sampled_params(train=True):
            backward(model)
            each()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def bits(model: nn.Module, opt: IVON) -> dict[str, object]:
    """Everything that training changes."""
    found = {f"param {i}": p for i, p in enumerate(weights(model))}
    params = [p for group in opt.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        found.update((f"{k} {i}", torch.as_tensor(v).clone()) for k, v in opt.state[p].items())
    for k in ("seed", "draws", "pending"):
        found[k] = torch.as_tensor(opt.param_groups[0][k]).clone()
    return found


def assert_same(a, b) -> None:
    """Bit for bit, NaN equal to NaN."""
    if isinstance(a, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def through_bytes(state):
    """As another process would load it from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
