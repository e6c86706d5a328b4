"""A plain loop under Accelerate is the plain loop, on the same noise, to the bit."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from posterity import IVON

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

SETTINGS = {"lr": 0.3, "ess": 96.0, "hess_init": 0.3, "betas": (0.9, 0.99), "seed": 3}


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate's state is the process's: each test starts with none."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def loader():
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :1].sin()), 8)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def plain(accumulate=1, clip=None, way="context", autocast=False, epochs=2):
    model = network()
    opt = IVON(model.parameters(), **SETTINGS)
    micro = [batch for _ in range(epochs) for batch in loader()]
    for first in range(0, len(micro), accumulate):
        opt.train() if way == "train" else None
        with opt.sampled_params(train=True) if way == "context" else nullcontext():
            opt.zero_grad()
            for x, y in micro[first : first + accumulate]:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = nn.functional.mse_loss(model(x), y)
                (loss / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
    return weights(model)


def accelerated(folder=None, stop=None, resume=False, accumulate=1, clip=None, precision="no"):
    """``opt.train()`` before each batch: the sample stays the same until the step."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    model = network()
    opt = IVON(model.parameters(), **SETTINGS)
    model, opt, batches = accelerator.prepare(model, opt, loader())
    if resume:
        accelerator.load_state(folder)
    for epoch in range(int(resume), 2):
        for x, y in batches:
            with accelerator.accumulate(model):
                opt.train()
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                opt.zero_grad()
        if epoch == stop:
            accelerator.save_state(folder)
            break
    return weights(model)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_loop_with_train(accumulate, clip):
    for ours, theirs in zip(
        accelerated(accumulate=accumulate, clip=clip),
        plain(accumulate, clip, way="train"),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_the_loop_with_contexts():
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    opt = IVON(model.parameters(), **SETTINGS)
    model, wrapped, batches = accelerator.prepare(model, opt, loader())
    for _ in range(2):
        for x, y in batches:
            with opt.sampled_params(train=True):
                wrapped.zero_grad()
                accelerator.backward(nn.functional.mse_loss(model(x), y))
            wrapped.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), plain(), strict=True))


def test_bfloat16():
    assert all(
        torch.equal(a, b)
        for a, b in zip(accelerated(precision="bf16"), plain(autocast=True), strict=True)
    )


def test_save_state_and_load_state_cost_no_bit(tmp_path):
    whole = accelerated()
    accelerate.state.AcceleratorState._reset_state(True)
    accelerated(str(tmp_path), stop=0)
    accelerate.state.AcceleratorState._reset_state(True)
    resumed = accelerated(str(tmp_path), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
