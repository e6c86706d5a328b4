"""Faults seen elsewhere, and points that bite: each has a test that it does not occur here."""

import copy
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from posterity import IVON, predict, window
from posterity.ops import noise, reference
from posterity.presets import PRESETS
from ways import (
    LR,
    WAYS,
    X,
    Y,
    assert_same,
    backward,
    bits,
    closure,
    context,
    loss,
    make,
    network,
    through_bytes,
    train,
    weights,
)

torch.set_num_threads(1)
BF16, F64 = torch.bfloat16, torch.float64
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# -- in the place of SGD -------------------------------------------------------------------------


QUIET = {"ess": 1e12, "hess_init": 1e9, "beta2": 1 - 1e-9, "seed": 0}  # no noise, and h stays


def test_from_sgd_makes_its_steps_where_there_is_no_noise():
    """Each group by its own settings; weight decay is decoupled, so it is left out here."""
    ours, theirs = network(), network()

    def sgd(model):
        groups = [
            {"params": model[0].parameters(), "momentum": 0.8},
            {"params": model[2].parameters(), "lr": 0.02},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    opt, other = IVON.from_sgd(sgd(ours), **QUIET), sgd(theirs)
    for _ in range(30):
        context(opt, partial(backward, ours))
        other.zero_grad()
        backward(theirs)
        other.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_from_sgd_keeps_groups_names_and_weight_decay():
    model = network()
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    opt = IVON.from_sgd(sgd, ess=100, clip_radius=0.5, beta2=0.999)
    (group,) = opt.param_groups
    assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert group["lr"] == pytest.approx(1.0)
    found = [group[k] for k in ("betas", "weight_decay", "ess", "clip_radius", "debias")]
    assert found == [(0.9, 0.999), 5e-4, 100, 0.5, False]


@pytest.mark.parametrize(
    "odd", [{"nesterov": True}, {"maximize": True}, {"dampening": 0.1}], ids=str
)
def test_from_sgd_refuses_what_ivon_has_not(odd):
    sgd = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9, **odd)
    with pytest.raises(ValueError, match=f"IVON has no {next(iter(odd))}"):
        IVON.from_sgd(sgd, ess=100)


def from_adamw(adamw, task="finetuning", **settings):
    return IVON.from_adamw(adamw, task, n_train=500, steps=100, **settings)


def test_from_adamw_moves_a_weight_by_adamws_rate_at_most():
    """That far where gradients agree and outweigh h; in each group, under a schedule."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-5}]
    opt = from_adamw(torch.optim.AdamW(groups, lr=1e-4), seed=0)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5)
    before = [w.clone() for w in weights(model)]
    for _ in range(30):
        with opt.sampled_params(train=True):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-5)  # not so large that h grows to match
        opt.step()
    moved = [float((b - a).max()) for a, b in zip(weights(model), before, strict=True)]
    assert moved == pytest.approx([30 * 0.5e-4] * 2 + [30 * 1.5e-5] * 2, rel=0.02)


@pytest.mark.parametrize(("rate", "colder"), [(1.5e-5, 16.0), (6e-5, 1.0), (3e-4, 1.0)])
def test_from_adamw_has_its_tasks_settings_and_less_noise_where_steps_are_shorter(rate, colder):
    model = network()
    opt = from_adamw(torch.optim.AdamW(model.named_parameters(), lr=torch.tensor(rate)), seed=4)
    expected = IVON.defaults_for("finetuning", 500, 100) | {"seed": 4}
    (group,) = opt.param_groups
    assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert float(group["lr"]) == pytest.approx(rate / expected["clip_radius"])
    assert group["ess"] == pytest.approx(colder * expected["ess"])
    for name in expected.keys() - {"lr", "ess"}:
        assert group[name] == expected[name], name


def test_from_adamw_takes_the_callers_settings_and_a_frozen_weight():
    model = network()
    model[0].bias.requires_grad_(False)
    opt = from_adamw(torch.optim.AdamW(model.parameters(), lr=1e-3), "lora", ess=3e4, fused=False)
    (group,) = opt.param_groups
    assert (group["ess"], group["fused"], group["weight_decay"]) == (3e4, False, 0.0)
    assert len(group["params"]) == 4


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [((0.01, 0.01), [1e-6, 1e-6]), ((0.0, 0.1), [0.0, 1e-6]), ((0.0, 0.0), [1e-6, 1e-6])],
)
def test_from_adamw_lets_a_group_that_alone_has_no_decay_have_none(theirs, ours):
    """Where none decays that is no choice, and a flat prior everywhere has no ELBO."""
    model = network()
    groups = [
        {"params": layer.parameters(), "weight_decay": decay}
        for layer, decay in zip((model[0], model[2]), theirs, strict=True)
    ]
    found = from_adamw(torch.optim.AdamW(groups)).param_groups
    assert [group["weight_decay"] for group in found] == ours


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_rate_that_carries_over_is_the_one_schedules_start_from(kind):
    other = getattr(torch.optim, kind)(network().parameters(), lr=1e-4)
    torch.optim.lr_scheduler.LambdaLR(other, lambda t: t / 100)  # it is 0 now
    opt = from_adamw(other) if kind == "AdamW" else IVON.from_sgd(other, ess=100)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 if kind == "AdamW" else 1e-4)


@pytest.mark.parametrize(
    ("odd", "task", "asked", "said"),
    [
        ({"amsgrad": True}, "finetuning", {}, "IVON has no amsgrad"),
        ({"maximize": True}, "finetuning", {}, "IVON has no maximize"),
        ({"lr": 0.0}, "finetuning", {}, "AdamW's lr is 0"),
        ({}, "vision", {}, "carries over for finetuning and lora: .*'vision'"),
        ({}, "speech", {}, "no settings for 'speech'"),
        *(
            ({}, "lora", {name: 0.1}, f"from_adamw sets {name} itself")
            for name in ("lr", "clip_radius", "rescale_lr", "weight_decay")
        ),
    ],
    ids=str,
)
def test_from_adamw_refuses_what_does_not_carry_over(odd, task, asked, said):
    with pytest.raises(ValueError, match=said):
        from_adamw(torch.optim.AdamW(network().parameters(), **odd), task, **asked)


@pytest.mark.parametrize("given", ["lr", "betas", "weight_decay"])
def test_from_sgd_refuses_a_setting_that_follows_from_sgds(given):
    sgd = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=f"from_sgd sets {given} itself"):
        IVON.from_sgd(sgd, ess=100, **{given: 0.1})


def test_each_takes_its_own_optimizer():
    sgd, adamw = (
        kind(network().parameters(), lr=0.1) for kind in (torch.optim.SGD, torch.optim.AdamW)
    )
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW, not SGD"):
        from_adamw(sgd)
    with pytest.raises(ValueError, match=r"torch\.optim\.SGD, not AdamW"):
        IVON.from_sgd(adamw, ess=100)


@pytest.mark.parametrize(("n_train", "steps"), [(0, 100), (500, 0), (-5, 100)])
def test_defaults_want_examples_and_steps(n_train, steps):
    with pytest.raises(ValueError, match=f"got {n_train} and {steps}"):
        IVON.defaults_for("finetuning", n_train, steps)


# -- hess_init="auto" ----------------------------------------------------------------------------


def test_auto_noise_begins_at_a_tenth_of_a_typical_weight():
    """In every group, whatever its λ and δ. Vectors, zeros and frozen weights are not typical."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[2].weight)
    model[3].requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "ess": 50.0},
        {"params": model[1:].parameters(), "ess": 500.0, "weight_decay": 0.3},
    ]
    opt = IVON(groups, lr=0.1, ess=1.0, hess_init="auto", seed=0)
    sizes = [float(model[k].weight.detach().double().square().mean().sqrt()) for k in (0, 1)]
    std = opt.posterior(model).std()
    width = 0.1 * math.sqrt(sizes[0] * sizes[1])
    for name, values in std.items():
        torch.testing.assert_close(values, torch.full_like(values, width), msg=name)
    found = [group["hess_init"] for group in opt.param_groups]
    assert found == pytest.approx([1 / (50 * width**2) - 1e-4, 1 / (500 * width**2) - 0.3])


