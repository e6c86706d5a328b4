"""BatchNorm's running statistics under a posterior."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from posterity import IVON, Posterior, predict, update_bn

torch.set_num_threads(1)

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2, 3]) + 1
BATCHES = list(X.split(20))


def layer():
    """A linear layer, its normalisation, and a posterior of unlike widths."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    precision = {n: 1 + 20 * torch.rand_like(p) for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    return model, Posterior(dict(model.named_parameters()), precision, buffers=buffers)


def moments(weight, bias):
    """A linear layer's mean, and variance within a batch, averaged over the batches."""
    outputs = [batch @ weight.T + bias for batch in BATCHES]
    means = torch.stack([out.mean(0) for out in outputs])
    return means.mean(0), torch.stack([out.var(0) for out in outputs]).mean(0)


def test_statistics_are_the_average_over_samples():
    model, q = layer()
    found = update_bn(model, q, BATCHES, samples=5, seed=7).buffers
    drawn = [q.sample(7, s) for s in range(5)]
    means, variances = zip(*(moments(d["0.weight"], d["0.bias"]) for d in drawn), strict=True)
    torch.testing.assert_close(found["1.running_mean"], torch.stack(means).mean(0))
    torch.testing.assert_close(found["1.running_var"], torch.stack(variances).mean(0))
    assert found["1.num_batches_tracked"] == 15


def test_many_samples_have_the_closed_form():
    """E[w·x̄ + b] = m·x̄ + m_b, and E[w Σ w] = m Σ m + Σ_j σ_j² Σ_jj for w ~ N(m, diag σ²)."""
    model, q = layer()
    count = 400
    found = update_bn(model, q, BATCHES, samples=count).buffers
    m, m_b, std = q.mean["0.weight"], q.mean["0.bias"], q.std()
    centre = X.mean(0)
    error = ((std["0.weight"] ** 2 @ centre**2 + std["0.bias"] ** 2) / count).sqrt()
    off = (found["1.running_mean"] - (m @ centre + m_b)) / error
    assert off.abs().max() < 4
    cov = torch.stack([batch.T.cov() for batch in BATCHES]).mean(0)
    expected = ((m @ cov) * m).sum(1) + std["0.weight"] ** 2 @ cov.diag()
    drawn = [q.sample(0, s)["0.weight"] for s in range(count)]
    error = torch.stack([((w @ cov) * w).sum(1) for w in drawn]).std(0) / count**0.5
    assert ((found["1.running_var"] - expected) / error).abs().max() < 4
    assert ((found["1.running_var"] - ((m @ cov) * m).sum(1)) / error).min() > 4  # not the mean's


class Net(nn.Module):
    """Two normalisations, one after the other, and what must not run in train mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.path = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
            *(nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(64, 3)),
        )
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.path(x * self.scale)


IMAGES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))
LOADER = [(x, torch.zeros(len(x))) for x in IMAGES.split(10)]


def trained():
    model = Net()
    opt = IVON(model.parameters(), 0.1, ess=40, hess_init=0.5, seed=0)
    for x, _ in LOADER:
        with opt.sampled_params(train=True):
            model(x).square().mean().backward()
        opt.step()
    return model, opt.posterior(model)


def test_at_the_mean_they_are_torch_s_own():
    model, q = trained()
    twin = copy.deepcopy(model)
    swa_utils.update_bn(LOADER, twin)
    found = update_bn(model, q, LOADER, samples=0).buffers
    expected = dict(twin.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        if "running" in name:
            assert not torch.equal(q.buffers[name], found[name])


def test_predictions_use_them_and_the_model_is_left_alone():
    model, q = trained()
    model.train()
    model.path[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [(m.training, getattr(m, "momentum", 0)) for m in model.modules()]
    better = update_bn(model, q, LOADER, samples=4)
    seen = predict(model, better, IMAGES, samples=2).probs
    assert [(m.training, getattr(m, "momentum", 0)) for m in model.modules()] == flags
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    expected = []
    for s in range(2):
        other = Net().eval()
        other.load_state_dict(q.sample(0, s) | better.buffers)
        expected.append(other(IMAGES).softmax(1))
    torch.testing.assert_close(seen, sum(expected) / 2)
    assert not torch.allclose(seen, predict(model, q, IMAGES, samples=2).probs)


def test_dropout_is_off():
    model, q = layer()
    noisy = nn.Sequential(*model, nn.Dropout(0.5), nn.BatchNorm1d(4, affine=False))
    found = [update_bn(noisy, q, BATCHES, samples=2).buffers for _ in range(2)]
    assert all(torch.equal(v, found[1][n]) for n, v in found[0].items())


def test_a_posterior_without_buffers_gets_them_and_an_iterator_is_kept():
    model, q = layer()
    bare = Posterior(q.mean, q.precision)
    assert not bare.buffers
    found = update_bn(model, bare, iter(BATCHES), samples=3).buffers
    expected = update_bn(model, q, BATCHES, samples=3).buffers
    assert found.keys() == expected.keys()
    assert all(torch.equal(v, expected[n]) for n, v in found.items())


def test_an_exception_leaves_the_model_as_it_was():
    model, q = layer()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def broken():
        yield BATCHES[0]
        raise OSError

    class Loader:
        def __iter__(self):
            return broken()

    with pytest.raises(OSError):  # noqa: PT011
        update_bn(model, q, Loader(), samples=2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert model[1].training
    assert model[1].momentum == 0.1


def test_errors():
    model, q = layer()
    with pytest.raises(ValueError, match="no data"):
        update_bn(model, q, [])
    with pytest.raises(TypeError, match="needs batches"):
        update_bn(model, q, torch.randn(8, 3))
    with pytest.raises(ValueError, match="negative"):
        update_bn(model, q, BATCHES, samples=-1)
    plain = nn.Sequential(model[0], nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="no BatchNorm"):
        update_bn(plain, q, BATCHES)
    with pytest.raises(ValueError, match="does not fit"):
        update_bn(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), q, BATCHES)
