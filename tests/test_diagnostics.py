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
        *("started", "growth", "scatter", "negative", "noise_to_weight", "signal_to_noise"),
        *("clipped", "step_to_weight", "kl", "elbo"),
    ]
    assert all(v.good for v in found.verdicts), str(found)
    assert found.scalars()["posterior/good"] == 1


# What is wrong, and what the words tell to do.
MISTAKES = {
    "started": ({"betas": (0.9, 0.99999)}, "h has not moved"),
    "growth": ({"hess_init": 100.0, "lr": 1e-3}, "times, as h fell. Lower hess_init and lr"),
    "scatter": ({"ess": 1e6}, r"Raise betas\[1\] to 1 - 1/208,334, or lower ess 2.1e\+03 times"),
    "negative": (
        {"weight_decay": 1.0, "ess": 1e4, "betas": (0.9, 0.95)},
        "noise, mostly, or negative curvature",
    ),
    "noise_to_weight": (
        {"ess": 1.0},
        "drowns the weights.* in 2.weight. Where accuracy suffers raise ess or",
    ),
    "signal_to_noise": ({"hess_init": 1e9, "ess": 1e3}, "Lower ess or hess_init"),
    "clipped": ({"clip_radius": 1e-9}, "Raise clip_radius, and lower lr by as much"),
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


@pytest.mark.parametrize(("decay", "said"), [(1e-4, False), (0.1, True)])
def test_noise_beside_adamws_weight_decay_names_it(decay, said):
    model, opt = trained(ess=1.0, weight_decay=decay)
    (told,) = (v for v in opt.diagnostics(model).verdicts if v.name == "noise_to_weight")
    assert ("lower weight_decay" in told.words) == said


def number(words, before):
    return float(re.search(before + r"([\d.,e+]+)", words)[1].replace(",", ""))


def test_what_the_words_advise_cures():
    told = bad(trained(ess=1e6)[1], batch=24)["scatter"]
    longer, lower = number(told, r"to 1 - 1/"), number(told, "ess ")
    assert "scatter" not in bad(trained(ess=1e6, betas=(0.9, 1 - 1 / longer))[1], batch=24)
    assert not bad(trained(ess=1e6 / lower)[1], batch=24)
    told = bad(trained(betas=(0.9, 0.99999))[1], batch=24)["started"]
    assert not bad(trained(betas=(0.9, 1 - 1 / number(told, "to 1 - 1/")))[1], batch=24)


def test_several_samples_need_less_memory():
    told = [bad(trained(3, ess=1e6, mc_samples=k)[1], batch=24)["scatter"] for k in (1, 4)]
    one, four = (number(words, r"to 1 - 1/") for words in told)
    assert one == pytest.approx(4 * four, rel=1e-4)


def test_no_memory_is_advised_that_is_too_short_to_average():
    words = bad(trained(ess=1e6, betas=(0.9, 0.99999))[1], batch=24)["started"]
    assert words.endswith("train longer, or lower ess too")


def test_a_start_that_is_mostly_forgotten_is_not_called_unmoved():
    words = bad(trained(hess_init=1e4, lr=1e-5)[1])["started"]
    assert words.startswith("h is small beside its start: 9")
    assert bad(trained(10)[1])["started"].startswith("h has not moved")


def test_h_that_starts_at_zero_holds_nothing_of_it():
    assert trained(10, hess_init=0.0)[1].diagnostics().average("started") == 0


def test_what_noise_adds_to_h_is_prices_and_divided_by_samples():
    def scatter(steps=3, **settings):
        found = trained(steps, **settings)[1].diagnostics(batch=24)
        return {v.name: v.value for v in found.verdicts}.get("scatter")

    assert scatter() == pytest.approx(400 / (2 * 24 * 100))
    assert scatter(mc_samples=2) == pytest.approx(scatter() / 2)
    assert scatter(hess_every=3) == pytest.approx(400 / (2 * 24) * (1 - 0.99**3))
    assert scatter(hess_approx="gradsq", gradsq_scale=24) is None
    with pytest.warns(UserWarning, match="half a pair"):  # one context a step
        assert scatter(mc_samples=2, antithetic=True) is None


def test_h_that_decays_by_many_steps_at_once_has_forgotten_as_much():
    opt = trained(1, hess_init=100.0, hess_every=500)[1]
    assert opt.diagnostics().average("started") < 0.02


def test_steps_too_large_and_not_finite():
    model, opt = trained(1, lr=30.0)
    assert "lower lr" in bad(opt)["step_to_weight"]
    context(opt, partial(backward, model, scale=math.nan))
    (only,) = opt.diagnostics(model).verdicts
    assert only.name == "not_finite"
    assert "0.weight, 0.bias, 2.weight and 1 more not finite" in only.words
    assert opt.diagnostics(model).scalars()["posterior/good"] == 0


@pytest.mark.parametrize("name", ["hess", "momentum"])
def test_an_infinite_state_is_not_finite(name):
    model, opt = trained(10, clip_radius=1.0)
    opt.state[model[0].bias][name][1] = math.inf
    (only,) = opt.diagnostics(model).verdicts
    assert only.words.startswith("training diverged: 0.bias not finite")


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
        "idle": "4 never had a gradient: freeze what is not to learn",
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
    assert found.average("odd") == 0
    assert found.elbo == pytest.approx(-0.5 - posterior.kl() / 400, rel=1e-4)
    std = posterior.std()
    ratios = [posterior.mean[n].abs() / std[n] for n in posterior.names]
    for share in (0.05, 0.5, 0.95):
        exact = quantile(torch.cat([r.flatten() for r in ratios]), share)
        assert found.signal_to_noise(share) == pytest.approx(exact, rel=0.013)
    for layer, ratio in zip(found.layers, ratios, strict=True):
        norms = std[layer.name].norm() / posterior.mean[layer.name].norm()
        assert layer.noise_to_weight == pytest.approx(norms.item(), rel=1e-4)
        assert layer.signal_to_noise(0.5) == pytest.approx(quantile(ratio, 0.5), rel=0.013)


@pytest.mark.parametrize("settings", [{}, {"rescale_lr": False}, {"debias": False}], ids=str)
def test_the_step_is_what_the_weights_moved_by(settings):
    model, opt = trained(5, lr=1e-3, clip_radius=0.3, **settings)
    before = weights(model)
    context(opt, partial(backward, model))
    found = opt.diagnostics(model)
    assert 0 < found.average("clipped") < 1
    for layer, old, new in zip(found.layers, before, weights(model), strict=True):
        sample = math.hypot(layer.weight, layer.noise)
        moved = (new - old).square().mean().sqrt().item()
        assert layer.step_to_weight == pytest.approx(moved / sample, rel=2e-3)
        assert layer.weight == pytest.approx(new.square().mean().sqrt().item(), rel=1e-5)


def test_the_share_of_the_start_is_what_it_would_be_without_gradients():
    model, opt = make(betas=(0.9, 0.999), weight_decay=1e-6)
    for _ in range(100):
        context(opt, partial(backward, model, scale=0.0))
    found = opt.diagnostics(model)
    assert found.average("started") == pytest.approx(1, abs=1e-3)  # h is smaller, and all start
    assert found.average("rate") == pytest.approx(0.3 / 0.999**100, rel=1e-3)


def test_groups_are_judged_by_their_own_settings():
    model = make()[0]
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.0},
        {"params": list(model[2].parameters()), "ess": 800.0, "lr": torch.tensor(0.1)},
    ]
    opt = IVON(groups, 0.3, ess=400, hess_init=0.1, betas=(0.9, 0.99), weight_decay=0.01, seed=0)
    for _ in range(5):
        context(opt, partial(backward, model))
    found = opt.diagnostics(model, loss=1.0)
    (kl,) = (v for v in found.verdicts if v.name == "kl")
    assert kl.good
    assert kl.words.endswith("(2 tensors have a flat one)")
    assert math.isinf(found.layers[0].kl)
    assert found.kl == pytest.approx(sum(x.kl for x in found.layers[2:]))
    assert found.elbo == pytest.approx(-1 - found.kl / 800)
    assert found.layers[2].group["lr"] == pytest.approx(0.1)


def test_of_flat_priors_alone_there_is_no_bound():
    found = trained(weight_decay=0.0)[1].diagnostics(loss=1.0)
    assert found.kl == math.inf
    assert found.elbo == -math.inf
    assert [v.name for v in found.verdicts if not v.good] == ["kl", "elbo"]


def test_a_matrix_that_starts_at_zero_is_no_mistake():
    model, opt = make(ess=4000, betas=(0.9, 0.9), lr=0.03)
    nn.init.zeros_(model[2].weight)
    for _ in range(30):
        context(opt, partial(backward, model))
    assert opt.diagnostics(model).layers[2].noise_to_weight > 1
    assert not {"noise_to_weight", "step_to_weight"} & bad(opt).keys()


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
    with pytest.raises(ValueError, match="lacks parameters that the optimizer trains"):
        opt.diagnostics(model[0])
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
