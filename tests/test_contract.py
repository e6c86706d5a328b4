"""One contract for all three ways to train: they are one algorithm, and none loses a bit."""

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from posterity import IVON
from posterity.ops import noise
from ways import (
    LR,
    WAYS,
    X,
    assert_same,
    backward,
    bits,
    closure,
    context,
    loss,
    make,
    network,
    samples,
    through_bytes,
    train,
    weights,
)  # fmt: skip

torch.set_num_threads(1)

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
SETTINGS = {
    "default": {},
    "reference": {"fused": False},
    "regenerated": {"store_mean": False},
    "gradsq": {"hess_approx": "gradsq", "gradsq_scale": 24.0},
    "capturable": {"capturable": True},
    "float64": {"dtype": F64},
    "regenerated float64": {"store_mean": False, "dtype": F64},
    "bfloat16": {"dtype": BF16},
    "float16": {"dtype": F16},
    "bfloat16 gradsq": {"dtype": BF16, "hess_approx": "gradsq", "gradsq_scale": 24.0},
    "clipped": {"clip_radius": 1e-2},
    "bare": {"rescale_lr": False, "debias": False, "weight_decay": 0.0, "lr": 0.03},
    "tensor lr": {"lr": torch.tensor(0.3)},
}
some = pytest.mark.parametrize("chosen", SETTINGS.values(), ids=SETTINGS)
few = pytest.mark.parametrize(
    "chosen",
    [SETTINGS[k] for k in ("default", "regenerated", "gradsq", "capturable", "bfloat16")],
    ids=("default", "regenerated", "gradsq", "capturable", "bfloat16"),
)
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
without_closure = pytest.mark.parametrize("way", [context, train], ids=("context", "train"))


def trained(way, steps=5, **chosen):
    model, opt = make(**chosen)
    for _ in range(steps):
        way(opt, partial(backward, model))
    return model, opt


# -- the three ways are one ------------------------------------------------------------------------


@some
def test_ways_agree(chosen):
    expected = bits(*trained(context, **chosen))
    start = make(**chosen)[0]
    assert not torch.equal(expected["param 0"], start[0].weight)
    for way in (closure, train):
        assert_same(bits(*trained(way, **chosen)), expected)