def test_auto_is_a_number_in_checkpoints():
    model, opt = make(hess_init="auto")
    context(opt, partial(backward, model))
    _, its = make(hess_init="auto")
    its.load_state_dict(through_bytes(opt.state_dict()))
    assert its.param_groups[0]["hess_init"] == opt.param_groups[0]["hess_init"] != "auto"


def test_auto_waits_for_the_weights_that_a_checkpoint_brings():
    """Distributed checkpointing allocates state before it loads the weights."""
    model = network()
    loaded = {name: p.clone() for name, p in model.state_dict().items()}
    for p in model.parameters():
        nn.init.zeros_(p)
    opt = IVON(model.parameters(), lr=0.1, ess=10, hess_init="auto", seed=0)
    get_optimizer_state_dict(model, opt)
    assert opt.param_groups[0]["hess_init"] == "auto"
    model.load_state_dict(loaded)
    expected = IVON(model.parameters(), lr=0.1, ess=10, hess_init="auto").posterior(model).std()
    with opt.sampled_params(train=True):
        pass
    for name, values in opt.posterior(model).std().items():
        assert torch.equal(values, expected[name])


def test_auto_needs_weights():
    zeros = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.empty(0, 2))]
    opt = IVON(zeros, lr=0.1, ess=10, hess_init="auto")
    with pytest.raises(ValueError, match="not all zero"):
        opt.train()
    with pytest.raises(ValueError, match='hess_init "auto"'):
        IVON(zeros, lr=0.1, ess=10, hess_init="best")


# -- settings for kinds of tasks -------------------------------------------------------------------


@pytest.mark.parametrize("task", PRESETS)
def test_defaults_train_with_warm_up_and_decay(task):
    """Nothing is set but what a user knows; the loss falls, also averaged over samples.

    To a half where the task is one for small networks; the others expect small gradients, or to
    begin near the end.
    """
    torch.manual_seed(0)
    x, steps = torch.randn(512, 8), 400
    y = x[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    loss = nn.functional.cross_entropy
    opt = IVON(model.parameters(), **IVON.defaults_for(task, len(x), steps), seed=0)
    factor = [min((t + 1) / (0.05 * steps), 1 - t / steps) for t in range(steps + 1)]
    rate = torch.optim.lr_scheduler.LambdaLR(opt, factor.__getitem__)
    before = loss(model(x), y).item()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        for _ in range(opt.samples_due):
            with opt.sampled_params(train=True):
                opt.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
        opt.step()
        rate.step()
    probs = predict(model, opt.posterior(model), x, samples=16).probs
    most = before * {"language": 0.8, "finetuning": 0.97, "lora": 0.85}.get(task, 0.5)
    assert loss(model(x), y).item() < most
    assert -probs.gather(1, y[:, None]).log().mean().item() < most


def test_defaults_of_an_unknown_task_name_the_known_ones():
    with pytest.raises(
        ValueError,
        match="there are vision, plain, tabular, language, language_pairs, finetuning, lora",
    ):
        IVON.defaults_for("speech", 100, 10)


# -- what breaks in the reference package ----------------------------------------------------------


def test_step_counter_is_in_the_state_dict():
    model, opt = make()
    for _ in range(3):
        context(opt, partial(backward, model))
    saved = through_bytes(opt.state_dict())
    assert {int(state["step"]) for state in saved["state"].values()} == {3}
    again, its = make()
    again.load_state_dict(model.state_dict())
    its.load_state_dict(saved)
    for m, o in ((model, opt), (again, its)):
        context(o, partial(backward, m))  # debiasing by 1 − β1^t would show a lost t
    assert_same(bits(model, opt), bits(again, its))


def test_a_step_counter_of_another_dtype_or_place_is_put_right():
    """Frameworks move a state, some of them without its counter; the passes read it by address."""
    runs = []
    for changed in (False, True):
        model, opt = make()
        for _ in range(2):
            if changed:
                for state in opt.state.values():
                    state["step"] = state["step"].double()
            context(opt, partial(backward, model))
        runs.append(bits(model, opt))
    assert_same(*runs)


@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize("moved", [BF16, F64])
@pytest.mark.parametrize("how", ["eval", "load", "step", "eval, train, eval", "exception"])
def test_a_parameter_that_changes_its_dtype_under_a_sample_gets_its_mean_back(
    how, moved, store_mean
):
    if moved == BF16 and not store_mean:
        pytest.skip("such a parameter is refused")
    w = nn.Parameter(torch.linspace(1, 2, 300))
    opt = IVON([w], **{**LR, "lr": 1e-9, "ess": 10.0, "weight_decay": 0.0}, store_mean=store_mean)
    mean = w.detach().clone()
    if how == "exception":
        with suppress(ZeroDivisionError), opt.sampled_params(train=True):
            w.data = w.data.to(moved)
            _ = 1 / 0
    else:
        opt.train()
        assert (w - mean).abs().max() > 0.1
        if how == "eval, train, eval":
            opt.eval()
        w.data = w.data.to(moved)
        if how == "eval":
            opt.eval()
        elif how == "load":
            opt.load_state_dict(opt.state_dict())
        elif how == "step":
            w.grad = torch.zeros_like(w)
            opt.step()
        else:
            opt.train()
            assert (w - mean).abs().max() > 0.1
            opt.eval()
    assert (w.float() - mean).abs().max() < (1e-2 if moved == BF16 else 1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_exception_inside_the_context_restores_the_weights(training):
    model, opt = make()
    start = weights(model)
    with pytest.raises(ZeroDivisionError), opt.sampled_params(train=training):  # noqa: PT012
        loss(model)
        _ = 1 / 0
    assert_same(weights(model), start)


@each_way
def test_add_param_group_then_train(way):
    model, opt = make()
    way(opt, partial(backward, model))
    extra = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [extra]})
    for _ in range(2):
        way(opt, lambda: (loss(model) + (extra**2).sum()).backward())
    assert int(opt.state[extra]["step"]) == 2
    assert (extra < 1).all()


