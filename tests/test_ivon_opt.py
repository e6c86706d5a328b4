"""A user of ivon-opt comes over: checkpoints that the package itself wrote."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from posterity import IVON
from posterity.integrations import ivon_opt
from posterity.ops import noise

ivon = pytest.importorskip("ivon", reason="ivon-opt (the bench extra) is not installed")

SETTINGS = {
    "lr": 0.07,
    "ess": 60.0,
    "hess_init": 0.4,
    "weight_decay": 0.02,
    "clip_radius": 0.3,
    "beta1": 0.8,
    "beta2": 0.97,
}
STEPS = 7


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


def groups(model: nn.Sequential) -> list[dict]:
    """Decayed matrices and undecayed vectors: not the order of model.parameters()."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.dim() <= 1], "lr": 0.02, "hess_init": 0.6},
    ]


def backward(model: nn.Sequential, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64).to(model[0].weight.dtype)
    model.zero_grad()
    (model(x) - x[:, :2].sin()).square().mean().backward()


def saved(state_dict: dict) -> dict:
    """Through a file, as a user has it; nothing is unpickled but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def their_run(model: nn.Sequential, params=None, **changes):
    torch.manual_seed(1)
    opt = ivon.IVON(params or model.parameters(), **SETTINGS | changes)
    for i in range(STEPS):
        with opt.sampled_params(train=True):
            backward(model, i)
        opt.step()
    return opt


def ours(model: nn.Sequential, params=None, **changes) -> IVON:
    return IVON(params or model.parameters(), 1.0, ess=1.0, seed=0, **changes)


def error(a, b) -> float:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).abs().max() / b.abs().max())


def state(opt: IVON, name: str) -> list[torch.Tensor]:
    return [
        torch.cat([opt.state[p][name].flatten() for p in group["params"]])
        for group in opt.param_groups
    ]


@pytest.mark.parametrize("grouped", [False, True])
def test_load_takes_over_state_and_settings(grouped):
    theirs = network()
    checkpoint = saved(their_run(theirs, groups(theirs) if grouped else None).state_dict())
    model = network()
    opt = ours(model, groups(model) if grouped else None)
    before = copy.deepcopy(checkpoint)
    ivon_opt.load(opt, checkpoint, steps=STEPS)
    for name in ("momentum", "hess"):
        for flat, source in zip(state(opt, name), checkpoint["param_groups"], strict=True):
            assert torch.equal(flat, source[name])
    for group, source in zip(opt.param_groups, checkpoint["param_groups"], strict=True):
        for name in ("lr", "ess", "hess_init", "weight_decay", "clip_radius"):
            assert group[name] == source[name]
        assert group["betas"] == (0.8, 0.97)
    assert all(opt.state[p]["step"].item() == STEPS for p in model.parameters())
    assert opt.param_groups[-1]["lr"] == (0.02 if grouped else 0.07)
    assert str(checkpoint) == str(before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("theirs_only", "ours_only"),
    [
        ({}, {}),
        ({"hess_approx": "gradsq"}, {"hess_approx": "gradsq", "gradsq_scale": SETTINGS["ess"]}),
        ({"rescale_lr": False}, {"rescale_lr": False}),
        ({"debias": False}, {"debias": False}),
    ],
    ids=["price", "gradsq", "unscaled", "biased"],
)
def test_the_next_steps_are_those_of_the_package(
    dtype, bound, grouped, theirs_only, ours_only, monkeypatch
):
    """At the same perturbed weights the three next steps are the same; two samples each.

    The package has its own noise, so what it drew is put in the place of ours.
    """
    drawn: dict[tuple[int, int], torch.Tensor] = {}
    monkeypatch.setattr(noise.Noise, "__iter__", lambda s: (drawn[s.draw, n] for n in s.numbers))
    theirs = network(dtype)
    reference = their_run(theirs, groups(theirs) if grouped else None, **theirs_only)
    model = copy.deepcopy(theirs)
    opt = ours(model, groups(model) if grouped else None, fused=False, **ours_only)
    ivon_opt.load(opt, saved(reference.state_dict()), steps=STEPS)
    order = [p for group in opt.param_groups for p in group["params"]]
    posterior = opt.posterior(model)
    for i in range(STEPS, STEPS + 3):
        for k in range(2):
            with reference.sampled_params(train=True):
                backward(theirs, 10 * i + k)
                sample = dict(theirs.named_parameters())
                for name, p in model.named_parameters():  # ε = (θ−m)/σ
                    offset = sample[name].detach() - p.detach()
                    number = next(n for n, q in enumerate(order) if q is p)
                    drawn[opt.param_groups[0]["draws"], number] = offset / posterior.std()[name]
            with opt.sampled_params(train=True):
                backward(model, 10 * i + k)
        reference.step()
        opt.step()
        posterior = opt.posterior(model)
        for name in ("momentum", "hess"):
            for a, group in zip(state(opt, name), reference.param_groups, strict=True):
                assert error(a, group[name]) <= bound
        a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, theirs))
        assert error(a, b) <= bound


def test_the_step_count_matters():
    """With the wrong count the next step is another one: why `steps` has no default."""
    results = []
    for steps in (1, STEPS, 10_000):
        model = network()
        opt = ours(model)
        ivon_opt.load(opt, their_run(network()).state_dict(), steps=steps)
        with opt.sampled_params(train=True):
            backward(model, 0)
        opt.step()
        results.append(model[0].weight.detach().clone())
    assert not torch.allclose(results[0], results[1], rtol=1e-3)
    assert not torch.allclose(results[1], results[2], rtol=1e-3)


def test_training_goes_on_after_the_import():
    model = network(torch.float32)
    checkpoint = saved(their_run(model).state_dict())
    opt = ours(model)
    ivon_opt.load(opt, checkpoint, steps=STEPS)
    again = ours(copy.deepcopy(model))
    again.load_state_dict(opt.state_dict())  # a state of ours like any other
    for _ in range(3):
        with opt.sampled_params(train=True):
            backward(model, 0)
        opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.state[model[0].weight]["step"].item() == STEPS + 3


def test_low_precision_parameters_get_float32_state():
    model = network()
    checkpoint = saved(their_run(model).state_dict())
    low = copy.deepcopy(model).bfloat16()
    opt = ours(low)
    ivon_opt.load(opt, checkpoint, steps=STEPS)
    (hess,) = state(opt, "hess")
    assert hess.dtype == torch.float32
    assert torch.equal(hess, checkpoint["param_groups"][0]["hess"].float())


def test_frozen_parameters_take_their_place_in_the_vectors():
    model = network()
    checkpoint = saved(their_run(model).state_dict())
    model[0].weight.requires_grad_(False)
    opt = ours(model)
    ivon_opt.load(opt, checkpoint, steps=STEPS)
    assert not opt.state[model[0].weight]
    hess = checkpoint["param_groups"][0]["hess"]
    assert torch.equal(opt.state[model[0].bias]["hess"], hess[24:32])
    q = ivon_opt.posterior(checkpoint, model)
    assert "0.weight" not in q.names
    assert torch.equal(q.buffers["0.weight"], model[0].weight)


def test_a_schedule_goes_on():
    """From the rate it had begun with, which it leaves in the groups, not the one it reached."""
    theirs = their_run(model := network())
    rate = torch.optim.lr_scheduler.LambdaLR(theirs, lambda t: 1 / (1 + t))
    for i in range(3):
        with theirs.sampled_params(train=True):
            backward(model, i)
        theirs.step()
        rate.step()
    opt = ours(network())
    ivon_opt.load(opt, saved(theirs.state_dict()), steps=STEPS)
    assert opt.param_groups[0]["lr"] == pytest.approx(SETTINGS["lr"] / 4)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t), last_epoch=3)
    assert opt.param_groups[0]["lr"] == pytest.approx(SETTINGS["lr"] / 5)


def test_a_tensor_lr_stays_a_tensor():
    model = network()
    opt = IVON(model.parameters(), torch.tensor(1.0), ess=1.0, seed=0)
    ivon_opt.load(opt, their_run(model).state_dict(), steps=STEPS)
    assert torch.equal(opt.param_groups[0]["lr"], torch.tensor(0.07))


# -- as a posterior --------------------------------------------------------------------------------


def test_posterior_has_the_weights_and_the_precision():
    model = network()
    checkpoint = saved(their_run(model).state_dict())
    q = ivon_opt.posterior(checkpoint, model)
    assert q.names == tuple(name for name, _ in model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(q.mean[name], p)
    (group,) = checkpoint["param_groups"]
    flat = torch.cat([q.precision[name].flatten() for name in q.names])
    assert error(flat, 60.0 * (group["hess"] + 0.02)) < 1e-14
    assert q.ess == 60.0
    assert q.prior_precision is not None
    assert q.prior_precision["0.weight"].item() == pytest.approx(60.0 * 0.02)
    assert "2.running_mean" in q.buffers
    random = torch.get_rng_state()
    ivon_opt.posterior(checkpoint, model)
    assert torch.equal(random, torch.get_rng_state())


def test_posterior_of_groups_needs_them():
    model = network()
    checkpoint = saved(their_run(model, groups(model)).state_dict())
    with pytest.raises(ValueError, match="several groups"):
        ivon_opt.posterior(checkpoint, model)
    q = ivon_opt.posterior(checkpoint, model, groups(model))
    for group, source, delta in zip(
        groups(model), checkpoint["param_groups"], (0.05, 0.02), strict=True
    ):
        names = [n for p in group["params"] for n, own in model.named_parameters() if own is p]
        flat = torch.cat([q.precision[n].flatten() for n in names])
        assert error(flat, 60.0 * (source["hess"] + delta)) < 1e-14


def test_posterior_predicts_like_the_package_samples():
    """Spread of the network's outputs over 1,000 samples of either: within standard errors."""
    model = network()
    opt = their_run(model)
    q = ivon_opt.posterior(saved(opt.state_dict()), model.eval())
    x, ours, theirs = torch.ones(1, 3, dtype=torch.float64), [], []
    torch.manual_seed(5)
    with torch.no_grad():
        for i in range(1000):
            with q.sampled(model, seed=0, index=i):
                ours.append(model(x)[0])
            with opt.sampled_params():
                theirs.append(model(x)[0])
    a, b = torch.stack(ours), torch.stack(theirs)
    error = ((a.var(0) + b.var(0)) / 1000).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()
    moved = [(z - z.mean(0)).square() for z in (a, b)]
    error = (sum(m.var(0) for m in moved) / 1000).sqrt()
    assert ((moved[0].mean(0) - moved[1].mean(0)).abs() < 4 * error).all()