@pytest.mark.parametrize("antithetic", [False, True])
@few
def test_ways_agree_on_several_samples(chosen, antithetic):
    k = 4
    ours, theirs = (make(**chosen, antithetic=antithetic, mc_samples=k) for _ in range(2))
    for _ in range(3):
        samples(*ours, k)
        ours[1].step()
        closure(theirs[1], partial(backward, theirs[0]))
    assert_same(bits(*ours), bits(*theirs))
    assert int(ours[1].param_groups[0]["draws"]) == 3 * (k // 2 if antithetic else k)


PAIRS = {"mc_samples": 2, "antithetic": True, "hess_every": 3}


@pytest.mark.parametrize("chosen", [s for s in SETTINGS.values() if "capturable" not in s])
def test_h_rests_but_at_every_third_step(chosen):
    """Whichever way the samples come, where it rests no bit of it changes."""
    ours, theirs = (make(**chosen, **PAIRS) for _ in range(2))
    for step in range(5):
        before = [state["hess"].clone() for state in ours[1].state.values()]
        assert ours[1].samples_due == theirs[1].samples_due == (1 if step % 3 else 2)
        samples(*ours, ours[1].samples_due)
        ours[1].step()
        closure(theirs[1], partial(backward, theirs[0]))
        after = [state["hess"] for state in ours[1].state.values()]
        if before:
            rests = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert rests == [bool(step % 3)] * len(rests)
    assert_same(bits(*ours), bits(*theirs))


def test_half_a_pair_leaves_h_alone():
    """As where the other half failed, or was forgotten; the next step is to learn then."""
    model, opt = make(**PAIRS)
    with opt.sampled_params(train=True):
        backward(model)
    assert opt.samples_due == 1
    with pytest.raises(ZeroDivisionError), opt.sampled_params(train=True):
        raise ZeroDivisionError
    before = weights(model)
    with pytest.warns(UserWarning, match="half a pair tells nothing of h"):
        opt.step()
    assert not any(map(torch.equal, before, weights(model)))
    assert all((state["hess"] == LR["hess_init"]).all() for state in opt.state.values())
    assert opt.samples_due == 2
    closure(opt, partial(backward, model))
    assert opt.samples_due == 1
    assert not any((state["hess"] == LR["hess_init"]).all() for state in opt.state.values())


def test_resume_between_the_halves_of_a_pair():
    (model, opt), (other, its) = make(**PAIRS), make(**PAIRS)
    samples(model, opt, 1)
    other.load_state_dict(model.state_dict())
    its.load_state_dict(through_bytes(opt.state_dict()))
    for m, o in ((model, opt), (other, its)):
        for _ in range(3):
            samples(m, o, o.samples_due)
            o.step()
    assert_same(bits(model, opt), bits(other, its))


def test_h_learns_at_every_step_again():
    model, opt = make(**PAIRS)
    for _ in range(2):
        closure(opt, partial(backward, model))
    opt.param_groups[0]["hess_every"] = 1
    for _ in range(3):
        assert opt.samples_due == 2
        closure(opt, partial(backward, model))


def test_a_copy_from_before_there_was_hess_every():
    opt = trained(context, 2)[1]
    state = copy.deepcopy(opt.__getstate__())
    for kept in (state["defaults"], *state["param_groups"]):
        del kept["hess_every"], kept["hess_age"]
    again = IVON.__new__(IVON)
    again.__setstate__(state)
    assert again.param_groups[0]["hess_every"] == 1
    assert again.samples_due == 1


def test_a_step_that_overflowed_is_not_one_of_three():
    model, opt = make(**PAIRS)
    opt.found_inf, opt.grad_scale = torch.ones(1), torch.ones(1)
    closure(opt, partial(backward, model))
    assert opt.samples_due == 2
    opt.found_inf.zero_()
    closure(opt, partial(backward, model))
    assert opt.samples_due == 1


def by_hand(mean, steps, k, antithetic, every, approx, scale, clip):
    """Lines (1) to (7) in float64, written again from the paper for w ↦ mean (x·w − y)².

    h as after every step, but learnt at each ``every``-th only, from k samples, elsewhere one.
    """
    x, y = X.double(), X.sum(1, keepdim=True).double()
    lr, ess, h0, delta = LR["lr"], LR["ess"], LR["hess_init"], LR["weight_decay"]
    beta1, beta2 = LR["betas"]
    m, g, h = mean.clone(), torch.zeros_like(mean), torch.full_like(mean, h0)
    drawn = 0
    for t in range(1, steps + 1):
        sigma = 1 / torch.sqrt(ess * (h + delta))
        ghat, hhat = torch.zeros_like(m), torch.zeros_like(m)
        learns = (t - 1) % every == 0
        n = k if learns else 1
        for s in range(n):
            draw, sign = (drawn + s // 2, 1 - 2 * (s % 2)) if antithetic else (drawn + s, 1)
            (eps,) = noise.normals(noise.draw_key(LR["seed"], draw), [0], [m.numel()])
            offset = sign * sigma * eps.view_as(m)
            grad = 2 / len(x) * x.T @ (x @ (m + offset) - y)
            ghat += grad / n
            hhat += (grad * offset / sigma**2 if approx == "price" else scale * grad**2) / n
        drawn = draw + 1
        g = beta1 * g + (1 - beta1) * ghat
        if learns:
            rho = 1 - beta2**every
            h = (1 - rho) * h + rho * hhat + 0.5 * rho**2 * (h - hhat) ** 2 / (h + delta)
        step = (g / (1 - beta1**t) + delta * m) / (h + delta)
        m = m - lr * (h0 + delta) * step.clamp(-clip, clip)
    return m, g, h


@pytest.mark.parametrize("clip", [math.inf, 0.05])
@pytest.mark.parametrize("approx", ["price", "gradsq"])
@pytest.mark.parametrize(
    ("k", "antithetic", "every"), [(1, False, 1), (3, False, 1), (4, True, 1), (2, True, 3)]
)
def test_samples_are_averaged_as_the_paper_says(k, antithetic, every, approx, clip):
    w = nn.Parameter(torch.linspace(-1, 1, 3, dtype=F64)[:, None])
    x, y = X.double(), X.sum(1, keepdim=True).double()
    mean = w.detach().clone()
    opt = IVON(
        [w], **LR, mc_samples=k, antithetic=antithetic, clip_radius=clip, hess_approx=approx,
        gradsq_scale=24.0, hess_every=every,
    )  # fmt: skip
    for _ in range(5):
        closure(opt, lambda: (((x @ w - y) ** 2).mean()).backward())
    expected = by_hand(mean, 5, k, antithetic, every, approx, 24.0, clip)
    found = w.detach(), opt.state[w]["momentum"], opt.state[w]["hess"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_closure_returns_the_mean_loss():
    model, opt = make(mc_samples=3)
    losses = []

    def evaluate():
        opt.zero_grad()
        losses.append(backward(model))
        return losses[-1]

    value = opt.step(evaluate)
    assert len({v.item() for v in losses}) == 3
    torch.testing.assert_close(value, torch.stack(losses).mean().detach())
    assert not value.requires_grad
    numbers = iter([1.0, 2.0, 6.0])
    assert opt.step(lambda: (backward(model), next(numbers))[1]) == 3.0
    assert opt.step(lambda: (backward(model), None)[1]) is None


def test_closure_runs_once_at_a_live_sample():
    model, opt = make()
    seen = []
    opt.train()
    drawn = weights(model)

    def evaluate():
        assert torch.is_grad_enabled()
        seen.append(weights(model))
        return backward(model)

    with torch.no_grad():
        value = opt.step(evaluate)
    assert_same(seen[0], drawn)
    assert len(seen) == 1
    assert value > 0
    other, expected = make()
    train(expected, partial(backward, other))
    assert_same(bits(model, opt), bits(other, expected))


# -- between backward and step ---------------------------------------------------------------------


@few
@each_way
def test_accumulated_micro_batches_are_one_batch(way, chosen):
    halves = (slice(0, 12), slice(12, 24))

    def accumulate(model, opt):
        for rows in halves:
            if way is train:
                opt.train()  # before every micro-batch is fine
            value = backward(model, rows, 0.5)
        return value

    model, opt = make(**chosen)
    other, expected = make(**chosen)
    for _ in range(3):
        way(opt, lambda: accumulate(model, opt))
        way(expected, partial(backward, other))
    low = chosen.get("dtype") == BF16
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-5, atol=2e-2 if low else 1e-6)
    assert opt.param_groups[0]["draws"] == 3  # one sample a window, however many micro-batches


def test_samples_start_from_zero_gradients():
    results = []
    for clean in (False, True):
        model, opt = make()
        samples(model, opt, 1)
        for _ in range(2):
            if clean:
                opt.zero_grad()
            with opt.sampled_params(train=True):
                backward(model)
        opt.step()
        results.append(bits(model, opt))
    assert_same(*results)


@few
def test_clipping_between_backward_and_step(chosen):
    results = []
    for way in WAYS.values():
        model, opt = make(**chosen)
        clip = partial(clip_grad_norm_, list(model.parameters()), 0.1)
        for _ in range(3):
            way(opt, partial(backward, model), clip)
        results.append(bits(model, opt))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert not torch.equal(results[0]["param 0"], weights(trained(context, 3, **chosen)[0])[0])


def test_clipping_inside_each_of_several_contexts_counts():
    model, opt = make()
    other, expected = make()
    samples(model, opt, 3, lambda: clip_grad_norm_(model.parameters(), 0.1))
    opt.step()
    samples(other, expected, 3)
    expected.step()
    assert opt.state[model[0].weight]["momentum"].norm() <= 0.1 * 0.1 * (1 + 1e-5)
    assert expected.state[other[0].weight]["momentum"].norm() > 0.01


def clip(model):
    clip_grad_norm_(model.parameters(), 0.01)


def replace(model):
    model[0].weight.grad = torch.ones_like(model[0].weight)


@pytest.mark.parametrize("change", [clip, replace, backward])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_change_between_samples_raises(change, before):
    model, opt = make()
    samples(model, opt, 1)
    opt.step()
    start = bits(model, opt)
    samples(model, opt, before)
    change(model)
    with pytest.raises(RuntimeError, match="no longer count"), opt.sampled_params(train=True):
        raise AssertionError("must not get here")
    assert_same(weights(model), [start[f"param {i}"] for i in range(4)])


@pytest.mark.parametrize("change", [clip, replace, backward])
def test_a_change_after_the_last_of_several_samples_raises(change):
    model, opt = make()
    samples(model, opt, 1)
    opt.step()
    start = bits(model, opt)
    samples(model, opt, 2)
    change(model)
    with pytest.raises(RuntimeError, match="no longer count"):
        opt.step()
    assert_same(bits(model, opt), {**start, "draws": start["draws"] + 2})
    context(opt, partial(backward, model))  # a new window is not affected


def test_a_replaced_gradient_after_a_single_sample_raises():
    model, opt = make()
    samples(model, opt, 1)
    start = weights(model)
    replace(model)
    with pytest.raises(RuntimeError, match="no longer count"):
        opt.step()
    assert_same(weights(model), start)


RESETS = {
    "none": lambda model, opt: opt.zero_grad(),
    "zero": lambda model, opt: opt.zero_grad(set_to_none=False),
    "model": lambda model, opt: model.zero_grad(),
    "twice": lambda model, opt: (opt.zero_grad(set_to_none=False), model.zero_grad(False)),
}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
def test_zero_grad_after_exit_loses_nothing(reset, k):
    model, opt = make()
    other, expected = make()
    for _ in range(2):
        for _ in range(k):
            with opt.sampled_params(train=True):
                opt.zero_grad()
                backward(model)
            reset(model, opt)
        opt.step()
        samples(other, expected, k)
        expected.step()
    assert_same(bits(model, opt), bits(other, expected))


def test_zeros_written_into_a_held_gradient_never_pass_silently_between_samples():
    model, opt = make()
    samples(model, opt, 1)
    model.zero_grad(set_to_none=False)  # writes into the tensor that the optimizer holds
    with pytest.raises(RuntimeError, match="no longer count"), opt.sampled_params(train=True):
        pass


# -- GradScaler ------------------------------------------------------------------------------------


def scaled(way, model, opt, scaler, k=1, unscale=False, spoil=None):
    """A step under a GradScaler; ``spoil``: the sample whose gradient overflows."""
    opt.zero_grad()
    for i in range(k):
        if way is train:
            opt.train()
        with opt.sampled_params(train=True) if way is context else torch.enable_grad():
            scaler.scale(loss(model)).backward()
            if i == spoil:
                model[0].weight.grad[0, 0] = math.inf
    if unscale:
        scaler.unscale_(opt)
        clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(opt)
    scaler.update()


@few
@pytest.mark.parametrize("unscale", [False, True])
@without_closure
def test_grad_scaler_changes_nothing(way, unscale, chosen):
    model, opt = make(**chosen)
    other, expected = make(**chosen)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for _ in range(5):
        scaled(way, model, opt, scaler, unscale=unscale)
        way(
            expected,
            partial(backward, other),
            lambda: unscale and clip_grad_norm_(other.parameters(), 0.1),
        )
    assert scaler.get_scale() == 2.0**12
    assert_same(bits(model, opt), bits(other, expected))


@few
def test_grad_scaler_with_several_samples(chosen):
    model, opt = make(**chosen)
    other, expected = make(**chosen)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        scaled(context, model, opt, scaler, k=3)
        samples(other, expected, 3)
        expected.step()
    assert_same(bits(model, opt), bits(other, expected))


@pytest.mark.parametrize(
    ("way", "k", "spoil", "unscale"),
    [
        (context, 1, 0, False),
        (context, 1, 0, True),
        (train, 1, 0, False),
        (train, 1, 0, True),
        (context, 2, 0, False),
        (context, 2, 1, False),
        (context, 2, 1, True),
        (context, 3, 1, False),
    ],
)
@few
def test_overflow_discards_the_samples(way, k, spoil, unscale, chosen):
    if "store_mean" in chosen:
        chosen = {**chosen, "dtype": F64}
    model, opt = make(**chosen)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled(way, model, opt, scaler, k)
    start = bits(model, opt)
    scaled(way, model, opt, scaler, k, unscale, spoil)
    after = bits(model, opt)
    assert after.pop("draws") == start.pop("draws") + k
    if "store_mean" in chosen:  # restored to within one rounding, and that is noted
        after = {k: v for k, v in after.items() if "rounded" not in k}
        for name, value in start.items():
            torch.testing.assert_close(after.pop(name), value, rtol=1e-15, atol=1e-15)
    else:
        assert_same(after, start)
    assert scaler.get_scale() == 2.0**9  # the scaler knows
    scaled(way, model, opt, scaler, k)
    moved = bits(model, opt)
    assert int(moved["step 0"]) == 2
    assert all(v.isfinite().all() for v in moved.values())


def test_overflow_whose_gradient_is_gone():
    model, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled(context, model, opt, scaler)
    start = bits(model, opt)
    opt.zero_grad()
    with opt.sampled_params(train=True):
        scaler.scale(loss(model)).backward()
        model[0].weight.grad[0, 0] = math.inf
    opt.zero_grad()  # the scaler sees no gradient at all now
    scaler.step(opt)
    assert_same(bits(model, opt), {**start, "draws": start["draws"] + 1})


def test_unscaling_after_several_samples_raises():
    model, opt = make()
    with pytest.raises(RuntimeError, match="no longer count"):
        scaled(context, model, opt, torch.amp.GradScaler("cpu", init_scale=2.0), 2, unscale=True)


def test_a_disabled_grad_scaler():
    model, opt = make()
    scaled(context, model, opt, torch.amp.GradScaler("cpu", enabled=False))
    assert_same(bits(model, opt), bits(*trained(context, 1)))


# -- skipped steps, exceptions ---------------------------------------------------------------------


def test_a_skipped_step_leaves_its_sample_to_the_next():
    model, opt = make()
    samples(model, opt, 1)  # no step
    context(opt, partial(backward, model))  # zero_grad() does not lose it
    other, expected = make()
    samples(other, expected, 2)
    expected.step()
    assert_same(bits(model, opt), bits(other, expected))


def test_a_skipped_step_after_train_keeps_the_sample():
    model, opt = make()
    opt.train()
    backward(model)  # no step
    train(opt, partial(backward, model))
    assert_same(bits(model, opt), bits(*trained(train, 1)))


class Stop(BaseException):
    """Neither an Exception nor anything the library may know."""


raising = pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])