@each_way
def test_parameters_without_gradient_and_frozen_ones_are_left_alone(way):
    model = network()
    unused, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    opt = IVON([unused, frozen, *model.parameters()], **LR)
    seen = []
    for _ in range(3):
        way(opt, lambda: (seen.append(frozen.clone()), backward(model))[1])
    assert all((f == 1).all() for f in seen)  # not perturbed while a sample stands
    assert (frozen == 1).all()  # not decayed
    assert (unused == 1).all()
    assert frozen not in opt.state
    assert int(opt.state[unused]["step"]) == 0


def test_state_is_per_parameter():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, opt = make()
    context(opt, partial(backward, model))
    for p in model.parameters():
        state = opt.state[p]
        assert state.keys() == {"step", "momentum", "hess"}
        assert state["momentum"].shape == state["hess"].shape == p.shape
    saved = get_optimizer_state_dict(model, opt)
    assert saved["state"].keys() == {name for name, _ in model.named_parameters()}
    for group in opt.state_dict()["param_groups"]:  # checkpoints by name keep nothing else
        assert {"seed", "draws", "eval_draws", "pending"} <= group.keys()


@each_way
def test_several_dtypes_in_one_optimizer(way):
    params = [nn.Parameter(torch.ones(3, dtype=d)) for d in (BF16, torch.float32, F64)]
    opt = IVON(params, **LR)
    for _ in range(2):
        way(opt, lambda: sum((p**2).sum().double() for p in params).backward())
    assert all((p < 1).all() for p in params)
    drawn = []
    with opt.sampled_params():
        drawn.extend(p.detach().double() for p in params)
    assert all(bool(d.isfinite().all()) for d in drawn)


def test_plain_backward_and_step_is_a_clear_error():
    model, opt = make()
    start = weights(model)
    backward(model)
    with pytest.raises(RuntimeError, match=r"sampled_params\(train=True\)"):
        opt.step()
    assert_same(weights(model), start)


def test_step_of_a_closure_samples():
    model, opt = make(mc_samples=3)
    mean, seen = weights(model), []

    def evaluate():
        opt.zero_grad()
        seen.append(weights(model))
        return backward(model)

    opt.step(evaluate)
    assert len(seen) == 3
    for a, b in itertools.combinations([mean, *seen], 2):
        assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_way
