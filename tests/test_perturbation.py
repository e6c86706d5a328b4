"""Memory perturbation against retraining, closed forms, and itself."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.func import jacrev
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from posterity import IVON, Mixture, Posterior, leave_one_out, metrics, sensitivity
from posterity.integrations.adam import adam_posterior
from posterity.perturbation import grouped, perturb, without
from posterity_studies.models.gpt import GPT, GPTConfig


@dataclass
class Dense:
    """A posterior with a full covariance, over one tensor: what the diagonal ones approximate."""

    mean: dict
    matrix: torch.Tensor
    ess: float
    buffers: dict = field(default_factory=dict)

    def covariance(self, vector):
        ((name, v),) = vector.items()
        return {name: (self.matrix @ v.flatten()).view_as(v)}

    def state(self, seed, index):
        raise NotImplementedError


def linear(mean):
    """A linear model without bias that holds a mean (outputs, inputs)."""
    model = nn.Linear(*mean.shape[::-1], bias=False, dtype=mean.dtype)
    model.weight.data = mean.clone()
    return model


def ridge(x, y, precision, noise):
    """The mean and inverse covariance of Bayesian linear regression, prior N(0, I/precision)."""
    s = x.T @ x / noise**2 + precision * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(s, x.T @ y / noise**2), s


def refits(x, y, precision, noise):
    """Each example's prediction by a model that was fitted without it."""
    rows = torch.arange(len(x))
    return torch.stack(
        [x[i] @ ridge(x[rows != i], y[rows != i], precision, noise)[0] for i in rows]
    )


def regression(n=12, d=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, x.sum(1) + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)


def test_leaving_one_out_of_a_ridge_regression_is_exact_with_the_full_covariance():
    x, y = regression()
    mean, s = ridge(x, y, 2.0, 0.7)
    posterior = Dense({"weight": mean[None]}, s.inverse(), len(x))
    found = perturb(
        linear(mean[None]), posterior, (x, y[:, None]), "gaussian", noise=0.7, order=2, shifts=True
    )
    assert found.shift is not None
    outputs = x @ mean + found.shift[:, 0]
    torch.testing.assert_close(outputs, refits(x, y, 2.0, 0.7), rtol=1e-10, atol=1e-12)
    losses = (y - outputs) ** 2 / (2 * 0.49) + math.log(0.7 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found.left_out, losses, rtol=1e-10, atol=0)


def test_to_first_order_the_error_of_leaving_one_out_is_the_square_of_the_leverage():
    x, y = regression()
    mean, s = ridge(x, y, 2.0, 0.7)
    posterior = Dense({"weight": mean[None]}, s.inverse(), len(x))
    found = perturb(
        linear(mean[None]), posterior, (x, y[:, None]), "gaussian", noise=0.7, shifts=True
    )
    assert found.shift is not None
    leverage = (x @ s.inverse() * x).sum(1) / 0.49
    residual = x @ mean - y
    torch.testing.assert_close(found.shift[:, 0], leverage * residual)
    missed = refits(x, y, 2.0, 0.7) - (x @ mean + found.shift[:, 0])
    torch.testing.assert_close(missed, residual * leverage**2 / (1 - leverage))


def test_the_diagonal_posterior_is_exact_where_the_design_is_orthogonal():
    x, _ = torch.linalg.qr(regression(12, 3)[0])
    x, y = 3 * x, regression()[1]
    mean, s = ridge(x, y, 2.0, 0.7)
    precision = {"weight": s.diagonal()[None].clone()}
    posterior = Posterior({"weight": mean[None]}, precision, prior_precision=2.0, ess=len(x))
    found = perturb(
        linear(mean[None]), posterior, (x, y[:, None]), "gaussian", noise=0.7, order=2, shifts=True
    )
    assert found.shift is not None
    expected = refits(x, y, 2.0, 0.7) - x @ mean
    torch.testing.assert_close(found.shift[:, 0], expected, rtol=1e-9, atol=1e-12)


def logistic(x, y, weights, classes=3, precision=0.5):
    """The weighted optimum of softmax regression by Newton's method, and its Hessian."""

    def loss(w):
        each = cross_entropy(x @ w.view(classes, -1).T, y, reduction="none")
        return (weights * each).sum() + precision / 2 * w.square().sum()

    w = torch.zeros(classes * x.shape[1], dtype=x.dtype)
    for _ in range(50):
        step = torch.linalg.solve(torch.func.hessian(loss)(w), torch.func.grad(loss)(w))
        w = w - step
        if step.abs().max() < 1e-13:
            break
    return w.view(classes, -1), torch.func.hessian(loss)(w)