def fail(error):
    raise error


@some
@pytest.mark.parametrize("training", [False, True])
@raising
def test_exception_inside_the_context(error, training, chosen):
    model, opt = trained(context, 2, **chosen)
    start = bits(model, opt)
    with pytest.raises(error), opt.sampled_params(train=training):  # noqa: PT012
        assert not torch.equal(model[0].weight, start["param 0"])
        backward(model)
        fail(error)
    after = bits(model, opt)
    draws = start["draws"] + training
    if training and chosen.get("store_mean") is False:
        for i in range(4):
            torch.testing.assert_close(after[f"param {i}"], start[f"param {i}"])
    else:
        assert_same(after, {**start, "draws": draws})
    if training:
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(RuntimeError, match="no posterior sample"):
            opt.step()
    context(opt, partial(backward, model))
    assert int(opt.state[model[0].weight]["step"]) == 3


def test_exception_in_a_later_context_keeps_the_earlier_samples():
    model, opt = make()
    samples(model, opt, 2)
    with pytest.raises(ValueError), opt.sampled_params(train=True):  # noqa: PT011, PT012
        backward(model)
        raise ValueError
    opt.step()
    other, expected = make()
    samples(other, expected, 2)
    expected.step()
    expected.param_groups[0]["draws"] = 3
    assert_same(bits(model, opt), bits(other, expected))


@raising
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_exception_in_the_closure(failing, error):
    model, opt = make(mc_samples=3)
    closure(opt, partial(backward, model))
    start, calls = bits(model, opt), iter(range(3))

    def evaluate():
        backward(model)
        return fail(error) if next(calls) == failing else torch.zeros(())

    with pytest.raises(error):
        opt.step(evaluate)
    assert_same(bits(model, opt), {**start, "draws": start["draws"] + failing + 1})
    with pytest.raises(RuntimeError, match="no posterior sample"):
        opt.step()


