"""The methods IVON is compared with: closed forms, and one contract for all of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from posterity import IVON, Mixture, Posterior, predict
from posterity_studies import baselines, recipes, runs, tasks, train
from posterity_studies.baselines import laplace, mean_field
from posterity_studies.baselines.swag import LowRank

N, WIDTH, CLASSES = 60, 3, 4


def network(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), *more, nn.Linear(5, CLASSES))


def examples(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (n,), generator=generator)


# ---- all of them, by the one loop ----

METHODS = [m for m in recipes.recipe("baselines").optimizers if m not in ("adamw", "sgd", "ivon")]


def small():
    """`baselines`, as short as `smoke`."""
    chosen = recipes.recipe("baselines")
    swag = replace(chosen.optimizers["swag"], start=0.5)
    short = {"epochs": 2, "train_limit": 200, "samples": 3, "batch_size": 25}
    return replace(chosen, optimizers={**chosen.optimizers, "swag": swag}, **short)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_what_it_leaves_predicts_again(method, folder, tmp_path):
    chosen = replace(small(), epochs=4)
    result = train.train(chosen, method, 0, tmp_path / "run")
    losses = result["curve"]["train_loss"]
    assert losses[-1] < losses[0]
    _, model, posterior = runs.load(tmp_path / "run")
    assert (posterior is None) == (method == "adahessian")
    saved = runs.read_tensors(tmp_path / "run/predictions.safetensors")
    name = "samples" if posterior else "mean"
    inputs = tasks.load_task(chosen).test[0]
    again = predict(model, posterior, inputs, 3, batch_size=train.EVAL_BATCH).probs
    # the whole was predicted together with what is unknown, in other batches
    if method != "dropout":
        torch.testing.assert_close(again, saved[f"{name}.probs"], atol=1e-5, rtol=1e-3)
    if posterior:
        assert not torch.equal(saved["samples.probs"], saved["mean.probs"])


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_same_bits(method, folder, tmp_path, monkeypatch):
    whole = train.train(small(), method, 0, tmp_path / "whole")
    epoch, calls = train._epoch, []

    def killed(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(*arguments)

    monkeypatch.setattr(train, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(small(), method, 0, tmp_path / "killed")
    torch.manual_seed(99)  # another process's generator
    train.train(small(), method, 0, tmp_path / "killed")
    for name in ("model.safetensors", "metrics.jsonl", "predictions.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert whole["evaluations"]["mean"]["nll"] > 0


# ---- MC-dropout ----


def test_dropout_has_the_moments_of_its_masks():
    """Of a single linear layer after a ReLU: mean w·x, variance r/(1−r) Σ (w x)²."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(50, 1, bias=False))
    x = torch.rand(1, 50)
    rate, draws = 0.3, 20_000
    prediction = predict(
        model, baselines.Dropout(rate), x.expand(draws, -1), 1, likelihood="gaussian", noise=0.0
    )
    outputs = prediction.mean.squeeze(1).double()  # a mask of its own for each example
    terms = (model[1].weight * x).double()
    variance = rate / (1 - rate) * terms.square().sum().item()
    assert abs(outputs.mean().item() - terms.sum().item()) < 4 * math.sqrt(variance / draws)
    assert abs(outputs.var().item() / variance - 1) < 4 * math.sqrt(2 / draws) + 0.01


def test_dropout_samples_differ_repeat_and_leave_the_generator_alone():
    model = nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    x, _ = examples()
    before = torch.get_rng_state()
    with baselines.Dropout(0.5).sampled(model, 0, 1):
        first = model(x)
    with baselines.Dropout(0.5).sampled(model, 0, 2):
        second = model(x)
    with baselines.Dropout(0.5).sampled(model, 0, 1):
        again = model(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model(x), model(x))  # the hooks are gone
    with pytest.raises(ValueError, match="functional=False"):
        predict(model, baselines.Dropout(0.5), x, 2, functional=True)
    with pytest.raises(ValueError, match="has none"):
        predict(network(), baselines.Dropout(0.5), x, 2)
    with pytest.raises(ValueError, match="dropout rate"):
        baselines.Dropout(1.0)


# ---- SWAG ----


