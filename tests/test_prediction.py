"""Model averaging: against loops written by hand, closed forms, and what serving asks of it."""

import gc
import math
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli, Categorical
from torch.utils.data import DataLoader, TensorDataset

from posterity import IVON, Mixture, Posterior
from posterity.prediction import predict


def around(model, precision=4.0, **kwargs):
    mean = {n: p.detach() for n, p in model.named_parameters()}
    return Posterior(mean, {n: torch.full_like(m, precision) for n, m in mean.items()}, **kwargs)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


@pytest.fixture
def x():
    return torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


def logits_by_hand(model, posterior, x, samples, seed):
    """(samples, examples, …) outputs, one plain loop."""
    model.eval()
    every = []
    for index in range(samples):
        with posterior.sampled(model, seed, index), torch.no_grad():
            every.append(model(x).double())
    return torch.stack(every)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["probs", "logits"])
def test_categorical_against_a_loop(net, x, average):
    q = around(net)
    got = predict(net, q, x, 7, average, seed=5)
    each = logits_by_hand(net, q, x, 7, 5).softmax(-1)
    mean = each.mean(0) if average == "probs" else each.log().mean(0).softmax(-1)
    torch.testing.assert_close(got.probs.double(), mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.log_probs.double(), mean.log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.entropy.double(), Categorical(mean).entropy(), atol=1e-5, rtol=0)
    information = Categorical(each.mean(0)).entropy() - Categorical(each).entropy().mean(0)
    torch.testing.assert_close(got.mutual_information.double(), information, atol=1e-5, rtol=0)
    variance = each.var(0, correction=0)
    torch.testing.assert_close(got.variance.double(), variance, atol=1e-7, rtol=1e-4)
    assert torch.equal(got.labels, mean.argmax(-1))
    assert (got.samples, got.likelihood) == (7, "categorical")
    assert not got.log_probs.requires_grad


@pytest.mark.parametrize("average", ["probs", "logits"])
def test_bernoulli_against_a_loop(net, x, average):
    q = around(net)
    got = predict(net, q, x, 6, average, "bernoulli", seed=2)
    each = logits_by_hand(net, q, x, 6, 2).sigmoid()  # four labels each
    mean = each.mean(0) if average == "probs" else each.logit().mean(0).sigmoid()
    torch.testing.assert_close(got.probs.double(), mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.entropy.double(), Bernoulli(mean).entropy(), atol=1e-5, rtol=0)
    information = Bernoulli(each.mean(0)).entropy() - Bernoulli(each).entropy().mean(0)
    torch.testing.assert_close(got.mutual_information.double(), information, atol=1e-5, rtol=0)
    variance = each.var(0, correction=0)
    torch.testing.assert_close(got.variance.double(), variance, atol=1e-7, rtol=1e-4)
    assert torch.equal(got.labels, (mean > 0.5).long())


class Two(nn.Module):
    """A regression model that knows its noise."""

    def __init__(self):
        super().__init__()
        self.location, self.log_variance = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.location(x), self.log_variance(x)


def test_gaussian_with_learned_noise_against_a_loop(x):
    model = Two()
    q = around(model)
    got = predict(model, q, x, 9, likelihood="gaussian", seed=3)
    means, noises = [], []
    for index in range(9):
        with q.sampled(model, 3, index), torch.no_grad():
            mean, log_variance = model(x)
        means.append(mean.double())
        noises.append(log_variance.double().exp())
    means, noises = torch.stack(means), torch.stack(noises)
    torch.testing.assert_close(got.mean.double(), means.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.noise_variance.double(), noises.mean(0), atol=1e-6, rtol=1e-5)
    total = means.var(0, correction=0) + noises.mean(0)
    torch.testing.assert_close(got.variance.double(), total, atol=1e-6, rtol=1e-5)