@few
@raising
def test_exception_in_the_closure_at_a_live_sample(error, chosen):
    model, opt = make(**{**chosen, "store_mean": True})
    start = weights(model)
    opt.train()
    with pytest.raises(error):
        opt.step(lambda: (backward(model), fail(error)))
    assert_same(weights(model), start)
    assert all(p.grad is None for p in model.parameters())
    train(opt, partial(backward, model))


def test_exception_while_train_is_live():
    model, opt = trained(train, 2)
    start = bits(model, opt)
    opt.zero_grad()
    opt.train()
    drawn = weights(model)
    with pytest.raises(ValueError):  # noqa: PT011, PT012
        backward(model)
        raise ValueError
    opt.eval()
    assert_same(bits(model, opt), {**start, "draws": start["draws"] + 1})
    opt.train()
    assert_same(weights(model), drawn)
    opt.zero_grad()
    train(opt, partial(backward, model))
    assert_same(bits(model, opt), bits(*trained(train, 3)))


def test_exception_in_a_hook_of_step_leaves_the_sample():
    model, opt = make()
    handle = opt.register_step_pre_hook(lambda *_: fail(ValueError))
    with pytest.raises(ValueError):  # noqa: PT011
        context(opt, partial(backward, model))
    handle.remove()
    opt.step()
    assert_same(bits(model, opt), bits(*trained(context, 1)))


def test_a_new_kind_of_sample_restores_the_live_one_first():
    model, opt = make()
    start = weights(model)
    opt.train()  # its forward pass failed, say
    with opt.sampled_params(train=True):
        backward(model)
    assert_same(weights(model), start)
    opt.step()
    assert int(opt.state[model[0].weight]["step"]) == 1


# -- frozen, unused, new parameters ----------------------------------------------------------------


@each_way
@few
def test_frozen_parameters_are_left_alone(way, chosen):
    model, opt = make(**chosen)
    frozen = model[0].weight.requires_grad_(False)
    start = frozen.clone()
    for _ in range(3):
        way(opt, lambda: (backward(model), torch.equal(frozen, start) or fail(AssertionError))[0])
        with opt.sampled_params():
            assert torch.equal(frozen, start)
    assert torch.equal(frozen, start)
    assert frozen not in opt.state
    frozen.requires_grad_()  # unfrozen: trains from here, the others' noise is what it was
    way(opt, partial(backward, model))
    assert not torch.equal(frozen, start)
    assert int(opt.state[frozen]["step"]) == 1
    assert int(opt.state[model[0].bias]["step"]) == 4


def test_noise_belongs_to_the_position():
    """Freezing one parameter changes no other's sample."""
    model, opt = make()
    opt.train()
    full = weights(model)
    model, opt = make()
    model[0].weight.requires_grad_(False)
    opt.train()
    assert_same(weights(model)[1:], full[1:])


@each_way
@pytest.mark.parametrize("store_mean", [True, False])
def test_unused_parameters_are_left_alone(way, store_mean):
    """Even without a stored mean they are rounded once at most, however many steps pass."""
    model = network()
    unused = nn.Parameter(torch.randn(64))
    start = unused.detach().clone()
    opt = IVON([unused, *model.parameters()], **LR, store_mean=store_mean)
    seen = []
    for _ in range(4):
        way(opt, partial(backward, model))
        seen.append(unused.detach().clone())
    assert bool((opt.state[unused]["hess"] == LR["hess_init"]).all())
    assert not opt.state[unused]["momentum"].any()
    assert int(opt.state[unused]["step"]) == 0
    assert_same(seen, [seen[0]] * 4)
    if store_mean:
        assert torch.equal(unused, start)
    torch.testing.assert_close(unused.detach(), start, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_a_mean_that_is_not_stored_is_rounded_once_a_step(k):
    """And never again before the next: by another sample, an exception, or train()/eval()."""
    model, opt = make(store_mean=False)
    samples(model, opt, 1)
    once = weights(model)
    for _ in range(k):
        samples(model, opt, 1)
        with pytest.raises(ValueError), opt.sampled_params(train=True):  # noqa: PT011
            raise ValueError
        assert_same(weights(model), once)
    opt.step()
    assert not any("rounded" in state for state in opt.state.values())
    opt.train()
    opt.eval()
    once = weights(model)
    for _ in range(k):
        opt.train()
        opt.eval()
        assert_same(weights(model), once)


def test_freezing_and_unfreezing_inside_a_window():
    model, opt = make()
    model[2].bias.requires_grad_(False)
    start = weights(model)
    opt.train()
    model[0].weight.requires_grad_(False)  # a sample stands in it
    model[2].bias.requires_grad_(True)  # no sample stands in it
    drawn = weights(model)
    mean = opt.posterior(model).mean
    assert torch.equal(mean["2.bias"], start[3])
    with opt.sampled_params():
        assert not torch.equal(model[2].bias, start[3])
    assert_same(weights(model), drawn)
    opt.eval()
    assert_same(weights(model), start)


@pytest.mark.parametrize("store_mean", [True, False])
@each_way
def test_add_param_group_in_training(way, store_mean):
    model, opt = make(dtype=F64, store_mean=store_mean)
    other, expected = make(dtype=F64, store_mean=store_mean)
    way(opt, partial(backward, model))
    way(expected, partial(backward, other))
    extra = nn.Parameter(torch.ones(3, dtype=F64))
    opt.add_param_group({"params": [extra], "ess": 100, "hess_init": 2.0, "lr": 0.1})
    for _ in range(3):
        way(opt, lambda: (backward(model), (extra**2).sum().backward())[0])
        way(expected, partial(backward, other))
    assert_same(weights(model), weights(other))  # others' noise is what it was
    assert int(opt.state[extra]["step"]) == 3
    assert (extra < 1).all()


def test_add_param_group_while_a_sample_is_live():
    model, opt = make()
    extra = nn.Parameter(torch.ones(3))
    opt.train()
    opt.add_param_group({"params": extra})
    drawn = extra.detach().clone()
    assert (drawn != 1).all()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2), requires_grad=False)]})
    opt.eval()
    assert (extra == 1).all()
    opt.train()
    assert torch.equal(extra, drawn)
    (backward(model), (extra**2).sum().backward())
    opt.step()
    late = nn.Parameter(torch.ones(3))
    opt.zero_grad()
    with opt.sampled_params(train=True):
        opt.add_param_group({"params": [late], "hess_init": 1.0})
        backward(model)
        (late**2).sum().backward()
    assert (late == 1).all()
    opt.step()
    assert (late != 1).all()
    assert [int(opt.state[p]["step"]) for p in (extra, late)] == [1, 1]


def test_add_param_group_after_a_sample_was_left():
    model, opt = make()
    samples(model, opt, 1)
    extra = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [extra]})
    samples(model, opt, 1)
    opt.step()
    assert (extra == 1).all()
    assert opt.param_groups[1]["pending"] == 0