@pytest.fixture(name="softmax", scope="module")
def softmax_regression():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 2, generator=g, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=g)
    mean, hessian = logistic(x, y, torch.ones(20, dtype=torch.float64))
    return x, y, mean, Dense({"weight": mean}, hessian.inverse(), len(x))


def retrained(x, y, mean, who, small=1e-4):
    """d/dε of the weights where the examples ``who`` weigh 1−ε, by central differences."""
    ends = []
    for sign in (1, -1):
        weights = torch.ones(len(x), dtype=x.dtype)
        weights[who] -= sign * small
        ends.append(logistic(x, y, weights)[0])
    return (ends[0] - ends[1]) / (2 * small)


def test_the_shift_of_the_logits_is_the_derivative_of_retraining(softmax):
    x, y, mean, posterior = softmax
    found = perturb(linear(mean), posterior, (x, y), shifts=True)
    slopes = torch.stack([retrained(x, y, mean, i) @ x[i] for i in range(len(x))])
    torch.testing.assert_close(found.shift, slopes, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.sensitivity, slopes.norm(dim=1), rtol=1e-5, atol=1e-8)


def test_the_class_diagonal_is_the_retrained_shift_of_one_class_by_its_own_error(softmax):
    x, y, mean, posterior = softmax
    found = perturb(linear(mean), posterior, (x, y), full=False, shifts=True)
    jacobian = jacrev(lambda w: x @ w.T)(mean).flatten(2)
    v = torch.einsum("ncp,pq,ncq->nc", jacobian, posterior.matrix, jacobian)
    p = (x @ mean.T).softmax(1)
    e = p - one_hot(y, 3)
    torch.testing.assert_close(found.shift, v * e)
    torch.testing.assert_close(found.sensitivity, (e * p * (1 - p) * v).abs().sum(1))
    # what class c's own error alone does to its logit, by retraining with that error scaled
    i, c = 4, 2
    push = torch.zeros_like(mean)
    push[c] = e[i, c] * x[i]  # the gradient of example i's loss, of this class's weights
    moved = (posterior.matrix @ push.flatten()).view_as(mean) @ x[i]
    torch.testing.assert_close(found.shift[i, c], moved[c])


def test_the_estimate_is_nearer_to_retraining_than_the_training_loss(softmax):
    x, y, mean, posterior = softmax
    rows = torch.arange(len(x))
    fits = [logistic(x[rows != i], y[rows != i], torch.ones(19, dtype=x.dtype))[0] for i in rows]
    truth = torch.stack([cross_entropy(x[i] @ fits[i].T, y[i]) for i in rows]).mean().item()
    training = cross_entropy(x @ mean.T, y).item()
    first = leave_one_out(linear(mean), posterior, (x, y)).nll
    second = leave_one_out(linear(mean), posterior, (x, y), order=2).nll
    assert abs(second - truth) < abs(first - truth) < abs(training - truth) / 2


def test_without_a_class_the_mean_moves_as_retraining_does(softmax):
    x, y, mean, posterior = softmax
    diagonal = Posterior({"weight": mean}, {"weight": 1 / posterior.matrix.diagonal().view(3, 2)})
    who = torch.nonzero(y == 1).flatten()
    gradient = (((x @ mean.T).softmax(1) - one_hot(y, 3))[who].T @ x[who]).flatten()
    exact = (posterior.matrix @ gradient).view_as(mean)
    torch.testing.assert_close(exact, retrained(x, y, mean, who), rtol=1e-5, atol=1e-8)
    fewer = without(linear(mean), diagonal, (x[who], y[who]))
    expected = posterior.matrix.diagonal() * gradient
    torch.testing.assert_close(fewer.mean["weight"] - mean, expected.view_as(mean))
    halved = without(linear(mean), diagonal.temper(1.0), (x[who], y[who]), n_train=40)
    torch.testing.assert_close(halved.mean, fewer.mean)  # ess unknown: the factor is 1


def network(inputs=4, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, classes))


def around(model, precision=400.0, ess=None):
    mean = dict(model.named_parameters())
    return Posterior(
        mean,
        {n: torch.rand_like(m) * precision + precision for n, m in mean.items()},
        ess=ess,
        prior_precision=0.0,
        buffers=dict(model.named_buffers()),
    )