# -- what is wrong says so, and changes nothing ----------------------------------------------------


def damaged(change):
    model = network()
    checkpoint = saved(their_run(model).state_dict())
    change(checkpoint)
    return model, checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("param_groups"), "needs 'state' and 'param_groups'"),
        (lambda c: c["param_groups"].clear(), "no groups"),
        (lambda c: c["param_groups"][0].pop("hess"), "group 0 has no hess"),
        (lambda c: c["param_groups"][0].pop("beta2"), "group 0 has no beta2"),
        (lambda c: c["param_groups"][0].update(hess=1.0), "must be vectors"),
        (lambda c: c["param_groups"].append(c["param_groups"][0]), "groups"),
        (lambda c: c["param_groups"][0].update(hess=torch.ones(3)), "another model's checkpoint"),
        (lambda c: c["param_groups"][0]["hess"].fill_(math.nan), "not finite"),
        (lambda c: c["param_groups"][0].update(ess=-1.0), "ess > 0"),
        (lambda c: c["state"].update(count=2), "between a sample and its step"),
    ],
)
def test_damaged_checkpoints(change, message):
    model, checkpoint = damaged(change)
    opt = ours(model)
    before = str(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        ivon_opt.load(opt, checkpoint, steps=STEPS)
    assert str(opt.state_dict()) == before
    with pytest.raises(ValueError, match=message):
        ivon_opt.posterior(checkpoint, model)


def test_foreign_checkpoints_and_wrong_models():
    model = network()
    adam = torch.optim.AdamW(model.parameters())
    for foreign in (adam.state_dict(), ours(model).state_dict(), model.state_dict(), None, [1]):
        with pytest.raises(ValueError, match="not a checkpoint of ivon-opt"):
            ivon_opt.load(ours(model), foreign, steps=1)
    checkpoint = their_run(network()).state_dict()
    with pytest.raises(ValueError, match="another model's checkpoint"):
        ivon_opt.posterior(checkpoint, nn.Linear(3, 2))


def test_zero_steps_only_for_an_untrained_run():
    model = network()
    with pytest.raises(ValueError, match="steps=0"):
        ivon_opt.load(ours(model), their_run(model).state_dict(), steps=0)
    fresh = ivon.IVON(model.parameters(), **SETTINGS)
    ivon_opt.load(ours(model), fresh.state_dict(), steps=0)
    with pytest.raises(ValueError, match="steps=-1"):
        ivon_opt.load(ours(model), fresh.state_dict(), steps=-1)


def test_a_mid_window_sample_survives_a_faulty_checkpoint():
    model = network()
    opt = ours(model)
    opt.train()
    here = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="not a checkpoint"):
        ivon_opt.load(opt, {}, steps=1)
    assert torch.equal(model[0].weight, here)
    opt.eval()