def test_swag_gathers_the_moments_of_sgds_iterates():
    model, twin = network(), network()
    settings = {"momentum": 0.9, "weight_decay": 1e-3}
    opt = baselines.Swag(model.parameters(), 0.3, swag_lr=0.1, start=3, every=2, rank=3, **settings)
    sgd = torch.optim.SGD(twin.parameters(), 0.3, **settings)
    gathered = []
    for step in range(1, 12):
        sgd.param_groups[0]["lr"] = 0.1 if step >= 3 else 0.3
        for net, o in ((model, opt), (twin, sgd)):
            o.zero_grad()
            cross_entropy(net(examples()[0]), examples()[1]).backward()
            o.step()
        if step in (3, 5, 7, 9, 11):
            gathered.append(nn.utils.parameters_to_vector(twin.parameters()).detach().double())
    stack = torch.stack(gathered)
    q = opt.posterior(model)
    flat = torch.cat([m.flatten() for m in q.diagonal.mean.values()]).double()
    torch.testing.assert_close(flat, stack.mean(0), atol=1e-6, rtol=1e-5)
    variance = torch.cat([s.flatten() for s in q.diagonal.std().values()]).double() ** 2
    exact = stack.var(0, correction=0) / 2
    torch.testing.assert_close(variance, exact, atol=1e-9, rtol=1e-3)
    means = [stack[:n].mean(0) for n in range(1, 6)]
    deviations = torch.cat([d.flatten(1) for d in q.deviations.values()], 1).double()
    expected = torch.stack([stack[n - 1] - means[n - 1] for n in (4, 5, 3)])  # a ring of three
    torch.testing.assert_close(deviations, expected, atol=1e-6, rtol=1e-4)


def test_low_rank_samples_have_its_covariance():
    generator = torch.Generator().manual_seed(0)
    mean = {"w": torch.randn(4, generator=generator)}
    diagonal = Posterior(mean, {"w": torch.tensor([1.0, 4.0, 9.0, 16.0])})
    deviations = torch.randn(3, 4, generator=generator)
    q = LowRank(diagonal, {"w": deviations})
    draws = torch.stack([q.state(0, s)["w"] for s in range(6000)]).double()
    covariance = torch.diag(1 / torch.tensor([1.0, 4.0, 9.0, 16.0]).double())
    covariance += deviations.double().T @ deviations.double() / (2 * 2)
    width = (covariance.diag()[:, None] * covariance.diag() + covariance**2).div(len(draws)).sqrt()
    assert ((draws.T.cov() - covariance).abs() < 4.5 * width).all()
    off = (draws.mean(0) - mean["w"]).abs()
    assert (off < 4.5 * (covariance.diag() / len(draws)).sqrt()).all()


def test_swag_that_gathered_too_little_says_so():
    model = network()
    opt = baselines.Swag(model.parameters(), 0.1, swag_lr=0.1, start=9, every=1)
    with pytest.raises(ValueError, match="start earlier"):
        opt.posterior(model)


# ---- Bayes by backprop, VOGN ----


def test_backprop_finds_the_posterior_of_a_gaussian():
    """ℓ̄(θ) = ½ a (θ−c)²: the optimum is m = ac/(a+δ), 1/σ² = λ(a+δ)."""
    a, c, delta, ess = 2.0, 1.5, 0.5, 50.0
    p = nn.Parameter(torch.zeros(4000))
    opt = baselines.BayesByBackprop([p], 0.01, ess=ess, weight_decay=delta)
    for step in range(1500):
        for group in opt.param_groups:
            group["lr"] = 0.01 * (1 - step / 1500)
        with opt.sampled_params(train=True):
            opt.zero_grad()
            (a / 2 * (p - c).square()).sum().backward()
        opt.step()
    model = nn.ParameterList([p])
    q = opt.posterior(model)
    assert q.mean["0"].mean().item() == pytest.approx(a * c / (a + delta), rel=5e-3)
    assert q.std()["0"].mean().item() == pytest.approx((ess * (a + delta)) ** -0.5, rel=2e-2)
    assert q.prior_precision["0"].item() == pytest.approx(ess * delta)


def test_gradients_of_examples_are_those_of_one_at_a_time():
    model, (x, y) = network(), examples(7)
    each, losses = mean_field.per_example(model, x, y)
    for i in range(7):
        loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-5)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(each[name][i], g, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="BatchNorm"):
        mean_field.per_example(network(nn.BatchNorm1d(5)), x, y)