def pairs(n=9, inputs=4, classes=3):
    torch.manual_seed(3)
    return torch.randn(n, inputs), torch.randint(classes, (n,))


@pytest.mark.parametrize("full", [True, False])
def test_sampled_and_linear_variances_agree_within_standard_errors(full):
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(4, 3), pairs(40)
    posterior, samples = around(model), 500
    exact = perturb(model, posterior, (x, y), full=full, shifts=True).shift
    options = {"full": full, "shifts": True, "variance": "samples", "samples": samples}
    found = [perturb(model, posterior, (x, y), seed=seed, **options) for seed in range(12)]
    assert exact is not None
    drawn = torch.stack([one.shift for one in found])  # few weights: one draw's errors move as one
    e = model(x).softmax(1) - one_hot(y, 3)
    diagonal = perturb(model, posterior, (x, y), full=False, shifts=True).shift / e
    # (V̂e)_c of Gaussian outputs that are independent: Var = (v_c·Σ_d v_d e_d² + v_c² e_c²)/(S−1)
    cross = 0 if not full else diagonal * (diagonal * e**2).sum(1, keepdim=True)
    own = (diagonal * e) ** 2 * (1 if full else 2)
    errors = ((cross + own) / (samples - 1)).sqrt()
    z = (drawn - exact) / errors
    assert z.abs().max() < 4.5
    assert (z.mean(0) * len(found) ** 0.5).abs().max() < 4.5
    assert 0.7 < z.square().mean() < 1.4


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("options", [{"memory": 1.0}, {"vectorize": False}, {"batch_size": 2}])
def test_neither_chunks_nor_batches_change_the_result(full, options):
    model = network()
    model(torch.randn(64, 4))  # BatchNorm's statistics
    posterior, data = around(model, ess=50), pairs()
    expected = perturb(model, posterior, data, full=full, shifts=True)
    found = perturb(model, posterior, data, full=full, shifts=True, **options)
    for name in ("sensitivity", "loss", "left_out", "count", "shift"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_the_product_is_the_matrix_times_the_error():
    model = network().double()
    posterior, (x, y) = around(model), pairs()
    posterior, x = posterior.to(torch.float64), x.double()
    found = perturb(model.eval(), posterior, (x, y), shifts=True).shift
    state = dict(model.named_buffers())

    def outputs(weights):
        return torch.func.functional_call(model, weights | state, (x,))

    jacobian = jacrev(outputs)(posterior.mean)
    v = sum(
        torch.einsum(
            "ncp,p,ndp->ncd", j.flatten(2), 1 / posterior.precision[n].flatten(), j.flatten(2)
        )
        for n, j in jacobian.items()
    )
    e = outputs(posterior.mean).softmax(1) - one_hot(y, 3)
    torch.testing.assert_close(found, torch.einsum("ncd,nd->nc", v, e))
    second = perturb(model, posterior, (x, y), order=2, shifts=True)
    p = outputs(posterior.mean).softmax(1)
    h = p.diag_embed() - p[:, :, None] * p[:, None, :]
    corrected = torch.linalg.solve(torch.eye(3) - v @ h, (v @ e[..., None]))[..., 0]
    torch.testing.assert_close(second.shift, corrected)
    torch.testing.assert_close(second.sensitivity, found.norm(dim=1))


def test_a_network_with_small_deviations_is_linear_so_samples_agree_with_jacobians():
    model = network().double()
    posterior, (x, y) = around(model, 1e8).to(torch.float64), pairs()
    exact = sensitivity(model, posterior, (x.double(), y))
    drawn = sensitivity(model, posterior, (x.double(), y), variance="samples", samples=2000)
    torch.testing.assert_close(drawn, exact, rtol=0.15, atol=0)


def test_two_classes_are_a_bernoulli():
    torch.manual_seed(0)
    one = nn.Linear(4, 1)
    x, y = torch.randn(6, 4), torch.randint(2, (6,))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = one

        def forward(self, x):
            z = self.one(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    posterior = around(one)
    pair = Posterior(
        {f"one.{n}": m for n, m in posterior.mean.items()},
        {f"one.{n}": p for n, p in posterior.precision.items()},
    )
    for options in ({}, {"order": 2}, {"full": False}):
        bernoulli = perturb(one, posterior, (x, y[:, None]), "bernoulli", **options)
        two = perturb(Two(), pair, (x, y), **options)
        for name in ("sensitivity", "loss", "left_out"):
            torch.testing.assert_close(getattr(bernoulli, name), getattr(two, name))


def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1, heads=2, width=8, context=6, vocabulary=11))
    tokens = torch.randint(11, (5, 7))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = metrics.IGNORED
    targets[4] = metrics.IGNORED
    return model, (tokens[:, :-1], targets)