def test_bayesian_linear_regression_has_the_closed_form():
    """Orthogonal inputs, so that the exact posterior is diagonal: variance xᵀΣx + noise²."""
    torch.manual_seed(0)
    noise, delta, samples = 0.3, 2.0, 800
    inputs = torch.linalg.qr(torch.randn(50, 4)).Q * torch.tensor([1.0, 2.0, 3.0, 4.0])
    targets = inputs @ torch.randn(4, 1) + noise * torch.randn(50, 1)
    precision = (inputs.T @ inputs).diag() / noise**2 + delta
    mean = (inputs.T @ targets)[:, 0] / noise**2 / precision
    model, x = nn.Linear(4, 1, bias=False), torch.randn(30, 4)
    q = Posterior({"weight": mean[None]}, {"weight": precision[None]}, prior_precision=delta)
    got = predict(model, q, x, samples, likelihood="gaussian", noise=noise)
    epistemic = (x**2 / precision).sum(1, keepdim=True)
    z_mean = (got.mean - x @ mean[:, None]) / (epistemic / samples).sqrt()
    z_variance = (got.variance - noise**2 - epistemic) / (epistemic * math.sqrt(2 / samples))
    assert z_mean.abs().max() < 4
    assert z_variance.abs().max() < 4
    assert z_variance.abs().max() > 0.01  # a sample's, not the formula's


def test_averages_of_tiny_probabilities_do_not_underflow():
    model = nn.Linear(1, 2, bias=False)
    q = around(model, 1e8)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [-300.0]]))
    q = Posterior({"weight": model.weight}, q.precision)
    got = predict(model, q, torch.ones(1, 1), 8)
    assert got.probs[0, 1] == 0  # exp(-300)
    assert got.log_probs[0, 1] == pytest.approx(-300, abs=0.01)


def test_the_mean_of_probabilities_is_not_the_mean_of_logits():
    class Swings(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.stack([-200 * self.w, 200 * self.w], -1).expand(len(x), 2)

    model, x = Swings(), torch.zeros(1, 1)
    got = predict(model, around(model, 1.0), x, 300)
    assert 0.4 < got.probs[0, 0] < 0.6
    assert got.mutual_information.item() == pytest.approx(math.log(2), abs=0.03)  # all of it
    assert got.entropy.item() == pytest.approx(math.log(2), abs=0.01)


class Table(nn.Module):
    """Logits are weights: a prediction is all posterior."""

    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, classes))

    def forward(self, x):
        return self.weight[x]


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 9), st.floats(-3, 3), st.floats(-8, 8), st.integers(1, 9), st.integers(0, 99))
def test_entropy_and_information_bounds(classes, scale, width, samples, seed):
    model = Table(classes)
    mean = {"weight": torch.randn(5, classes) * 10**scale}
    q = Posterior(mean, {"weight": torch.full((5, classes), 10.0**width)})
    for average in ("probs", "logits"):
        got = predict(model, q, torch.arange(5), samples, average, seed=seed)
        assert (got.mutual_information >= 0).all()
        assert (got.entropy >= 0).all()
        assert (got.entropy <= math.log(classes) + 1e-5).all()
        assert (got.variance >= 0).all()
        assert (got.variance <= 0.25 + 1e-6).all()
        torch.testing.assert_close(got.probs.sum(-1), torch.ones(5))
        if average == "probs":
            assert (got.mutual_information <= got.entropy + 1e-5).all()


def test_one_sample_has_no_disagreement(net, x):
    got = predict(net, around(net), x, 1)
    assert (got.variance == 0).all()
    assert (got.mutual_information == 0).all()


def test_point_estimate_is_one_pass_of_the_model_as_it_stands(net, x):
    got = predict(net, None, x)
    assert got.samples == 1
    torch.testing.assert_close(got.probs, net.eval()(x).detach().softmax(-1))
    q = around(net, 1e-2)
    nn.init.zeros_(net[3].weight)
    with q.at_mean(net):
        torch.testing.assert_close(predict(net, None, x).probs, got.probs)