def test_vogn_with_a_constant_hessian_takes_ivons_steps():
    """Where nothing changes h, and no noise, both are the same preconditioned momentum."""
    settings = {"lr": 0.1, "ess": 1e20, "hess_init": 0.3, "weight_decay": 0.01}
    model, twin = network(), network()
    vogn = baselines.Vogn(model.parameters(), **settings, betas=(0.9, 1.0))
    ivon = IVON(twin.parameters(), **settings, betas=(0.9, 1 - 1e-15))
    x, y = examples()
    for _ in range(20):
        with vogn.sampled_params(train=True):
            vogn.zero_grad()
            loss = vogn.backward(model, x, y, 1 / N)
        vogn.step()
        with ivon.sampled_params(train=True):
            ivon.zero_grad()
            other = cross_entropy(twin(x), y)
            other.backward()
        ivon.step()
        assert loss.item() == pytest.approx(other.item(), rel=1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_vogns_h_is_the_mean_square_of_examples_gradients():
    model, (x, y) = network(), examples(40)  # in chunks of 16, 16, 8
    opt = baselines.Vogn(
        model.parameters(), 0.0, ess=1e20, hess_init=1.0, weight_decay=0.0, betas=(0.9, 0.75)
    )
    with opt.sampled_params(train=True):
        opt.zero_grad()
        opt.backward(model, x, y, 1 / 40)
    opt.step()
    each, _ = mean_field.per_example(model, x, y)
    q = opt.posterior(model)
    for name, g in each.items():
        expected = 1e20 * (0.75 + 0.25 * g.square().mean(0))
        torch.testing.assert_close(q.precision[name], expected, rtol=1e-4, atol=0)


# ---- Laplace ----


def explicit(model, x, names):
    """Σ_i J_iᵀ(diag p − ppᵀ)J_i over the named weights, one Jacobian at a time, in float64."""
    weights = dict(model.named_parameters())
    total = 0
    for row in x:
        f = model(row[None])[0]
        rows = [torch.autograd.grad(f[c], [weights[n] for n in names], retain_graph=True)
                for c in range(len(f))]  # fmt: skip
        jacobian = torch.stack([torch.cat([g.flatten() for g in r]) for r in rows])
        p = f.softmax(0).detach()
        total += jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian
    return total


def test_diagonal_laplace_is_the_gauss_newton_diagonal():
    model, (x, _) = network().double(), examples(20)
    x = x.double()
    q = baselines.diagonal(model, x, prior=0.7)
    expected = explicit(model, x, list(q.names)).diag() + 0.7
    found = torch.cat([p.flatten() for p in q.precision.values()])
    torch.testing.assert_close(found, expected)
    assert q.ess == 20
    assert torch.equal(q.mean["0.weight"], model[0].weight)


def test_last_layer_laplace_has_the_gauss_newton_covariance():
    model, (x, _) = network().double(), examples(20)
    x = x.double()
    q = baselines.last_layer(model, x, prior=0.7)
    block = explicit(model, x, ["2.weight", "2.bias"])
    mine = q.factor @ q.factor.T - 0.7 * torch.eye(CLASSES * 6)
    order = torch.cat([torch.arange(CLASSES * 5).view(CLASSES, 5),
                       CLASSES * 5 + torch.arange(CLASSES)[:, None]], 1).flatten()  # fmt: skip
    torch.testing.assert_close(mine, block[order][:, order])
    states = [q.state(0, s) for s in range(4000)]
    off = torch.stack([(s["2.weight"] - model[2].weight).flatten() for s in states])
    covariance = torch.linalg.inv(block + 0.7 * torch.eye(len(block)))[: CLASSES * 5, : CLASSES * 5]
    width = (covariance.diag()[:, None] * covariance.diag() + covariance**2).div(4000).sqrt()
    assert ((off.T.cov() - covariance).abs() < 5 * width).all()
    assert all(torch.equal(s["0.weight"], model[0].weight) for s in states[:3])


def test_the_prior_is_that_of_the_highest_evidence():
    """For curvatures all equal to h: d/dτ = 0 at D/τ − ‖m‖² − D/(h+τ) = 0."""
    h, size, squares = 5.0, 40, 16.0
    tau = laplace.prior_precision(torch.full((size,), h), squares)
    solution = (-h + math.sqrt(h * h + 4 * h * size / squares)) / 2
    assert tau == pytest.approx(solution, rel=0.13)  # the grid's step


# ---- files, ensembles ----


def made():
    model, (x, _) = network(), examples(30)
    mean = dict(model.named_parameters())
    q = Posterior(mean, {n: torch.full_like(p, 9.0) for n, p in mean.items()})
    deviations = {n: torch.randn(3, *p.shape) for n, p in mean.items()}
    return {
        "posterior": q,
        "mixture": Mixture([q, q]),
        "low rank": LowRank(q, deviations),
        "last layer": baselines.last_layer(model, x),
        "dropout": baselines.Dropout(0.25),
    }


@pytest.mark.parametrize("name", made())
def test_a_file_predicts_as_what_was_saved(name, tmp_path):
    q = made()[name]
    model = nn.Sequential(*network(), nn.ReLU())  # dropout needs one
    q.save(tmp_path / "q.safetensors")
    again = baselines.load(tmp_path / "q.safetensors")
    assert type(again) is type(q)
    x, _ = examples()
    assert torch.equal(predict(model, q, x, 4).probs, predict(model, again, x, 4).probs)
    (tmp_path / "bad").write_bytes((tmp_path / "q.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="bad"):
        baselines.load(tmp_path / "bad")


def test_an_ensemble_is_the_mean_of_its_members():
    models = [network(nn.BatchNorm1d(5)).train() for _ in range(3)]
    x, _ = examples()
    for k, model in enumerate(models):
        with torch.no_grad():
            model[0].weight += k
        model(x + k)  # statistics of its own
    mean = sum(predict(m, None, x).probs for m in models) / 3
    found = predict(network(nn.BatchNorm1d(5)), baselines.ensemble(models), x, 3).probs
    torch.testing.assert_close(found, mean)