def test_a_sequence_is_one_example_of_many_targets():
    model, (tokens, targets) = gpt()
    posterior = around(model, ess=21)
    found = perturb(model, posterior, (tokens, targets), shifts=True)
    assert found.count.tolist() == [3, 6, 6, 6, 0]
    each = cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(found.loss, each.view(5, 6).sum(1) / found.count.clamp(min=1))
    assert found.sensitivity[4] == found.left_out[4] == 0
    assert found.shift is not None
    again = cross_entropy((model(tokens) + found.shift).flatten(0, 1), targets.flatten())
    nll = leave_one_out(model, posterior, (tokens, targets)).nll
    assert nll == pytest.approx(again.item(), rel=1e-5)
    matrix = perturb(model, posterior, (tokens, targets), order=2)  # forms (66 × 66) each
    torch.testing.assert_close(matrix.sensitivity, found.sensitivity, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_padding_changes_no_score(full):
    model, (tokens, _) = gpt()
    posterior, targets = around(model, ess=21), tokens[:, 1:5]
    short = perturb(model, posterior, (tokens[:, :4], targets), full=full)
    padded = nn.functional.pad(targets, (0, 2), value=metrics.IGNORED)
    found = perturb(model, posterior, (tokens, padded), full=full)
    torch.testing.assert_close(found.sensitivity, short.sensitivity)


def test_loaders_datasets_and_mappings_are_the_same_data():
    model = network()
    posterior, (x, y) = around(model, ess=30), pairs()
    expected = leave_one_out(model, posterior, (x, y))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, pixels):
            return self.net(pixels)

    whole = TensorDataset(x, y)
    named = Posterior(
        {f"net.{n}": v for n, v in posterior.mean.items()},
        {f"net.{n}": v for n, v in posterior.precision.items()},
        ess=30,
        buffers={f"net.{n}": v for n, v in posterior.buffers.items()},
    )
    rows = [{"pixels": a, "labels": b} for a, b in zip(x.split(2), y.split(2), strict=True)]
    kinds = [
        (model, posterior, whole),
        (model, posterior, DataLoader(whole, 4)),
        (model, posterior, iter(DataLoader(whole, 4))),
        (Named(), named, rows),
        (Named(), named, ({"pixels": x}, y)),
    ]
    for net, q, data in kinds:
        found = leave_one_out(net, q, data)
        torch.testing.assert_close(found.per_example, expected.per_example)
        assert found.nll == pytest.approx(expected.nll)


def test_the_factor_is_ess_over_the_number_of_targets():
    model, data = network(), pairs()
    unknown = perturb(model, around(model, ess=None), data, shifts=True)
    torch.manual_seed(3)
    posterior = around(model, ess=18.0)
    found = perturb(model, posterior, data, shifts=True)
    twice = perturb(model, posterior, data, shifts=True, n_train=18)
    torch.testing.assert_close(found.shift, 2 * twice.shift)
    torch.testing.assert_close(found.sensitivity, twice.sensitivity)
    alone = perturb(model, posterior._but(ess=None), data, shifts=True)
    torch.testing.assert_close(alone.shift, twice.shift)
    assert unknown.loss.equal(found.loss)


def test_a_narrow_posterior_says_the_training_loss():
    model, data = network(), pairs()
    posterior = around(model, 1e12, ess=9)
    found = perturb(model, posterior, data)
    torch.testing.assert_close(found.left_out, found.loss)


def test_an_ivon_posterior_estimates_the_test_loss_better_than_the_training_loss_does():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 20, generator=g)
    logit = x[:, :3] @ torch.tensor([[1.0], [1.0], [-1.0]])
    y = (torch.rand(len(x), 1, generator=g) < logit.sigmoid()).float()
    train, test = (x[:200], y[:200]), (x[200:], y[200:])
    model = nn.Linear(20, 1)
    settings = {"ess": 200, "hess_init": 0.2, "betas": (0.9, 0.99), "weight_decay": 0.02}
    opt = IVON(model.parameters(), 0.2, **settings, seed=0)
    for _ in range(600):
        with opt.sampled_params(train=True):
            opt.zero_grad()
            bce(model(train[0]), train[1]).backward()
        opt.step()
    found = leave_one_out(model, opt.posterior(model), train, "bernoulli").nll
    training, truth = (bce(model(x), y).item() for x, y in (train, test))
    assert abs(found - truth) < abs(training - truth) / 2


