"""torch.compile, checkpointing, torch.func, parametrizations: sampling disturbs none of them."""

import itertools

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.checkpoint import checkpoint

from posterity import IVON, predict
from ways import LR, WAYS, X, Y, assert_same, bits, loss, make, weights

pytestmark = pytest.mark.slow
torch.set_num_threads(1)

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model, opt, way, count=4, forward=None):
    forward = forward or model
    for _ in range(count):
        way(opt, lambda: backward(forward))


def backward(forward):
    value = ((forward(X) - Y) ** 2).mean()
    value.backward()
    return value


# -- torch.compile ---------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("settings", [{}, {"store_mean": False}], ids=["stored", "regenerated"])
def test_sampling_never_recompiles(way, settings):
    """One graph, without a break, through training and evaluation, as without sampling."""
    model, opt = make(**settings)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    steps(model, opt, way, forward=compiled)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(model, opt, way, forward=compiled)
        with opt.sampled_params():
            backward(compiled)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    other, plain = make(**settings)
    steps(other, plain, way, 8)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        [opt.state[p]["hess"] for p in model.parameters()],
        [plain.state[p]["hess"] for p in other.parameters()],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_compiled_model_sees_each_sample():
    model, opt = make()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        seen = []
        for _ in range(3):
            with opt.sampled_params():
                torch.testing.assert_close(compiled(X), model(X))
                seen.append(compiled(X))
        seen.append(compiled(X))
    for a, b in itertools.combinations(seen, 2):
        assert not torch.allclose(a, b)


def test_the_posterior_of_a_compiled_model_predicts_in_either():
    model, opt = make()
    compiled = torch.compile(model, fullgraph=True)
    steps(model, opt, WAYS["context"], forward=compiled)
    posterior = opt.posterior(compiled)
    assert posterior.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    found = predict(compiled, posterior, X, samples=3).probs
    torch.testing.assert_close(found, predict(model, posterior, X, samples=3).probs)


# -- gradient checkpointing ------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """The tiny network, whose middle is calculated again in the backward pass."""

    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant, self.runs = model, reentrant, 0

    def middle(self, x):
        self.runs += 1
        return self.model[2](self.model[1](x))

    def forward(self, x):
        return checkpoint(self.middle, self.model[0](x), use_reentrant=self.reentrant)


@each_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(way, reentrant):
    model, opt = make()
    again = Checkpointed(model, reentrant)
    steps(model, opt, way, forward=again)
    assert again.runs == 8
    other, plain = make()
    steps(other, plain, way)
    assert_same(bits(model, opt), bits(other, plain))


# -- torch.func ------------------------------------------------------------------------------------


def per_example(model, params):
    """Gradients of each example, two ways: vmap of grad, and a loop of backward passes."""

    def value(params, x, y):
        return ((functional_call(model, params, (x[None],)) - y) ** 2).mean()

    mapped = vmap(grad(value), in_dims=(None, 0, 0))(params, X, Y)
    for i, (x, y) in enumerate(zip(X, Y, strict=True)):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        value(leaves, x, y).backward()
        for name, p in leaves.items():
            torch.testing.assert_close(mapped[name][i], p.grad)
    return mapped


def test_torch_func_inside_a_sample():
    model, opt = make()
    at_mean = per_example(model, dict(model.named_parameters()))
    with opt.sampled_params():
        at_sample = per_example(model, dict(model.named_parameters()))
    assert not torch.allclose(at_mean["0.weight"], at_sample["0.weight"])


def test_gradients_of_torch_func_train_like_those_of_backward():
    model, opt = make()
    other, plain = make()

    def value(params):
        return ((functional_call(model, params, (X,)) - Y) ** 2).mean()

    for _ in range(3):
        with opt.sampled_params(train=True):
            found = grad(value)({n: p.detach() for n, p in model.named_parameters()})
            for name, p in model.named_parameters():
                p.grad = found[name]
        opt.step()
    steps(other, plain, WAYS["context"], 3)
    assert_same(bits(model, opt), bits(other, plain))