def test_gradient_accumulation_gives_the_big_batch(way):
    model, opt = make(dtype=F64)
    other, expected = make(dtype=F64)
    thirds = [slice(i, i + 8) for i in (0, 8, 16)]
    for _ in range(3):
        way(opt, lambda: sum(backward(model, rows, 1 / 3).detach() for rows in thirds))
        way(expected, partial(backward, other))
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_grad_scaler_gives_the_unscaled_values():
    model, opt = make()
    other, expected = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for way in (context, train):
        for _ in range(2):
            opt.zero_grad()
            if way is train:
                opt.train()
                scaler.scale(loss(model)).backward()
            else:
                with opt.sampled_params(train=True):
                    scaler.scale(loss(model)).backward()
            scaler.step(opt)
            scaler.update()
            way(expected, partial(backward, other))
    assert_same(bits(model, opt), bits(other, expected))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    paths = [str(here), *sys.path]
    subprocess.run(
        [sys.executable, str(here / "ranks.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        check=True,
        timeout=300,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("approx", ["price", "gradsq", "capturable"])
@each_way
def test_data_parallel_ranks_stay_one(ranks, way, approx):
    """Different seeds become rank 0's; the gradients' mean is the whole batch's."""
    name = next(f"{approx} {n}" for n, w in WAYS.items() if w is way)
    first, second = (found[name] for found in ranks)
    assert first == second
    chosen = {"hess_approx": approx, "gradsq_scale": 24.0} if approx == "gradsq" else {}
    model, opt = make(**chosen)
    for _ in range(3):
        way(opt, partial(backward, model))
    for key, value in bits(model, opt).items():
        found = torch.tensor(first[key], dtype=F64)
        torch.testing.assert_close(found, value.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_data_parallel_ranks_draw_the_same_pairs(ranks):
    first, second = (found["pairs closure"] for found in ranks)
    assert first == second
    model, opt = make(mc_samples=2, antithetic=True, hess_every=2)
    for _ in range(3):
        closure(opt, partial(backward, model))
    for key, value in bits(model, opt).items():
        found = torch.tensor(first[key], dtype=F64)
        torch.testing.assert_close(found, value.double(), rtol=1e-4, atol=1e-5)


def test_betas_are_in_the_defaults():
    _, opt = make()
    assert opt.defaults["betas"] == LR["betas"]
    OneCycleLR(opt, max_lr=1.0, total_steps=10)
    parameters = {
        *("lr", "ess", "hess_init", "betas", "weight_decay", "mc_samples", "hess_approx"),
        *("gradsq_scale", "clip_radius", "rescale_lr", "debias", "antithetic", "fused"),
        *("store_mean", "samples", "capturable", "seed", "hess_every"),
    }
    assert parameters <= opt.defaults.keys()
    assert parameters <= opt.param_groups[0].keys()


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("store_mean", [True, False])
def test_parameters_are_never_rebound(way, dtype, store_mean):
    if dtype == BF16 and not store_mean:
        return
    model, opt = make(dtype=dtype, store_mean=store_mean)
    places = [p.data_ptr() for p in model.parameters()]

    def here():
        assert [p.data_ptr() for p in model.parameters()] == places

    for _ in range(2):
        way(opt, lambda: (here(), backward(model))[1], here)
        here()
        with opt.sampled_params():
            here()
        opt.load_state_dict(through_bytes(opt.state_dict()))
        here()


@each_way
def test_hess_is_kept_in_float32_for_bfloat16_parameters(way):
    """At β2 = .99999 a step of h is far below bfloat16's resolution."""
    model, opt = make(dtype=BF16, betas=(0.9, 0.99999))
    for _ in range(3):
        way(opt, partial(backward, model))
    hess = opt.state[model[0].weight]["hess"]
    assert hess.dtype == torch.float32
    assert (hess != LR["hess_init"]).all()
    assert torch.equal(hess.to(BF16), torch.full_like(hess, LR["hess_init"]).to(BF16))


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64])
def test_a_state_that_is_saved_before_the_step_has_no_history(dtype):
    model, opt = make(dtype=dtype, fused=False)
    with opt.sampled_params(train=True):
        opt.zero_grad()
        backward(model)
    saved = copy.deepcopy(opt.state_dict())
    opt.step()
    for state in (*saved["state"].values(), *opt.state.values()):
        assert not any(value.requires_grad for value in state.values())


def test_load_state_dict_keeps_float32():
    model, opt = make(dtype=BF16)
    for _ in range(3):
        context(opt, partial(backward, model))
    kept = bits(model, opt)
    opt.load_state_dict(through_bytes(opt.state_dict()))
    assert_same(bits(model, opt), kept)
    assert kept["hess 0"].dtype == kept["mean 0"].dtype == torch.float32


# -- what bites (design.md, section 3) -------------------------------------------------------------


def live(opt):
    opt.train()


def left(opt):
    opt.eval()


def stepped(opt):
    opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize(
    "writes",
    [
        [[], [live]],
        [[live], [left]],
        [[live, lambda opt: backward(opt.model)], [stepped]],
        [[], ["enter"]],
        [["enter"], ["exit"]],
    ],
    ids=["sample", "restore", "step", "evaluation sample", "evaluation restore"],
)
def test_a_backward_after_a_write_raises(writes, store_mean, dtype):
    """Every write to a weight shows in autograd's version counters."""
    if dtype == BF16 and not store_mean:
        return
    model, opt = make(dtype=dtype, store_mean=store_mean)
    opt.model = model
    evaluation = opt.sampled_params()
    acts = {
        "enter": lambda _: evaluation.__enter__(),
        "exit": lambda _: evaluation.__exit__(None, None, None),
    }
    before, after = writes
    for act in before:
        acts.get(act, act)(opt)
    value = loss(model)
    for act in after:
        acts.get(act, act)(opt)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_second_sample_inside_one_autocast_region_is_new():
    """Autocast caches low-precision copies of the weights: every write drops them."""
    model, opt = make()

    def seen():
        """The output inside the region, and what the weights that stand now would give."""
        with torch.no_grad():
            fresh = network()
            fresh.load_state_dict(model.state_dict())
        return model(X), fresh(X)

    outputs = []
    with torch.autocast("cpu", BF16):
        outputs.append(seen())
        for _ in range(2):
            with opt.sampled_params(train=True):
                outputs.append(seen())
                outputs[-1][0].square().mean().backward()
            outputs.append(seen())
        with opt.sampled_params():
            outputs.append(seen())
        outputs.append(seen())
        opt.step()
        outputs.append(seen())
        opt.zero_grad()
        opt.train()
        outputs.append(seen())
        opt.eval()
        outputs.append(seen())
        opt.train()
        outputs.append(seen())
        outputs[-1][0].square().mean().backward()
        opt.step()
        outputs.append(seen())
    for found, expected in outputs:
        assert torch.equal(found, expected)
    assert not torch.equal(outputs[1][0], outputs[3][0])


def test_the_autocast_test_can_fail(monkeypatch):
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    with pytest.raises(AssertionError):
        test_a_second_sample_inside_one_autocast_region_is_new()


def test_a_replayed_graph_draws_fresh_noise():
    """The draw counter is an input of the graph, not a constant in it."""

    def draw(counter):
        return noise.normals(noise.draw_key(3, counter), [0, 5], [7, 300])

    graph = make_fx(draw)(torch.tensor(0))
    for number in (0, 1, 2**33 + 5, -1):
        found = graph(torch.tensor(number))
        for a, b in zip(found, draw(number), strict=True):
            assert torch.equal(a, b)


class NoHostSync(TorchDispatchMode):
    """Raises where a value would travel to the host, which a CUDA graph cannot replay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a tensor's value was read on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chosen", [{}, {"store_mean": False}, {"dtype": BF16}])
def test_capturable_counters_advance_in_place(chosen):
    """As tensors, so that a replayed graph advances them too; nothing is read on the host."""
    model, opt = make(**chosen, capturable=True, lr=torch.tensor(0.3))
    train(opt, partial(backward, model))  # the warm-up makes the state
    group, states = opt.param_groups[0], [opt.state[p] for p in model.parameters()]
    fixed = [group["draws"], *(s[k] for s in states for k in ("step", "momentum", "hess"))]
    assert all(isinstance(t, torch.Tensor) for t in fixed)
    places = [t.data_ptr() for t in fixed]
    opt.zero_grad()
    with NoHostSync():
        opt.train()
        backward(model)
        opt.step()
    now = [group["draws"], *(s[k] for s in states for k in ("step", "momentum", "hess"))]
    assert all(a is b for a, b in zip(now, fixed, strict=True))
    assert [t.data_ptr() for t in now] == places
    assert [int(group["draws"]), *(int(s["step"]) for s in states)] == [2] * 5
    assert all(g["draws"] is group["draws"] for g in opt.param_groups)


def test_capturable_counters_follow_into_new_groups_and_copies():
    import copy

    model, opt = make(capturable=True)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    for o in (opt, copy.deepcopy(opt)):
        first, second = o.param_groups
        assert first["draws"] is second["draws"]
        assert first["eval_draws"] is second["eval_draws"]
    opt.load_state_dict(through_bytes(opt.state_dict()))
    assert opt.param_groups[0]["draws"] is opt.param_groups[1]["draws"]
    context(opt, partial(backward, model))
    assert int(opt.param_groups[1]["draws"]) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_training():
    results = []
    for captured in (False, True):
        model = network().cuda()
        opt = IVON(model.parameters(), **LR, capturable=True)
        x, y = X.cuda(), Y.cuda()

        def once(model=model, opt=opt, x=x, y=y):
            opt.zero_grad()
            opt.train()
            (model(x) - y).square().mean().backward()
            opt.step()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            opt.zero_grad()
            with torch.cuda.graph(graph):
                once()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                once()
        torch.cuda.synchronize()
        results.append(bits(model, opt))
    assert_same(*results)


def test_grad_scaler_leaves_the_skipping_to_step():
    """Otherwise it would skip step() and leave the live sample in the weights."""
    model, opt = make()
    start = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.train()
    scaler.scale(loss(model) * math.inf).backward()
    scaler.step(opt)
    scaler.update()
    assert_same(weights(model), start)
    assert scaler.get_scale() == 2.0


# -- what is not trained: a clear error or a defined result ----------------------------------------


@each_way
def test_sparse_gradients_are_a_clear_error(way):
    table = nn.Embedding(5, 3, sparse=True)
    opt = IVON(table.parameters(), **LR)
    start = table.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"dense gradients.*parameter 0.*\(5, 3\)"):
            way(opt, lambda: table(torch.tensor([1, 2])).sum().backward())
        assert torch.equal(table.weight, start)
    assert not opt.state[table.weight]["momentum"].any()


def test_sparse_gradients_of_several_samples_are_a_clear_error():
    table = nn.Embedding(5, 3, sparse=True)
    opt = IVON(table.parameters(), **LR)
    with opt.sampled_params(train=True):
        table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"), opt.sampled_params(train=True):
        pass


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_a_clear_error(dtype):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match="complex"):
        IVON([p], **LR)
    p.requires_grad_(False)
    _, opt = make()
    opt.add_param_group({"params": [p]})  # a frozen one may be anything
    p.requires_grad_(True)
    with pytest.raises(ValueError, match="complex"):
        opt.train()


@each_way
def test_frozen_integer_parameters_are_left_alone(way):
    """Quantised models have them."""
    codes = nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False)
    model = network()
    opt = IVON([codes, *model.parameters()], **LR)
    way(opt, partial(backward, model))
    assert codes.tolist() == [0, 1, 2]
    opt.load_state_dict(through_bytes(opt.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_parameters_are_a_clear_error(dtype):
    with pytest.raises(ValueError, match="float8"):
        IVON([nn.Parameter(torch.zeros(2).to(dtype))], **LR)


def test_a_parameter_that_stands_twice_is_a_clear_error():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),  # torch's own
        pytest.raises(ValueError, match="pass each once"),
    ):
        IVON([*first.parameters(), *second.parameters()], **LR)


def test_meta_parameters_are_a_clear_error():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="to_empty"):
        IVON(model.parameters(), **LR)


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.integers(0, 14), min_size=1, max_size=6),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from([torch.float32, BF16]),
    st.sampled_from(sorted(WAYS)),
)
def test_a_nan_gradient_stays_in_its_elements(spoilt, value, dtype, way):
    """Visible in exactly those elements' mean, momentum and Hessian; all others as without it."""
    expected, found = {}, {}
    for into, poison in ((expected, False), (found, True)):
        model, opt = make(dtype=dtype)
        WAYS[way](opt, partial(backward, model))

        def spoil(model=model, poison=poison):
            if poison:
                model[0].weight.grad.view(-1)[sorted(spoilt)] = value

        WAYS[way](opt, partial(backward, model), spoil)
        into.update(bits(model, opt))
    mask = torch.zeros(15, dtype=torch.bool)
    mask[sorted(spoilt)] = True
    mask = mask.view(5, 3)
    for name in expected:
        if name in ("param 0", "momentum 0", "hess 0", "mean 0"):
            assert not found[name][mask].isfinite().any(), name
            assert torch.equal(found[name][~mask], expected[name][~mask]), name
        else:
            assert torch.equal(found[name], expected[name]), name


BAD = {
    "a finite lr >= 0": [{"lr": -1.0}, {"lr": math.nan}, {"lr": torch.tensor(-1.0)}],
    "a finite ess > 0": [{"ess": 0}, {"ess": -5}, {"ess": math.inf}, {"ess": math.nan}],
    "a finite hess_init >= 0": [{"hess_init": -0.1}, {"hess_init": math.inf}],
    "0 <= betas[0] < 1": [{"betas": (1.0, 0.9)}, {"betas": (-0.1, 0.9)}],
    "0 <= betas[1] < 1": [{"betas": (0.9, 1.0)}, {"betas": (0.9, -0.1)}],
    "a finite weight_decay >= 0": [{"weight_decay": -1e-4}, {"weight_decay": math.inf}],
    "hess_init + weight_decay > 0": [{"hess_init": 0.0, "weight_decay": 0.0}],
    "clip_radius > 0": [{"clip_radius": 0.0}, {"clip_radius": -1.0}, {"clip_radius": math.nan}],
    "0 <= seed < 2**63": [{"seed": -1}, {"seed": 2**63}],
    "a whole mc_samples >= 1": [{"mc_samples": 0}, {"mc_samples": 1.5}],
    "a whole hess_every >= 1": [{"hess_every": 0}, {"hess_every": 2.5}],
    "hess_every=1 with capturable=True": [{"hess_every": 2, "capturable": True}],
    "hess_approx": [{"hess_approx": "fisher", "gradsq_scale": 1.0}],
    "samples": [{"samples": "each"}],
    "a finite gradsq_scale > 0": [
        {"hess_approx": "gradsq"},
        {"hess_approx": "gradsq", "gradsq_scale": 0.0},
        {"hess_approx": "gradsq", "gradsq_scale": -1.0},
        {"hess_approx": "gradsq", "gradsq_scale": math.inf},
    ],
    "an even mc_samples": [{"antithetic": True}, {"antithetic": True, "mc_samples": 3}],
}


@pytest.mark.parametrize(
    "bad", [{"ess": "64"}, {"ess": None}, {"lr": None}, {"betas": 0.9}], ids=str
)
def test_settings_of_another_kind(bad):
    with pytest.raises(TypeError, match=next(iter(bad))):
        make(**bad)


def test_a_group_that_is_refused_is_not_kept():
    opt = make()[1]
    more = nn.Parameter(torch.zeros(2))
    for bad, error in (
        ({"lr": "0.1"}, TypeError),
        ({"betas": 0.9}, TypeError),
        ({"lr": -1}, ValueError),
    ):
        with pytest.raises(error):
            opt.add_param_group({"params": [more], **bad})
        assert len(opt.param_groups) == 1


@pytest.mark.parametrize("contexts", [1, 2])
def test_what_is_saved_after_lambda_changed_goes_on_alike(contexts):
    model, opt = make()
    for _ in range(contexts):
        with opt.sampled_params(train=True):
            opt.zero_grad()
            backward(model)
    opt.param_groups[0]["ess"] /= 4
    twin = copy.deepcopy(model)
    again = IVON(twin.parameters(), **LR)
    again.load_state_dict(through_bytes(opt.state_dict()))
    for each in (opt, again):
        each.step()
    assert_same(bits(twin, again), bits(model, opt))


def test_a_posterior_needs_names():
    model, opt = make()
    with pytest.raises(TypeError, match="named_parameters"):
        opt.posterior(model.parameters())


def test_the_checkpoint_of_another_optimizer_that_has_not_stepped():
    model, opt = make()
    before = copy.deepcopy(opt.param_groups[0]["lr"])
    with pytest.raises(ValueError, match="another optimizer's checkpoint"):
        opt.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    assert opt.param_groups[0]["lr"] == before


@pytest.mark.parametrize(("words", "bad"), [(w, b) for w, bads in BAD.items() for b in bads])
def test_settings_out_of_range(words, bad):
    with pytest.raises(ValueError, match="IVON needs") as error:
        make(**bad)
    message = str(error.value)
    assert words in message
    assert next(iter(bad)) in message.split("got")[1]
    whole = {"seed", "mc_samples", "samples", "antithetic", "hess_every"}
    if not whole & bad.keys():  # of a new group too, which then is not there
        _, opt = make()
        with pytest.raises(ValueError, match="IVON needs"):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], **bad})
        assert len(opt.param_groups) == 1


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_low_precision_needs_the_stored_mean(dtype):
    with pytest.raises(ValueError, match="store_mean=False"):
        make(dtype=dtype, store_mean=False)
    model, opt = make(store_mean=False)
    context(opt, partial(backward, model))
    model.to(dtype)
    with pytest.raises(ValueError, match="store_mean=False"):
        opt.train()