def test_the_model_is_left_as_it_was():
    model = network()
    posterior, (x, y) = around(model), pairs()
    for p in model.parameters():
        p.data.add_(1)  # not the posterior's mean
    model[1].eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    for variance in ("jacobian", "samples"):
        perturb(model, posterior, (x, y), variance=variance)
        with pytest.raises(ValueError, match="whole numbers in"):
            perturb(model, posterior, (x, y + 5), variance=variance)
    assert all(v.equal(before[n]) for n, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_groups_have_means_and_standard_errors():
    found = grouped(torch.tensor([1.0, 3.0, 5.0, 5.0, 9.0]), torch.tensor([4, 4, 2, 2, 7]))
    assert found.group.tolist() == [2, 4, 7]
    assert found.mean.tolist() == [5.0, 2.0, 9.0]
    assert found.count.tolist() == [2, 2, 1]
    assert found.error[:2].tolist() == [0.0, 1.0]
    assert found.error[2].isnan()
    with pytest.raises(ValueError, match="differ"):
        grouped(torch.ones(2), torch.ones(3))


class Branch(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "no data"),
        ({"data": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))}, "no data"),
        ({"data": (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))}, "differ in length"),
        ({"data": [torch.zeros(3, 4)]}, "pairs"),
        ({"data": (torch.zeros(3, 4), torch.zeros(3, 3))}, "do not fit"),
        ({"data": (torch.zeros(3, 4), torch.zeros(3))}, "whole numbers in"),
        (
            {"data": (torch.zeros(3, 4), torch.full((3, 3), 2.0)), "likelihood": "bernoulli"},
            r"\[0, 1\]",
        ),
        ({"likelihood": "poisson"}, "unknown likelihood"),
        ({"variance": "exact"}, "variance is"),
        ({"order": 3}, "order"),
        ({"samples": 1, "variance": "samples"}, "samples >= 2"),
        ({"noise": 0.0, "likelihood": "gaussian"}, "noise must be positive"),
        ({"model": nn.Linear(4, 2)}, "does not fit the model"),
        ({"posterior": Mixture([around(nn.Linear(4, 3))])}, "one of its components"),
        ({"model": Branch(4, 3)}, "vectorize=False"),
    ],
)
def test_wrong_input_is_named(change, message):
    model = nn.Linear(4, 3)
    arguments = {"model": model, "posterior": around(model), "data": pairs(), **change}
    with pytest.raises(ValueError, match=message):
        perturb(**arguments)
    if "vectorize" in message:
        perturb(**arguments, vectorize=False)


def test_adams_second_moments_stand_in_for_a_posterior():
    model = network()
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"take a step first.*0\.weight"):
        adam_posterior(opt, model, 100, 1.0)
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for _ in range(3):
        opt.zero_grad()
        cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        for n, p in model.named_parameters():
            squares[n] = 0.99 * squares[n] + 0.01 * p.grad**2
        opt.step()
    posterior = adam_posterior(opt, model, 100, 1.5)
    for n, precision in posterior.precision.items():
        expected = 100 * (squares[n] / (1 - 0.99**3)).sqrt() + 1.5
        torch.testing.assert_close(precision, expected)
    assert posterior.buffers.keys() == dict(model.named_buffers()).keys()


@pytest.mark.parametrize("ess", [None, 100.0])
@pytest.mark.parametrize("nothing", [[], (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))])
def test_no_data_and_no_targets_say_so(ess, nothing):
    model = nn.Linear(2, 3)
    mean = dict(model.named_parameters())
    width = {name: torch.full_like(p, 50.0) for name, p in mean.items()}
    posterior = Posterior(mean, width, ess=ess)
    with pytest.raises(ValueError, match="there are no"):
        perturb(model, posterior, nothing)
    with pytest.raises(ValueError, match="there are no targets"):
        leave_one_out(model, posterior, (torch.randn(3, 2), torch.full((3,), -100)))
    data = torch.randn(3, 2), torch.tensor([0, 1, 2])
    for call in (perturb, without):
        with pytest.raises(ValueError, match="needs n_train > 0, not 0"):
            call(model, posterior, data, n_train=0)