def test_groups_have_their_own_settings():
    """Two groups behave as two optimizers do (up to the noise's position)."""
    own = {
        "ess": 7.0,
        "hess_init": 0.5,
        "betas": (0.5, 0.9),
        "weight_decay": 0.2,
        "clip_radius": 0.01,
        "lr": 0.1,
    }
    model = network()
    opt = IVON([{"params": model[0].parameters()}, {"params": model[2].parameters(), **own}], **LR)
    other = network()
    pad = [nn.Parameter(torch.zeros(1), requires_grad=False) for _ in range(2)]
    first = IVON(other[0].parameters(), **LR)
    second = IVON([*pad, *other[2].parameters()], **{**LR, **own})
    for _ in range(4):
        train(opt, partial(backward, model))
        second.zero_grad()
        second.train()
        train(first, partial(backward, other), second.step)
    assert_same(weights(model), weights(other))
    assert opt.posterior(model).ess is None
    precision = opt.posterior(model).precision["2.bias"]
    torch.testing.assert_close(precision, 7 * (opt.state[model[2].bias]["hess"] + 0.2))


# -- schedulers, copies, hooks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: OneCycleLR(opt, max_lr=0.5, total_steps=6),
        lambda opt: CosineAnnealingLR(opt, T_max=6),
        lambda opt: LambdaLR(opt, lambda t: 1 / (t + 1)),
    ],
    ids=["OneCycleLR", "CosineAnnealingLR", "LambdaLR"],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(scheduler, tensor):
    results = []
    for way in WAYS.values():
        model, opt = make(lr=torch.tensor(0.3) if tensor else 0.3)
        schedule, seen = scheduler(opt), []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                seen.append(float(opt.param_groups[0]["lr"]))
                way(opt, partial(backward, model))
                schedule.step()
        assert len(set(seen)) == 6
        results.append(bits(model, opt))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_one_cycle_moves_the_momentum():
    _, opt = make()
    schedule = OneCycleLR(opt, max_lr=0.5, total_steps=6)
    before = opt.param_groups[0]["betas"]
    opt._opt_called = True
    schedule.step()
    assert opt.param_groups[0]["betas"][0] != before[0]
    assert opt.param_groups[0]["betas"][1] == before[1]


def test_a_tensor_lr_is_a_float_lr():
    results = [bits(*trained(context, lr=lr)) for lr in (0.25, torch.tensor(0.25, dtype=F64))]
    assert_same(*results)


@few
@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@without_closure
def test_pickle_and_deepcopy(way, copied, chosen):
    model, opt = trained(way, 3, **chosen)
    twin, its = copied((model, opt))
    assert its.param_groups[0]["params"][0] is twin[0].weight
    for _ in range(2):
        way(opt, partial(backward, model))
        way(its, partial(backward, twin))
    assert_same(bits(model, opt), bits(twin, its))
    with opt.sampled_params():
        drawn = weights(model)
    with its.sampled_params():
        assert_same(weights(twin), drawn)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_copies_with_a_waiting_sample(copied):
    model, opt = make()
    samples(model, opt, 1)
    with pytest.raises(RuntimeError, match="call step"):
        copied(opt)
    samples(model, opt, 1)  # two are summed up: nothing is held by reference
    copied(opt)
    opt.step()
    opt.train()
    with pytest.raises(RuntimeError, match="call step"):
        copied(opt)


def test_hooks():
    model, opt = make()
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(len(o.state)))
    opt.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda o, given: given.pop("note") and None)
    for way in WAYS.values():
        way(opt, partial(backward, model))
    assert seen == ["pre", 4] * 3
    samples(model, opt, 1)
    saved = opt.state_dict()
    assert saved["note"] == 1
    assert saved["param_groups"][0]["pending"] == 1
    opt.load_state_dict(saved)


def test_a_state_dict_hook_may_rename():
    """It sees the finished state, whose keys are then its own; and one may rename them back."""
    model, opt = make()
    opt.register_state_dict_post_hook(
        lambda o, s: {**s, "state": {f"p{k}": v for k, v in s["state"].items()}}
    )
    samples(model, opt, 1)
    saved = opt.state_dict()
    assert "grad_sum" in saved["state"]["p0"]
    opt.register_load_state_dict_pre_hook(
        lambda o, s: {**s, "state": {int(k[1:]): v for k, v in s["state"].items()}}
    )
    opt.load_state_dict(saved)
    assert "grad_sum" in opt.state[model[0].weight]


@each_way
def test_named_parameters(way):
    model = network()
    opt = IVON(model.named_parameters(), **LR)
    for _ in range(2):
        way(opt, partial(backward, model))
    assert opt.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert_same(weights(model), weights(trained(way, 2)[0]))
    opt.load_state_dict(through_bytes(opt.state_dict()))


# -- dtypes, shapes, layouts -----------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=d) for d in (BF16, torch.float32, F64))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x


@each_way
def test_mixed_dtypes(way):
    model = Mixed()
    opt = IVON(model.parameters(), **LR)
    for _ in range(3):
        way(opt, lambda: (model(X) ** 2).mean().backward())
    saved = through_bytes(opt.state_dict())
    kept = bits(model, opt)
    opt.load_state_dict(saved)
    assert_same(bits(model, opt), kept)  # dtypes and values
    for p, dtype in zip(model.parameters(), [torch.float32] * 4 + [F64] * 2, strict=True):
        state = opt.state[p]
        assert state["hess"].dtype == state["momentum"].dtype == dtype
        assert ("mean" in state) == (p.dtype == BF16)
        assert p.dtype != BF16 or torch.equal(state["mean"].to(BF16), p)


def test_steps_below_bfloat16_resolution_add_up():
    w = nn.Parameter(torch.ones(4, dtype=BF16))
    opt = IVON([w], lr=1e-3, ess=1e8, rescale_lr=False, betas=(0.0, 0.99999), seed=0)
    for _ in range(32):
        context(opt, lambda: w.sum().backward())
    assert torch.equal(w, opt.state[w]["mean"].to(BF16))
    assert (w < 0.98).all()


def test_bfloat16_rounding_is_not_taken_for_noise():
    """Where σ is far below the parameter's resolution, θ−m would be all rounding and h explode."""
    found = []
    for dtype in (F64, BF16):
        w = nn.Parameter(torch.ones(64, dtype=dtype))
        opt = IVON([w], lr=1e-3, ess=1e8, rescale_lr=False, seed=0)
        for _ in range(5):
            context(opt, lambda w=w: w.sum().backward())
        found.append(opt.state[w]["hess"])
    torch.testing.assert_close(found[1], found[0].float(), rtol=1e-4, atol=0)