def test_a_mixtures_samples_are_its_total(net, x):
    members = [around(net), around(net, 0.1)]
    got = predict(net, Mixture(members), x, 8)
    assert got.samples == 8
    each = torch.stack([logits_by_hand(net, q, x, 8, 0).softmax(-1) for q in members])
    mean = (each[0, 0::2].sum(0) + each[1, 1::2].sum(0)) / 8
    torch.testing.assert_close(got.probs.double(), mean, atol=1e-6, rtol=1e-5)


def test_any_object_with_the_small_face_predicts(net, x):
    class Ensemble:
        def __init__(self, states):
            self.states = states

        def state(self, seed, index):
            return self.states[index]

        def sampled(self, model, seed, index):
            raise AssertionError("functional needs the state alone")

    states = [{n: p + k for n, p in net.state_dict().items()} for k in range(3)]
    got = predict(net, Ensemble(states), x, 3, functional=True)
    assert got.probs.shape == (20, 4)


def test_nan_stays_visible(net, x):
    x[3, 0] = math.nan
    got = predict(net, around(net), x, 3)
    for values in (got.probs.sum(-1), got.entropy, got.mutual_information, got.variance.sum(-1)):
        assert values.isnan().nonzero().flatten().tolist() == [3]


def test_masked_classes_have_probability_zero():
    model = Table(3)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]))
    model.forward = lambda x: model.weight[x] + model.mask
    got = predict(model, around(model), torch.arange(5), 4)
    assert (got.probs[:, 1] == 0).all()
    assert got.entropy.isfinite().all()
    assert got.mutual_information.isfinite().all()


def test_attributes_of_another_likelihood_say_so(net, x):
    classes = predict(net, None, x)
    gaussian = predict(net, None, x, likelihood="gaussian", noise=0.0)
    for name in ("mean", "noise_variance"):
        with pytest.raises(AttributeError, match=f"a categorical prediction has no {name}"):
            getattr(classes, name)
    for name in ("probs", "log_probs", "entropy", "mutual_information", "labels"):
        with pytest.raises(AttributeError, match="a gaussian prediction has no"):
            getattr(gaussian, name)
    with pytest.raises(AttributeError):
        classes.samples = 3


# --- shapes and forms of data ----------------------------------------------------------------