@pytest.mark.parametrize(
    "own",
    [
        {"seed": 7},
        {"store_mean": False},
        {"mc_samples": 2},
        {"capturable": True},
        {"hess_every": 2},
    ],
)
def test_settings_of_the_whole_optimizer_are_not_a_group_s(own):
    _, opt = make()
    name = next(iter(own))
    with pytest.raises(ValueError, match=f"{name}: set for the whole optimizer"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], **own})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match="whole optimizer"):
        IVON([{"params": [nn.Parameter(torch.ones(1))], **own}], **LR)


def test_an_optimizer_made_of_another_s_groups():
    model, opt = make()
    for _ in range(2):
        context(opt, partial(backward, model))
    again = IVON(opt.param_groups, **LR)
    group = again.param_groups[0]
    assert (group["draws"], group["eval_draws"], group["pending"]) == (0, 0, 0)
    train(again, partial(backward, model))


def test_fused_that_cannot_run_raises():
    _, opt = make()
    if "reference" in opt.implementation:
        with pytest.raises(RuntimeError, match="fused=True"):
            make(fused=True)
    _, opt = make(fused=False)
    assert "reference" in opt.implementation
    assert "fused=False" in opt.implementation


def test_a_seed_comes_from_torch_s_generator():
    torch.manual_seed(5)
    first = IVON([nn.Parameter(torch.ones(1))], 0.1, ess=1).param_groups[0]["seed"]
    second = IVON([nn.Parameter(torch.ones(1))], 0.1, ess=1).param_groups[0]["seed"]
    torch.manual_seed(5)
    again = IVON([nn.Parameter(torch.ones(1))], 0.1, ess=1).param_groups[0]["seed"]
    assert first == again != second