def test_weights_loaded_between_steps_count():
    model, opt = trained(context, 2, dtype=BF16)
    other = network(BF16)
    model.load_state_dict(other.state_dict())
    assert torch.equal(opt.posterior(model).mean["0.weight"], other[0].weight.float())
    with opt.sampled_params(train=True):
        backward(model)
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize("dtype", [F64, BF16])
@each_way
def test_late_dtype_moves(way, dtype):
    model, opt = trained(way, 2)
    twin, unmoved = trained(way, 3)
    model.to(dtype)
    opt.zero_grad()
    way(opt, partial(backward, model))
    state = opt.state[model[0].weight]
    assert state["hess"].dtype == (F64 if dtype == F64 else torch.float32)
    assert ("mean" in state) == (dtype == BF16)
    assert int(state["step"]) == 3
    expected, rtol = unmoved.state[twin[0].weight]["hess"], 1e-5 if dtype == F64 else 2**-6
    torch.testing.assert_close(state["hess"].float(), expected, rtol=rtol, atol=0)
    model.float()
    opt.zero_grad()
    way(opt, partial(backward, model))
    assert opt.state[model[0].weight].keys() == {"step", "momentum", "hess"}


@each_way
@pytest.mark.parametrize("store_mean", [True, False])
def test_shapes_and_layouts(way, store_mean):
    """0-dim, empty, channels-last and transposed parameters train as plain ones do."""

    def run(layout):
        torch.manual_seed(0)
        conv = nn.Parameter(layout(torch.randn(4, 3, 2, 2)))
        square = nn.Parameter(torch.randn(3, 5))
        if layout is not nothing_new:
            square = nn.Parameter(square.detach().t().contiguous().t())
        assert conv.is_contiguous() == square.is_contiguous() == (layout is nothing_new)
        scalar, empty = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.empty(0, 3))
        params = [empty, conv, scalar, square]
        opt = IVON(params, **LR, store_mean=store_mean)
        pixels = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
        for _ in range(3):
            way(
                opt,
                lambda: (
                    (nn.functional.conv2d(pixels, conv) * scalar).square().mean()
                    + (X @ square).square().mean()
                    + empty.sum()
                ).backward(),
            )
            with opt.sampled_params():
                pass
        assert opt.state[scalar]["hess"].shape == ()
        assert opt.state[conv]["hess"].is_contiguous()  # in the order of the noise
        return [p.detach() for p in params]

    def nothing_new(t):
        return t

    for a, b in zip(
        run(lambda t: t.to(memory_format=torch.channels_last)), run(nothing_new), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_sample_is_the_same_in_every_layout():
    drawn = []
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=layout))
        opt = IVON([conv], **LR)
        with opt.sampled_params():
            drawn.append(conv.detach().clone())
    assert torch.equal(*drawn)