class Language(nn.Module):
    """A tiny language model with Hugging Face's calling convention."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return SimpleNamespace(logits=self.head(hidden), loss=None)


def test_token_level_language_model():
    model, ids = Language(), torch.randint(0, 11, (6, 5))
    q = around(model)
    got = predict(model, q, ids, 3)
    assert got.probs.shape == got.variance.shape == (6, 5, 11)
    assert got.entropy.shape == got.mutual_information.shape == got.labels.shape == (6, 5)
    same = predict(model, q, ids.flatten(), 3)  # no token sees another here
    torch.testing.assert_close(same.probs, got.probs.flatten(0, 1))


def test_dicts_and_loaders_of_dicts():
    model, ids = Language(), torch.randint(0, 11, (6, 5))
    data = {"input_ids": ids, "attention_mask": torch.randint(0, 2, (6, 5))}
    q = around(model)
    whole = predict(model, q, data, 3)
    rows = [{name: value[i] for name, value in data.items()} for i in range(6)]
    for other in (
        predict(model, q, data, 3, batch_size=4),
        predict(model, q, DataLoader(rows, batch_size=2), 3),
        predict(model, q, [data], 3),
        predict(model, q, (data, ids), 3),
    ):
        torch.testing.assert_close(other.probs, whole.probs)
    assert not torch.allclose(predict(model, q, ids, 3).probs, whole.probs)
    for bad in (data | {"input_ids": ids[:2]}, {"input_ids": ids.tolist()}, {}):
        with pytest.raises(ValueError, match="tensors of one length"):
            predict(model, q, bad)


def test_every_form_of_data_gives_the_same(net, x):
    q, y = around(net), torch.arange(20)
    expected = predict(net, q, x, 3).log_probs
    forms = {
        "batch size": predict(net, q, x, 3, batch_size=7),
        "pair": predict(net, q, (x, y), 3),
        "dataset": predict(net, q, TensorDataset(x, y), 3, batch_size=6),
        "loader of pairs": predict(net, q, DataLoader(TensorDataset(x, y), 6), 3),
        "loader of one": predict(net, q, DataLoader(TensorDataset(x), 6), 3),
        "loader of tensors": predict(net, q, DataLoader(x, 6), 3),
        "list": predict(net, q, [x[:5], x[5:]], 3),
        "generator": predict(net, q, ((x[i : i + 4], y) for i in range(0, 20, 4)), 3),
    }
    for form, got in forms.items():
        torch.testing.assert_close(got.log_probs, expected, msg=form)


def test_a_loader_is_traversed_once_per_sample(net, x):
    class Counting(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    data = Counting([x])
    predict(net, around(net), data, 5)
    assert data.passes in (5, 6)  # one more to see that it can be traversed again


@pytest.mark.parametrize("batch_size", [20, 5])
def test_a_loader_that_shuffles_is_an_error(net, x, batch_size):
    loader = DataLoader(x, batch_size, shuffle=True)
    with pytest.raises(ValueError, match="neither shuffle"):
        predict(net, around(net), loader, 3)
    assert predict(net, None, loader).probs.shape == (20, 4)  # one pass: any order will do


def test_data_that_change_their_length_are_an_error(net, x):
    class Growing:
        def __init__(self, steps):
            self.steps = iter(steps)

        def __iter__(self):
            return iter([x] * next(self.steps))

    for steps in ((9, 1, 2), (9, 2, 1)):
        with pytest.raises(ValueError, match="changed between"):
            predict(net, around(net), Growing(steps), 2)


def test_empty_and_ragged_data(net, x):
    with pytest.raises(ValueError, match="no data"):
        predict(net, around(net), [])
    with pytest.raises(ValueError, match="no data"):
        predict(net, around(net), x[:0])
    assert len(predict(net, around(net), [x, x[:0]]).probs) == len(x)
    with pytest.raises(ValueError, match="batches differ"):
        predict(Language(), None, [torch.ones(2, 3).long(), torch.ones(2, 4).long()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "poisson"}, "unknown likelihood 'poisson'"),
        ({"average": "weights"}, "average='weights' does not exist"),
        ({"average": "logits", "likelihood": "gaussian", "noise": 1.0}, "does not exist for gau"),
        ({"noise": 1.0}, "categorical likelihood has no noise"),
        ({"likelihood": "gaussian"}, "needs either noise"),
        ({"samples": 0}, "at least one sample"),
    ],
)
def test_invalid_arguments(net, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(net, around(net), x, **arguments)


def test_arguments_of_another_kind_say_what_is_meant(net, x):
    q, opt = around(net), IVON(net.parameters(), 0.1, ess=10.0)
    for posterior in ("posterior.safetensors", opt, net.state_dict()):
        with pytest.raises(TypeError, match=r"Posterior\.load\(path\) reads one"):
            predict(net, posterior, x)
    with pytest.raises(TypeError, match="the model is a Posterior"):
        predict(q, net, x)
    with pytest.raises(TypeError, match="from_numpy"):
        predict(net, q, x.numpy())


def test_a_posterior_without_statistics_on_a_fresh_network_is_told():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(6, 3)
    with pytest.warns(UserWarning, match="running statistics of 1"):
        predict(model, around(model), x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, around(model, buffers=dict(model.named_buffers())), x, 2)
        model(x)  # it has some of its own now
        model[1].num_batches_tracked.zero_()  # as of files that did not keep it
        predict(model, around(model), x, 2)


def test_one_example_without_its_dimension_is_an_error():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"x\[None\] for one"):
        predict(model, around(model), torch.randn(3))
    assert predict(nn.Linear(3, 1), None, torch.randn(3), likelihood="bernoulli").probs.shape == (
        1,
    )


def test_outputs_that_cannot_be_predictions(net, x):
    with pytest.raises(ValueError, match="use likelihood='bernoulli'"):
        predict(nn.Linear(3, 1), None, x)
    with pytest.raises(ValueError, match="needs either noise"):
        predict(Two(), None, x, likelihood="gaussian", noise=0.1)
    with pytest.raises(TypeError, match="returned a tuple"):
        predict(Two(), None, x)


def test_wide_and_narrow_outputs(net, x):
    assert predict(net.bfloat16(), None, x.bfloat16()).probs.dtype == torch.float32
    assert predict(net.double(), None, x.double()).probs.dtype == torch.float64


# --- what stays as it was --------------------------------------------------------------------


def test_training_flags_and_statistics_are_left_alone(net, x):
    net.train()
    net[1].eval()  # a frozen BatchNorm
    flags = [m.training for m in net.modules()]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    first = predict(net, around(net), x, 3)
    assert torch.equal(first.probs, predict(net, around(net), x, 3).probs)  # dropout is off
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_an_exception_restores_flags_and_weights(net):
    net.train()
    net[1].eval()
    flags = [m.training for m in net.modules()]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="mat1"):
        predict(net, around(net), torch.randn(5, 99), 3)
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_progress_wraps_the_samples(net, x):
    seen = []

    def progress(indices):
        for index in indices:
            seen.append((index, len(indices)))
            yield index

    predict(net, around(net), x, 4, progress=progress)
    assert seen == [(i, 4) for i in range(4)]


def test_memory_does_not_grow_with_samples(net):
    """Bytes of all live tensors at the start of each sample."""

    def live():
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    sizes = []
    gc.collect()
    gc.freeze()  # leaves out all that was there before, which is slow to go through

    def watching(indices):
        for index in indices:
            gc.collect()
            sizes.append(live())
            yield index

    x = torch.randn(2000, 3)
    for functional in (False, True):
        sizes.clear()
        predict(net, around(net), x, 7, progress=watching, functional=functional)
        assert sizes[1] - sizes[0] > 2000 * 4 * 4  # it sees the running totals
        assert max(sizes[2:]) - sizes[2] < 2000 * 4  # a quarter of one sample's probabilities
    gc.unfreeze()


# --- serving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["posterior", "mixture", "none"])
def test_functional_gives_the_same(net, x, kind):
    buffers = {"1.running_mean": torch.randn(8)}
    q = around(net, buffers=buffers)
    q = {"posterior": q, "mixture": Mixture([q, around(net, buffers=buffers)]), "none": None}[kind]
    net.train()
    expected = predict(net, q, x, 4)
    versions = [p._version for p in net.parameters()]
    got = predict(net, q, x, 4, functional=True)
    for name in ("log_probs", "mutual_information", "variance"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    assert [p._version for p in net.parameters()] == versions
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("functional", [False, True])
def test_a_model_that_writes_its_buffers_leaves_the_posteriors_alone(functional):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return super().forward(x) + self.seen

    model = Counting()
    q = around(model, buffers={"seen": torch.zeros(())})
    predict(model, q, torch.randn(5, 3), 4, functional=functional)
    assert q.buffers["seen"] == 0


def test_functional_with_tied_low_precision_and_wrapped_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    inner = Tied()
    q = around(inner)
    outer = nn.Sequential()
    outer.add_module("module", inner.bfloat16())
    ids = torch.arange(7)
    expected = predict(outer, q, ids, 3)
    assert torch.equal(predict(outer, q, ids, 3, functional=True).probs, expected.probs)


def test_functional_in_parallel_threads(net, x):
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.002)  # lets other threads in, in the middle of a forward pass
            return x

    model = nn.Sequential(Slow(), net, Slow(), nn.Linear(4, 4)).train()
    q = around(model)
    expected = [predict(model, q, x, 5, seed=k).log_probs for k in range(6)]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    got = [None] * 6

    def work(k):
        got[k] = predict(model, q, x, 5, seed=k, functional=True).log_probs

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