def test_training_takes_nothing_from_torch_s_generator():
    model, opt = make()
    state = torch.get_rng_state()
    closure(opt, partial(backward, model))
    with opt.sampled_params():
        pass
    assert torch.equal(torch.get_rng_state(), state)


# -- the posterior it hands over -------------------------------------------------------------------


def test_posterior_before_any_step():
    model, opt = make()
    posterior = opt.posterior(model)
    assert posterior.names == tuple(n for n, _ in model.named_parameters())
    assert_same(list(posterior.mean.values()), weights(model))
    for value in posterior.precision.values():
        torch.testing.assert_close(value, torch.full_like(value, 24 * (0.1 + 1e-2)))
    assert posterior.ess == 24


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_posterior_is_a_copy_in_the_state_s_precision(dtype):
    model, opt = make(dtype=dtype)
    closure(opt, partial(backward, model))
    posterior = opt.posterior(model)
    mean, precision = posterior.mean["0.weight"].clone(), posterior.precision["0.weight"].clone()
    wide = F64 if dtype == F64 else torch.float32
    assert mean.dtype == precision.dtype == wide
    assert torch.equal(mean.to(dtype), model[0].weight)
    torch.testing.assert_close(precision, 24 * (opt.state[model[0].weight]["hess"] + 1e-2))
    closure(opt, partial(backward, model))
    assert torch.equal(posterior.mean["0.weight"], mean)
    assert torch.equal(posterior.precision["0.weight"], precision)