@each_way
def test_tied_weights(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    opt = IVON(model.parameters(), **LR)
    for _ in range(2):
        way(opt, lambda: (model(X) ** 2).mean().backward())
    assert len(opt.state) == 1
    assert model[2].weight is model[0].weight
    assert opt.posterior(model).names == ("0.weight",)


# -- checkpoints -----------------------------------------------------------------------------------


RESUMED = {k: SETTINGS[k] for k in ("default", "regenerated", "gradsq", "capturable", "bfloat16")}
RESUMED["float64 regenerated"] = SETTINGS["regenerated float64"]
RESUMED["hess_every"] = {"hess_every": 2}
resumed_in = pytest.mark.parametrize("chosen", RESUMED.values(), ids=RESUMED)


def resumed(model_state, opt_state, chosen):
    """A fresh process: other initial weights, another seed."""
    model, opt = make(**{**chosen, "seed": 99})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.load_state_dict(through_bytes(model_state))
    opt.load_state_dict(through_bytes(opt_state))
    return model, opt


def evaluated(model, opt):
    with opt.sampled_params():
        return weights(model)


@each_way
@resumed_in
def test_resume_at_a_step(chosen, way):
    model, opt = trained(way, 3, **chosen)
    evaluated(model, opt)
    again, its = resumed(model.state_dict(), opt.state_dict(), chosen)
    for _ in range(3):
        way(opt, partial(backward, model))
        way(its, partial(backward, again))
    assert_same(bits(model, opt), bits(again, its))
    assert_same(evaluated(model, opt), evaluated(again, its))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("saved", [0, 1, 2, 3])
@resumed_in
def test_resume_in_the_middle_of_several_samples(chosen, saved, live, antithetic):
    """Between two contexts, or inside the live one; the weights saved at rest."""
    k, chosen = 4, {**chosen, "antithetic": antithetic, "mc_samples": 4}
    model, opt = trained(closure, 2, **chosen)
    opt.zero_grad()
    for i in range(k):
        if i == saved:
            at_rest = copy.deepcopy(model.state_dict())
            state = through_bytes(opt.state_dict())
        with opt.sampled_params(train=True):
            if i == saved and live:
                state = through_bytes(opt.state_dict())
            backward(model)
            if i == saved and live:
                assert_same(
                    state_bits(state), state_bits(through_bytes(opt.state_dict()))
                )  # gradients of a live sample are no part of it
        opt.zero_grad()
    opt.step()
    again, its = resumed(at_rest, state, chosen)
    for _ in range(saved, k):
        with its.sampled_params(train=True):
            backward(again)
    its.step()
    assert_same(bits(model, opt), bits(again, its))
    for m, o in ((model, opt), (again, its)):
        closure(o, partial(backward, m))
    assert_same(bits(model, opt), bits(again, its))


def state_bits(saved):
    return {
        f"{number} {name}": torch.as_tensor(value)
        for number, state in saved["state"].items()
        for name, value in state.items()
    }


@resumed_in
def test_resume_before_the_step_of_a_single_sample(chosen):
    model, opt = trained(context, 2, **chosen)
    samples(model, opt, 1)
    again, its = resumed(model.state_dict(), opt.state_dict(), chosen)
    opt.step()
    its.step()
    assert_same(bits(model, opt), bits(again, its))


@pytest.mark.parametrize("paused", [False, True])
@resumed_in
def test_resume_while_train_is_live(chosen, paused):
    model, opt = trained(train, 2, **chosen)
    at_rest = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    opt.train()
    if paused:  # eval() before saving, as Trainers do
        opt.eval()
        at_rest = copy.deepcopy(model.state_dict())
    state = through_bytes(opt.state_dict())
    opt.train()
    again, its = resumed(at_rest, state, chosen)
    backward(model)
    opt.step()
    train(its, partial(backward, again))
    assert_same(bits(model, opt), bits(again, its))


@pytest.mark.parametrize("store_mean", [True, False])
def test_resume_after_an_overflow(store_mean):
    chosen = {"store_mean": store_mean}
    model, opt = trained(context, 2, **chosen)
    scaled(context, model, opt, torch.amp.GradScaler("cpu", init_scale=2.0), spoil=0)
    again, its = resumed(model.state_dict(), opt.state_dict(), chosen)
    context(opt, partial(backward, model))
    context(its, partial(backward, again))
    assert_same(bits(model, opt), bits(again, its))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("moment", ["context", "train", "evaluation", "held evaluation"])
def test_state_dict_never_holds_a_perturbed_weight(moment, dtype):
    model, opt = trained(context, 2, dtype=dtype)
    rest = through_bytes(opt.state_dict())
    mean = opt.posterior(model).mean
    if moment == "held evaluation":
        samples(model, opt, 1)
        rest = through_bytes(opt.state_dict())
    with opt.sampled_params(train=True) if moment == "context" else torch.no_grad():
        if moment == "train":
            opt.train()
        with opt.sampled_params() if "evaluation" in moment else torch.no_grad():
            drawn = weights(model)
            saved = through_bytes(opt.state_dict())
            assert_same(opt.posterior(model).mean, mean)  # the same from the posterior
    assert not torch.equal(drawn[0], weights(make(dtype=dtype)[0])[0])
    assert_same(state_bits(saved), state_bits(rest))
    groups = [dict(g) for s in (saved, rest) for g in s["param_groups"]]
    if "evaluation" in moment:
        assert groups[0].pop("eval_draws") == groups[1].pop("eval_draws") + 1
    assert groups[0] == groups[1]
    for state in saved["state"].values():
        for value in state.values():
            assert not any(
                value.shape == d.shape and torch.equal(value.to(dtype), d) for d in drawn
            )


def test_loading_drops_a_live_sample():
    model, opt = make()
    start, saved = weights(model), through_bytes(opt.state_dict())
    opt.train()
    backward(model)
    opt.load_state_dict(saved)
    assert_same(weights(model), start)
    with pytest.raises(RuntimeError, match="no posterior sample"):
        opt.step()
    with opt.sampled_params(train=True), pytest.raises(RuntimeError, match="load_state_dict"):
        opt.load_state_dict(saved)


def test_a_wrong_checkpoint_changes_nothing():
    model, opt = trained(context, 1)
    start = bits(model, opt)
    samples(model, opt, 1)
    good = opt.state_dict()

    wrong = copy.deepcopy(good)
    wrong["state"][0]["hess"] = torch.zeros(2)
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    fewer = IVON(network()[0].parameters(), **LR).state_dict()
    two = {**good, "param_groups": good["param_groups"] * 2}
    for foreign, words in (
        (wrong, r"hess of parameter 0 has shape \(2,\)"),
        (adam.state_dict(), "another optimizer's checkpoint"),
        (fewer, "groups hold"),
        (two, "groups hold"),
    ):
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(foreign)
    opt.step()  # the waiting sample is still there
    assert int(opt.state[model[0].weight]["step"]) == 2
    assert not torch.equal(model[0].weight, start["param 0"])


def test_an_old_checkpoint_takes_today_s_defaults():
    model, opt = trained(context, 2)
    saved = opt.state_dict()
    for name in ("antithetic", "eval_draws", "pending"):
        del saved["param_groups"][0][name]
    opt.load_state_dict(saved)
    context(opt, partial(backward, model))
    assert_same(bits(model, opt), bits(*trained(context, 3)))


def test_loading_between_dtypes_keeps_float32_values():
    model, opt = trained(context, 2)
    low, its = make(dtype=BF16)
    low.load_state_dict(model.state_dict())
    its.load_state_dict(through_bytes(opt.state_dict()))
    for p, q in zip(model.parameters(), low.parameters(), strict=True):
        for name in ("momentum", "hess", "step"):
            torch.testing.assert_close(its.state[q][name], opt.state[p][name], rtol=0, atol=0)
    context(its, lambda: backward(low))


# -- a sample must be there ------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.3, 0.0])
@pytest.mark.parametrize("steps", [0, 1])
def test_step_without_a_sample(steps, lr):
    """With a learning rate of 0 too, unless nothing at all has happened yet (see below)."""
    model, opt = trained(context, steps, lr=lr)
    start = bits(model, opt) if steps else weights(model)
    opt.zero_grad()
    if steps and not lr:
        with pytest.raises(RuntimeError, match="no posterior sample"):
            opt.step()
    backward(model)
    with pytest.raises(RuntimeError) as error:
        opt.step()
    for way in ("sampled_params(train=True)", "step(closure)", "train()"):
        assert way in str(error.value)
    assert_same(bits(model, opt) if steps else weights(model), start)
    assert bool(opt.state) == bool(steps)


@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)])
def test_the_dummy_step_of_distributed_checkpointing(lr):
    from torch.distributed.checkpoint import state_dict as dcp

    model, opt = make(lr=lr)
    start = weights(model)
    saved = dcp.get_optimizer_state_dict(model, opt)
    assert_same(weights(model), start)
    assert saved["state"]["0.weight"].keys() == {"step", "momentum", "hess"}
    assert saved["param_groups"][0]["seed"] == LR["seed"]
    assert opt.param_groups[0]["draws"] == 0
    assert int(opt.state[model[0].weight]["step"]) == 0
    assert opt.param_groups[0]["lr"] == 0.3
    for _ in range(2):
        context(opt, partial(backward, model))
    assert_same(bits(model, opt), bits(*trained(context, 2)))


