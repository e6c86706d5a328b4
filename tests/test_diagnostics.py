"""What is diagnosed is true, and each mistake is named by its verdict."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from posterity import IVON
from ways import WAYS, assert_same, backward, bits, context, loss, make, samples, weights


def trained(steps=300, dtype=torch.float32, **settings):
    model, opt = make(dtype, **{"ess": 400, "betas": (0.9, 0.99), **settings})
    for _ in range(steps):
        context(opt, partial(backward, model))
    return model, opt


def quantile(values, share):
    """The least value that so many do not exceed."""
    return values.flatten().kthvalue(math.ceil(share * values.numel())).values.item()


def bad(opt, **given):
    return {v.name: v.words for v in opt.diagnostics(**given).verdicts if not v.good}


def test_a_sound_training_has_no_bad_verdict():
    model, opt = trained(clip_radius=3.0)
    found = opt.diagnostics(model, loss=loss(model).item(), batch=24)
    assert [v.name for v in found.verdicts] == [
        *("started", "scatter", "negative", "noise_to_weight", "signal_to_noise"),
        *("clipped", "step_to_weight", "kl", "elbo"),
    ]
    assert all(v.good for v in found.verdicts), str(found)
    assert found.scalars()["posterior/good"] == 1


# What is wrong, and what the words tell to do.
MISTAKES = {
    "started": ({"betas": (0.9, 0.99999)}, "h has not moved"),
    "scatter": ({"ess": 1e6}, r"Raise betas\[1\] to 0.999995, or lower ess to 480"),
    "negative": ({"weight_decay": 1.0, "ess": 1e4, "betas": (0.9, 0.95)}, "which is noise"),
    "noise_to_weight": ({"ess": 1.0}, "drowns the weights of 0.weight.*raise ess or hess_init"),
    "signal_to_noise": ({"hess_init": 1e9, "ess": 1e3}, "Lower ess or hess_init"),
    "clipped": ({"clip_radius": 1e-9}, "Raise clip_radius or hess_init"),
    "step_to_weight": ({"lr": 1e-9}, "Raise lr; with rescale_lr good values are above SGD's"),
    "kl": ({"weight_decay": 0.0}, "set weight_decay above 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    settings, words = MISTAKES[name]
    model, opt = trained(**settings)
    found = opt.diagnostics(model, loss=1.0, batch=24)
    told = {v.name: v.words for v in found.verdicts if not v.good}
    assert name in told, str(found)
    assert re.search(words, told[name]), told[name]
    assert found.scalars()["posterior/good"] == 0
    assert f"! {told[name]}" in str(found)


def test_what_the_words_advise_cures():
    assert "scatter" not in bad(trained(ess=1e6, betas=(0.9, 0.999995))[1], batch=24)
    assert "scatter" not in bad(trained(ess=480)[1], batch=24)
    _, opt = trained(betas=(0.9, 0.99999))
    advised = float(bad(opt)["started"].split("with ")[1].split()[0])
    assert "started" not in bad(trained(betas=(0.9, advised))[1])


def test_steps_too_large_and_not_finite():
    model, opt = trained(1, lr=30.0)
    assert "lower lr" in bad(opt)["step_to_weight"]
    context(opt, partial(backward, model, scale=math.nan))
    (only,) = opt.diagnostics(model).verdicts
    assert only.name == "finite"
    assert "0.weight, 0.bias, 2.weight and 1 more not finite" in only.words
    assert opt.diagnostics(model).scalars()["posterior/good"] == 0


def test_a_loss_that_is_not_finite_spoils_the_elbo():
    _, opt = trained()
    assert list(bad(opt, loss=math.nan)) == ["elbo"]


def test_without_a_step_there_is_nothing_to_judge():
    model, opt = make()
    (only,) = opt.diagnostics(model).verdicts
    assert only.name == "steps"
    assert not only.good
    context(opt, partial(backward, model))
    assert opt.diagnostics(model).steps == 1


def test_tensors_without_a_gradient_are_counted_and_not_judged():
    model, unused = make()[0], nn.Parameter(torch.zeros(3, 3))
    opt = IVON([*model.parameters(), unused], lr=0.3, ess=400, hess_init=0.1, betas=(0.9, 0.99))
    for _ in range(300):
        context(opt, partial(backward, model))
    assert bad(opt) == {
        "idle": "1 tensors never had a gradient: freeze them, or find out why",
    }


def test_a_schedule_that_ended_at_zero_is_no_mistake():
    model, opt = make(ess=400, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, 300)
    for _ in range(300):
        context(opt, partial(backward, model))
        schedule.step()
    assert opt.param_groups[0]["lr"] == 0
    assert not bad(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_numbers_are_the_posteriors(dtype):
    model, opt = trained(dtype=dtype)
    posterior, found = opt.posterior(model), opt.diagnostics(model, loss=0.5)
    assert [layer.name for layer in found.layers] == list(posterior.names)
    assert found.size == len(torch.cat([m.flatten() for m in posterior.mean.values()]))
    assert found.kl == pytest.approx(posterior.kl(), rel=1e-4)
    assert found.elbo == pytest.approx(-0.5 - posterior.kl() / 400, rel=1e-4)
    std = posterior.std()
    ratios = [posterior.mean[n].abs() / std[n] for n in posterior.names]
    for share in (0.05, 0.5, 0.95):
        exact = quantile(torch.cat([r.flatten() for r in ratios]), share)
        assert found.signal_to_noise(share) == pytest.approx(exact, rel=0.03)
    for layer, ratio in zip(found.layers, ratios, strict=True):
        norms = std[layer.name].norm() / posterior.mean[layer.name].norm()
        assert layer.noise_to_weight == pytest.approx(norms.item(), rel=1e-4)
        assert layer.signal_to_noise(0.5) == pytest.approx(quantile(ratio, 0.5), rel=0.03)


@pytest.mark.parametrize("settings", [{}, {"rescale_lr": False}, {"debias": False}], ids=str)
def test_the_step_is_what_the_weights_moved_by(settings):
    model, opt = trained(5, lr=1e-3, clip_radius=0.3, **settings)
    before = weights(model)
    context(opt, partial(backward, model))
    found = opt.diagnostics(model)
    assert 0 < found.average("clipped") < 1
    for layer, old, new in zip(found.layers, before, weights(model), strict=True):
        moved = (new - old).norm() / new.norm()
        assert layer.step_to_weight == pytest.approx(moved.item(), rel=2e-3)


def test_the_share_of_the_start_is_what_it_would_be_without_gradients():
    model, opt = make(betas=(0.9, 0.999), weight_decay=1e-6)
    for _ in range(100):
        context(opt, partial(backward, model, scale=0.0))
    found = opt.diagnostics(model)
    assert found.average("started") == pytest.approx(1, abs=1e-3)  # h is smaller, and all start
    assert found.average("rate") == pytest.approx(0.3 / 0.999**100, rel=1e-3)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_looking_changes_nothing_and_needs_no_rest(way):
    def run(look):
        model, opt = make()
        for _ in range(3):
            way(opt, partial(backward, model), between=partial(look, opt, model))
        look(opt, model)
        return bits(model, opt)

    assert_same(run(lambda opt, model: None), run(lambda opt, model: opt.diagnostics(model)))


def test_a_live_sample_is_not_taken_for_the_mean():
    model, opt = trained()
    resting = str(opt.diagnostics(model))
    samples(model, opt, 1)
    with opt.sampled_params():
        assert str(opt.diagnostics(model)) == resting
    assert str(opt.diagnostics(model)) == resting


def test_names_come_from_the_model_or_are_numbers():
    model, opt = trained(1)
    assert [x.name for x in opt.diagnostics().layers] == ["0", "1", "2", "3"]
    assert next(x.name for x in opt.diagnostics(model.named_parameters()).layers) == "0.weight"


@pytest.mark.slow
def test_tensorboard_shows_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, opt = trained()
    found = opt.diagnostics(model)
    with SummaryWriter(tmp_path) as writer:
        found.write(writer, 60)
    seen = EventAccumulator(str(tmp_path)).Reload()
    for name, value in found.scalars(layers=True).items():
        (event,) = seen.Scalars(name)
        assert event.step == 60
        assert event.value == pytest.approx(value, rel=1e-6)
    assert "posterior/noise_to_weight/2.weight" in seen.Tags()["scalars"]