def test_posterior_of_named_parameters_and_of_a_stranger():
    model, opt = make()
    names = opt.posterior(model).names
    assert opt.posterior(model.named_parameters()).names == names
    assert opt.posterior((f"module.{n}", p) for n, p in model.named_parameters()).names == names
    with pytest.raises(ValueError, match=r"model lacks.*0 \(5, 3\)"):
        opt.posterior(network())


def test_posterior_takes_buffers_and_untrained_parameters_along():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    opt = IVON(model.parameters(), **LR)
    train(opt, partial(backward, model))
    posterior = opt.posterior(model)
    assert "0.weight" not in posterior.names
    assert torch.equal(posterior.buffers["0.weight"], model[0].weight)
    assert torch.equal(posterior.buffers["1.running_mean"], model[1].running_mean)
    assert not opt.posterior(model.named_parameters()).buffers


def test_posterior_settings_are_plain():
    model, opt = make(lr=torch.tensor(0.25), capturable=True)
    closure(opt, partial(backward, model))
    (group,) = opt.posterior(model).settings["groups"]
    assert group["lr"] == 0.25
    assert group["draws"] == 1
    assert group["seed"] == LR["seed"]


def test_warnings_are_the_caller_s():
    model, opt = make()
    closure(opt, partial(backward, model))
    opt.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with opt.sampled_params(train=True):
            pass
        opt.step()
    assert [w.filename for w in caught] == [__file__]


def stepped(opt, w):
    with opt.sampled_params(train=True):
        w.grad = torch.ones_like(w)
    opt.step()


KEPT = []  # memory that was left: a pass that goes on there must fail a test, not crash it


def moved(t):
    """A copy of a tensor's data; whoever uses its old memory by address is found out."""
    copy = t.detach().clone()
    KEPT.append(t.detach().fill_(torch.nan))
    return copy


def another_layout(p, _):
    """The same memory, seen otherwise, and the same values."""
    values = p.detach().clone()
    p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
    assert torch.equal(p, values)