def test_a_measured_value_of_minus_a_hundred_counts():
    """It marks what is left out among class numbers only."""
    model = nn.Linear(2, 1)
    mean = dict(model.named_parameters())
    width = {name: torch.full_like(p, 50.0) for name, p in mean.items()}
    x = torch.randn(3, 2)
    nll = [
        leave_one_out(model, Posterior(mean, width, ess=3), (x, torch.full((3, 1), y)), "gaussian")
        for y in (-100.0, -100.001)
    ]
    assert nll[0].nll == pytest.approx(nll[1].nll, rel=1e-4)


def half(model, dtype):
    """A copy in 16 bits."""
    return copy.deepcopy(model).to(dtype)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("options", [{}, {"full": False}, {"order": 2}, {"variance": "samples"}])
def test_a_single_output_needs_no_dimension(likelihood, options):
    class Flat(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, 0]

    torch.manual_seed(0)
    flat, x = Flat(3, 1), torch.randn(5, 3)
    column = nn.Linear(3, 1)
    column.load_state_dict(flat.state_dict())
    y = torch.randint(2, (5,)).float()
    posterior = around(flat)
    found = perturb(flat, posterior, (x, y), likelihood, shifts=True, **options)
    wide = perturb(column, posterior, (x, y[:, None]), likelihood, shifts=True, **options)
    for name in ("sensitivity", "loss", "left_out", "count"):
        torch.testing.assert_close(getattr(found, name), getattr(wide, name))
    torch.testing.assert_close(found.shift, wide.shift[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("full", [True, False])
def test_sixteen_bits_hold_a_narrow_posterior(dtype, full):
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    mean = {n: p.detach().to(dtype).float() for n, p in model.named_parameters()}
    posterior = Posterior(mean, {n: torch.full_like(p, 1e9) for n, p in mean.items()})
    data = torch.randn(16, 8).to(dtype).float(), torch.randint(3, (16,))
    low = sensitivity(half(model, dtype), posterior, (data[0].to(dtype), data[1]), full=full)
    model.load_state_dict(mean)
    exact = sensitivity(model, posterior, data, full=full)
    torch.testing.assert_close(low.float(), exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_class_numbers_of_any_kind(dtype):
    torch.manual_seed(0)
    model, x = nn.Linear(2, 200), torch.randn(3, 2)
    y = torch.tensor([0, 100, 156 if dtype != torch.int8 else 101])
    posterior = around(model)
    found = perturb(model, posterior, (x, y.to(dtype)))
    assert found.count.tolist() == [1, 1, 1]
    torch.testing.assert_close(found.left_out, perturb(model, posterior, (x, y)).left_out)


def test_a_leverage_of_one_has_no_second_order():
    model = nn.Linear(4, 3)
    mean = dict(model.named_parameters())
    posterior = Posterior(mean, {n: torch.full_like(p, 1e-2) for n, p in mean.items()})
    with pytest.raises(ValueError, match=r"leverage of \d+ of 6 examples reaches 1.*order=1"):
        perturb(model, posterior, (torch.randn(6, 4), torch.arange(6) % 3), order=2)


def test_empty_batches_are_passed_over_and_buffers_stay():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            if not x.requires_grad:
                self.n += 1
            return super().forward(x)

    model, x, y = Counting(), torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    mean = dict(model.named_parameters())
    width = {name: torch.full_like(p, 50.0) for name, p in mean.items()}
    posterior = Posterior(mean, width, buffers={"n": torch.zeros(())})
    loader = [(x[:2], y[:2]), (x[:0], y[:0]), (x[2:], y[2:])]
    found = perturb(model, posterior, loader, variance="samples", samples=4)
    whole = perturb(model, posterior, (x, y), variance="samples", samples=4)
    torch.testing.assert_close(found.sensitivity, whole.sensitivity)
    assert posterior.buffers["n"] == 0


def test_leaving_nothing_out_and_a_mixture_say_so():
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="there are no targets"):
        without(model, around(model), [])
    with pytest.raises(ValueError, match="there are no targets"):
        perturb(model, around(model), (torch.randn(2, 2), torch.full((2,), -100)), n_train=5)
    with pytest.raises(ValueError, match="one of its components"):
        without(model, Mixture([around(model)]), (torch.randn(2, 2), torch.tensor([0, 1])))