def test_vmap_over_samples_of_the_posterior():
    """All samples in one call: what :func:`predict` averages one after the other."""
    model, opt = make()
    steps(model, opt, WAYS["context"])
    posterior = opt.posterior(model)
    states = [posterior.state(5, index) for index in range(4)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    outputs = vmap(lambda state: functional_call(model, state, (X,)))(stacked)
    assert not torch.allclose(outputs[0], outputs[1])
    for state, output in zip(states, outputs, strict=True):
        torch.testing.assert_close(output, functional_call(model, state, (X,)))
    expected = predict(model, posterior, X, samples=4, seed=5).probs
    torch.testing.assert_close(outputs.softmax(-1).mean(0), expected)


# -- parameters that modules share, make or lay out in their own way -------------------------------


class Twice(nn.Module):
    """One layer used twice, and an embedding tied to the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.inner(self.inner(self.table(tokens)).tanh()))


TOKENS = torch.randint(6, (8, 3), generator=torch.Generator().manual_seed(4))


@each_way
@pytest.mark.parametrize("compiled", [False, True])
def test_shared_parameters_are_one_parameter(way, compiled):
    """θ−m of the sample that both uses saw, times the sum of their gradients: equation (2)."""
    model = Twice()
    opt = IVON(model.parameters(), **LR)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    forward = torch.compile(model, fullgraph=True) if compiled else model
    found = {}

    def backwards():
        forward(TOKENS).square().mean().backward()
        found.update({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()})

    way(opt, backwards)
    assert set(found) == {"inner.weight", "inner.bias", "table.weight"}
    probe = {n: theta.requires_grad_() for n, (theta, _) in found.items()}
    functional_call(model, probe, (TOKENS,)).square().mean().backward()
    h0, weight_decay, beta2 = LR["hess_init"], LR["weight_decay"], LR["betas"][1]
    precision = LR["ess"] * (h0 + weight_decay)
    for name, p in model.named_parameters():
        theta, gradient = found[name]
        torch.testing.assert_close(gradient, probe[name].grad, rtol=1e-4, atol=1e-6)
        estimate = gradient * (theta.detach() - start[name]) * precision
        hess = beta2 * h0 + (1 - beta2) * estimate
        hess += (1 - beta2) ** 2 * (h0 - estimate) ** 2 / (h0 + weight_decay) / 2
        torch.testing.assert_close(opt.state[p]["hess"], hess, rtol=1e-4, atol=1e-6)
    assert model.head.weight is model.table.weight
    assert opt.posterior(model).names == tuple(start)


@each_way
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "matrix_exp", "cayley"])
def test_parametrizations(way, kind):
    """What is trained is what lies under a parametrization; the model sees its image."""
    model, _ = make()
    if kind.endswith("norm"):
        getattr(parametrizations, kind)(model[0])
    else:
        parametrizations.orthogonal(model[0], orthogonal_map=kind)
    opt = IVON(model.parameters(), **LR)
    first = model[0].weight.detach().clone()
    seen = []

    def backwards():
        seen.append(model[0].weight.detach().clone())
        loss(model).backward()

    for _ in range(4):
        way(opt, backwards)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([first, *seen], 2))
    if not kind.endswith("norm"):
        for weight in [*seen, model[0].weight]:
            torch.testing.assert_close(weight.T @ weight, torch.eye(3))
    model.eval()  # spectral_norm goes on with its power iteration in train mode
    posterior = opt.posterior(model)
    assert any(name.startswith("0.parametrizations.weight.original") for name in posterior.names)
    predict(model, posterior, X, samples=2)
    with posterior.sampled(model, 0, 1):
        expected = model(X)
    values = posterior.state(0, 1)
    torch.testing.assert_close(functional_call(model, values, (X,)), expected)
    outputs = model(X).detach()
    remove_parametrizations(model[0], "weight")
    torch.testing.assert_close(model(X), outputs)


def test_householder_maps_cannot_be_perturbed():
    """Torch rounds the diagonal of ±1 towards zero: anything that moves it zeroes a column."""
    model, _ = make()
    parametrizations.orthogonal(model[0], orthogonal_map="householder")
    opt = IVON(model.parameters(), **LR)
    with opt.sampled_params():
        assert not model[0].weight.norm(dim=0).all()


@each_way
def test_channels_last(way):
    """Channels-last networks train as row-major ones, compiled too."""
    found = []
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for layout, compiled in (
        (torch.contiguous_format, False),
        (torch.channels_last, False),
        (torch.channels_last, True),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)
        ).to(memory_format=layout)
        inputs = x.to(memory_format=layout)
        opt = IVON(model.parameters(), **LR)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        for _ in range(3):
            way(
                opt,
                lambda forward=forward, inputs=inputs: forward(inputs).square().mean().backward(),
            )
        assert model[0].weight.is_contiguous(memory_format=layout)
        found.append(weights(model))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)