@pytest.mark.parametrize("pending", [0, 2])
@pytest.mark.parametrize("flat", [False, True])
def test_resume_through_distributed_checkpointing(flat, pending):
    """Its flat form keeps only what a fresh state has: then an open window is dropped, loudly."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = trained(context, 2)
    samples(model, opt, pending)
    state = through_bytes(dcp.get_optimizer_state_dict(model, opt, options=options))
    again, its = make(seed=99)
    again.load_state_dict(model.state_dict())
    if flat and pending:
        with pytest.warns(UserWarning, match="unfinished window"):
            dcp.set_optimizer_state_dict(again, its, state, options=options)
        assert its.param_groups[0]["pending"] == 0
        return
    dcp.set_optimizer_state_dict(again, its, state, options=options)
    for m, o in ((model, opt), (again, its)):
        with o.sampled_params(train=True):
            o.zero_grad()
            backward(m)
        o.step()
    assert_same(bits(model, opt), bits(again, its))


@each_way
@few
def test_no_gradient_anywhere_warns_once(way, chosen):
    model, opt = make(**{**chosen, "store_mean": True})
    way(opt, partial(backward, model))
    start = bits(model, opt)
    with pytest.warns(UserWarning, match="no gradient"):
        way(opt, lambda: torch.zeros(()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way(opt, lambda: torch.zeros(()))
    assert_same(bits(model, opt), {**start, "draws": start["draws"] + 2})


def test_a_context_without_gradient_is_no_sample():
    model, opt = make()
    for use in (True, False, True):
        with opt.sampled_params(train=True):
            if use:
                backward(model)
    opt.step()
    other, expected = make()
    samples(other, expected, 1)
    with pytest.raises(ValueError), expected.sampled_params(train=True):  # noqa: PT011
        raise ValueError
    with expected.sampled_params(train=True):
        backward(other)
    expected.step()
    assert_same(bits(model, opt), bits(other, expected))


def test_train_with_several_samples_names_both_other_ways():
    _, opt = make(mc_samples=2)
    with pytest.raises(RuntimeError) as error:
        opt.train()
    assert "sampled_params(train=True)" in str(error.value)
    assert "step(closure)" in str(error.value)


def test_train_while_samples_wait():
    model, opt = make()
    for k in (1, 2):
        samples(model, opt, k)
        with pytest.raises(RuntimeError, match="wait for step"):
            opt.train()
        opt.step()
    opt.train()


@pytest.mark.parametrize("outer", [False, True])
def test_contexts_do_not_nest(outer):
    model, opt = make()
    start = weights(model)
    calls = {
        "sampled_params": lambda: opt.sampled_params().__enter__(),
        "sampled_params(train": lambda: opt.sampled_params(train=True).__enter__(),
        "train": opt.train,
        "eval": opt.eval,
        "step": opt.step,
        "load_state_dict": lambda: opt.load_state_dict(opt.state_dict()),
    }
    with opt.sampled_params(train=outer):
        drawn = weights(model)
        if outer:  # there is a sample already: nothing to do
            calls.pop("train")()
            assert_same(weights(model), drawn)
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match="leave that context first") as error:
                call()
            assert str(error.value).startswith(name)
        assert_same(weights(model), drawn)
    assert_same(weights(model), start)
    with opt.sampled_params():
        pass


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("culprit", ["window.runs", "ops.reference.sample"])
def test_a_sample_that_cannot_be_drawn_leaves_no_trace(culprit, training, monkeypatch):
    model, opt = make(fused=False)
    start = weights(model)
    monkeypatch.setattr(f"posterity.{culprit}", lambda *_, **__: fail(MemoryError))
    with pytest.raises(MemoryError), opt.sampled_params(train=training):
        pass
    assert_same(weights(model), start)


@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize("way", ["train", "context"])
def test_a_sample_half_drawn_leaves_no_trace(way, store_mean, monkeypatch):
    model, opt = make(fused=False, store_mean=store_mean)
    start = weights(model)
    whole = noise.Noise.__iter__

    def half(self):
        yield from list(whole(self))[:2]
        if len(self.like) > 2:  # not where the two are restored
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(noise.Noise, "__iter__", half)
        with pytest.raises(KeyboardInterrupt):
            opt.train() if way == "train" else opt.sampled_params(train=True).__enter__()
    bound = 0 if store_mean else 1e-7
    torch.testing.assert_close(weights(model), start, rtol=0, atol=bound)
    now = weights(model)
    with opt.sampled_params():
        pass
    assert_same(weights(model), now)


# -- evaluating never changes training -------------------------------------------------------------


def evaluate(model, opt):
    before = weights(model)
    grads = [p.grad for p in model.parameters()]
    with torch.no_grad(), opt.sampled_params():
        drawn = weights(model)
        loss(model)
    assert_same(weights(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert not torch.equal(drawn[0], before[0])
    return drawn


def looks(model, opt):
    """Everything that may be done at any time without changing training."""
    evaluate(model, opt)
    opt.state_dict()
    opt.posterior(model)
    with torch.inference_mode(), opt.sampled_params():
        loss(model)


@some
def test_evaluation_never_changes_training(chosen):
    results = []
    for look in (lambda *_: None, looks):
        model, opt = make(**chosen)
        look(model, opt)
        for _ in range(2):
            opt.zero_grad()
            for _ in range(2):
                with opt.sampled_params(train=True):
                    backward(model)
                look(model, opt)
            opt.step()
            look(model, opt)
            closure(opt, partial(backward, model))
            opt.zero_grad()
            opt.train()
            look(model, opt)  # while a training sample is live
            backward(model)
            look(model, opt)
            opt.step()
        results.append(bits(model, opt))
    assert_same(*results)


def test_evaluation_draws_are_fresh():
    model, opt = make()
    drawn = [evaluate(model, opt) for _ in range(4)]
    with opt.sampled_params(train=True):
        drawn.append(weights(model))
        backward(model)
    assert len({float(d[0][0, 0]) for d in drawn}) == 5
    opt.step()


def test_evaluation_samples_the_posterior_while_a_sample_is_live():
    """Around the mean, not around the live sample."""
    for store_mean in (True, False):
        model, opt = make(store_mean=store_mean)
        drawn = evaluate(model, opt)
        model, opt = make(store_mean=store_mean)
        opt.train()
        for a, b in zip(evaluate(model, opt), drawn, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_state_made_while_evaluating_in_inference_mode_trains(dtype):
    model, opt = make(dtype=dtype)
    with torch.inference_mode():
        with opt.sampled_params():
            loss(model)
        opt.posterior(model)
    context(opt, partial(backward, model))
    assert_same(bits(model, opt), bits(*trained(context, 1, dtype=dtype)))


LOOKS = {
    "evaluate": evaluate,
    "state_dict": lambda model, opt: opt.state_dict(),
    "posterior": lambda model, opt: opt.posterior(model),
    "eval": lambda model, opt: (opt.eval(), opt.train()) if live(opt) else opt.eval(),
    "train twice": lambda model, opt: opt.train() if live(opt) else None,
}


def live(opt):
    return opt._window.draw is not None and opt._window.draw.live


def act(name, model, opt):
    """A step of training; whether the weights are at rest afterwards."""
    if name == "train":
        if opt._window.draw is not None and opt._window.draw.way == "context":
            return
        if opt.param_groups[0]["pending"]:
            return
        opt.train()
        backward(model)
    elif name == "sample":
        if live(opt):
            return
        with opt.sampled_params(train=True):
            backward(model)
    elif name == "exception":
        with pytest.raises(ValueError), opt.sampled_params(train=True):  # noqa: PT011, PT012
            backward(model)
            raise ValueError
    elif name == "closure":
        closure(opt, partial(backward, model))
    elif name == "step" and (opt._window.draw is not None or opt.param_groups[0]["pending"]):
        opt.step()
    elif name == "zero_grad" and not live(opt):
        opt.zero_grad()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["train", "sample", "exception", "closure", "step", "zero_grad"]),
            st.sampled_from(sorted(LOOKS)),
        ),
        max_size=12,
    ),
    st.sampled_from([torch.float32, BF16]),
)
def test_any_order_of_calls(calls, dtype):
    """Looking changes no bit; and at rest the parameters are the mean that the last step left."""
    model, opt = make(dtype=dtype)
    other, plain = make(dtype=dtype)
    mean = weights(model)
    for name, look in calls:
        steps = name in ("closure", "step")
        act(name, model, opt)
        act(name, other, plain)
        if steps:
            mean = weights(model)
        elif not live(opt):
            assert_same(weights(model), mean)
        LOOKS[look](model, opt)
        assert live(opt) == live(plain)
        assert_same(weights(model), weights(other))
    opt.eval()
    plain.eval()
    assert_same(weights(model), mean)
    for a, b in zip(opt.state.values(), plain.state.values(), strict=True) if plain.state else ():
        assert_same(a, b)