STATE = ("momentum", "hess", "step")
MOVES = {
    "a parameter": lambda p, _: setattr(p, "data", moved(p)),
    "a parameter, to columns": another_layout,
    **{f"{n}, replaced": lambda _, s, n=n: s.update({n: moved(s[n])}) for n in STATE},
    **{f"data of {n}": lambda _, s, n=n: setattr(s[n], "data", moved(s[n])) for n in STATE},
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("when", ["at rest", "before the gradients", "before the step"])
@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_memory_that_moves_is_followed(move, store_mean, when, fused):
    """Addresses are kept between steps: the same tensor may stand elsewhere at the next one."""

    def run(move):
        model, opt = make(store_mean=store_mean, fused=fused)
        for _ in range(3):
            opt.train()
            for at in ("before the gradients", "before the step", "at rest"):
                if at == when:
                    move(p := next(model.parameters()), opt.state[p])
                if at == "before the gradients":
                    opt.zero_grad()  # some processors multiply matrices otherwise by columns
                    sum((p * p * p).sum() for p in model.parameters()).backward()
                if at == "before the step":
                    opt.step()
        return weights(model)

    assert_same(run(move), run(lambda *_: None))


def test_the_same_memory_in_another_order_is_noticed():
    found = []
    for fused in (None, False):
        w = torch.nn.Parameter(torch.arange(9.0).view(3, 3).clone())
        opt = IVON([w], 0.1, ess=1e3, seed=0, fused=fused)
        for _ in range(3):
            opt.train()
            w.grad = torch.arange(9.0).view(3, 3).sqrt()
            opt.step()
            w.data = w.data.t()
        found.append(w.detach())
    torch.testing.assert_close(*found)


def another_parameter(groups, new):
    groups[0]["params"][0] = new


REGROUPED = {  # what is done to groups of a, b and, at lr 0, c; and what then still moves
    "the last of a group, to the next": (
        lambda groups, _: groups[1]["params"].insert(0, groups[0]["params"].pop()),
        "a",
    ),
    "a group, replaced": (lambda groups, _: groups.__setitem__(0, {**groups[0], "lr": 0.0}), ""),
    "groups in another order": (lambda groups, _: groups.reverse(), "ab"),
    "a parameter, replaced": (another_parameter, "bd"),
}


@pytest.mark.parametrize(("change", "moves"), REGROUPED.values(), ids=REGROUPED)
def test_groups_that_change_are_noticed(change, moves):
    params = {name: torch.nn.Parameter(torch.ones(3)) for name in "abcd"}
    a, b, c, d = params.values()
    opt = IVON([{"params": [a, b]}, {"params": [c], "lr": 0.0}], 0.1, ess=1e6, seed=0)

    def step():
        opt.train()
        for p in params.values():
            p.grad = torch.ones(3)
        opt.step()
        return {name: p.detach().clone() for name, p in params.items()}

    before = step()
    change(opt.param_groups, d)
    now = step()
    assert "".join(n for n in params if (now[n] - before[n]).abs().max() > 1e-3) == moves


def test_master_weights_that_move_are_followed():
    found = []
    for move in (lambda _: None, lambda s: s.update(mean=moved(s["mean"]))):
        model, opt = make(BF16)
        for _ in range(3):
            opt.train()
            opt.zero_grad()
            loss(model).backward()
            opt.step()
            move(opt.state[next(model.parameters())])
        found.append(weights(model))
    assert_same(*found)


@pytest.mark.parametrize("store_mean", [True, False])
def test_a_closure_that_moves_a_parameter_and_fails_leaves_the_mean(store_mean):
    model, opt = make(store_mean=store_mean)
    start, p = weights(model), next(model.parameters())
    opt.train()

    def fail():
        p.data = moved(p)
        raise MemoryError

    with pytest.raises(MemoryError):
        opt.step(fail)
    for ours, mean in zip(weights(model), start, strict=True):
        torch.testing.assert_close(ours, mean, rtol=1e-6, atol=1e-7)


def test_a_parameter_of_another_shape_is_noticed_by_the_step_and_by_the_checkpoint():
    for replaced in (torch.zeros(3), torch.zeros(3, 2)):
        w = torch.nn.Parameter(torch.zeros(2, 3))
        opt = IVON([w], 0.1, ess=10.0, seed=0)
        with opt.sampled_params(train=True):
            w.grad = torch.ones_like(w)
        w.data = w.data.view(3, 2) if replaced.shape == (3, 2) else replaced
        with pytest.raises(RuntimeError, match="its data was replaced since"):
            opt.state_dict()
        there = replaced.shape == (3, 2)  # at the old address: its gradient tells
        error, words = (RuntimeError, "its data was replaced") if there else (ValueError, "become")
        with pytest.raises(error, match=words):
            opt.step()


@pytest.mark.parametrize("how", ["transposed", "bfloat16"])
def test_a_parameter_of_another_kind_at_its_address_is_noticed_by_the_step(how):
    found = []
    for fused in (None, False):
        w = torch.nn.Parameter(torch.arange(4.0).view(2, 2))
        memory = w.data
        opt = IVON([w], 0.1, ess=10.0, seed=0, fused=fused)
        opt.train()
        w.grad = torch.ones(2, 2)
        if how == "transposed":
            w.data = memory.t()
        else:
            theta = memory.clone()
            w.data = memory.view(-1).view(BF16)[:4].view(2, 2)
            w.data.copy_(theta)
        opt.step()
        assert ("mean" in opt.state[w]) == (how == "bfloat16")
        found.append(w.detach().float())
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_a_step_finds_unmoved_parameters_unmoved_whatever_their_dtypes():
    params = [torch.nn.Parameter(torch.ones(3, dtype=t)) for t in (BF16, torch.float32, BF16)]
    opt = IVON(params, 0.1, ess=10.0, seed=0)
    assert not opt._trained.stayed(opt.state)
    opt.train()
    assert opt._trained.stayed(opt.state)
    params[1].data = params[1].data.clone()
    assert not opt._trained.stayed(opt.state)


def test_frozen_parameters_may_be_anything():
    frozen = torch.nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    w = torch.nn.Parameter(torch.ones(3))
    opt = IVON([frozen, w], 0.1, ess=10.0, seed=0)
    opt.state[frozen]  # reading makes an entry
    stepped(opt, w)
    assert not torch.equal(w, torch.ones(3))


def test_runs_are_made_once_whatever_the_parameters(monkeypatch):
    """Of two dtypes, and where one has no gradient."""
    made, ours = [], window.runs
    monkeypatch.setattr(window, "runs", lambda slots: made.append(1) or ours(slots))
    params = [torch.nn.Parameter(torch.ones(3, dtype=t)) for t in (BF16, torch.float32, BF16)]
    unused = torch.nn.Parameter(torch.ones(3))
    opt = IVON([*params, unused], 0.1, ess=10.0, seed=0)
    for _ in range(5):
        opt.train()
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert len(made) == 2


def test_without_a_stored_mean_no_copy_stays_in_memory():
    w = torch.nn.Parameter(torch.ones(1000))
    opt = IVON([w], 0.1, ess=10.0, seed=0, store_mean=False)
    for _ in range(2):
        for _ in range(2):
            with opt.sampled_params(train=True):
                w.grad = torch.ones_like(w)
        opt.step()
    w.grad = None
    gc.collect()
    large = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == w.shape]
    assert len(large) == 2  # momentum and h


def test_state_that_the_user_replaced_is_the_one_that_trains():
    w = torch.nn.Parameter(torch.ones(3))
    opt = IVON([w], 0.1, ess=10.0, seed=0)
    stepped(opt, w)
    ours = {k: v.clone() for k, v in opt.state[w].items()}
    opt.state[w] = ours
    stepped(opt, w)
    assert opt.state[w] is ours
    assert ours["step"] == 2
    ours["hess"] = ours["hess"].half()
    stepped(opt, w)
    assert ours["hess"].dtype == torch.float32
    assert w.isfinite().all()


def test_what_is_trained_no_longer_is_let_go():
    kept, gone = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = IVON([{"params": [kept]}, {"params": [gone]}], 0.1, ess=10.0, seed=0)
    for _ in range(2):
        with opt.sampled_params(train=True):
            kept.grad, gone.grad = torch.ones(3), torch.ones(3)
        opt.step()
    opt.param_groups.pop()
    opt.state.pop(gone)
    watched = weakref.ref(gone)
    del gone
    stepped(opt, kept)
    gc.collect()
    assert watched() is None


def test_the_implementation_that_is_asked_for_runs(monkeypatch):
    w = torch.nn.Parameter(torch.ones(3))
    opt = IVON([w], 0.1, ess=10.0, seed=0)
    stepped(opt, w)
    called = []
    monkeypatch.setattr(reference, "step", lambda *_, **__: called.append(1))
    opt.param_groups[0]["fused"] = False
    stepped(opt, w)
    assert called
