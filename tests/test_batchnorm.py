import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from posterity import IVON, Posterior, predict, update_bn

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
BATCHES = [(part, torch.zeros(16)) for part in X.split(16)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def posterior_of(model, precision=25.0, buffers=None):
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Posterior(
        mean, {name: torch.full_like(m, precision) for name, m in mean.items()}, buffers=buffers
    )


def statistics(model):
    return {name: t.clone() for name, t in model.named_buffers()}


def test_without_noise_they_are_torchs_own():
    ours, theirs = network(), network()
    update_bn(ours, posterior_of(ours, 1e18), BATCHES, samples=2)
    swa_utils.update_bn(BATCHES, theirs)
    for name, value in statistics(ours).items():
        torch.testing.assert_close(value, statistics(theirs)[name], rtol=1e-5, atol=1e-6)


def test_a_linear_layers_statistics_are_those_of_its_weights_distribution():
    """Of wᵀx + b over data and weights: E mean = mᵀx̄ + b̄, E var = mᵀCm + Σ σ²·Cᵢᵢ."""
    model, samples = network(), 4000
    posterior = posterior_of(model)
    update_bn(model, posterior, BATCHES, samples)
    weight, bias = posterior.mean["0.weight"].double(), posterior.mean["0.bias"].double()
    means, covariances = [], []
    for x, _ in BATCHES:
        means.append(x.double().mean(0))
        covariances.append(torch.cov(x.double().T))
    mean, covariance = torch.stack(means).mean(0), torch.stack(covariances).mean(0)
    variance = 1 / 25
    norm = model[1]
    error = (variance * (mean.square().sum() + 1) / samples) ** 0.5
    assert ((norm.running_mean - (weight @ mean + bias)).abs() < 4 * error).all()
    expected = ((weight @ covariance) * weight).sum(1) + variance * covariance.trace()
    # variance of wᵀCw for w ~ N(m, σ²I): 4σ² mᵀC²m + 2σ⁴ tr C²
    square = covariance @ covariance
    spread = 4 * variance * ((weight @ square) * weight).sum(1) + 2 * variance**2 * square.trace()
    assert ((norm.running_var - expected).abs() < 4 * (spread / samples).sqrt()).all()


def test_only_the_statistics_change_and_the_posteriors_copy_too():
    model = network()
    model[3].requires_grad_(False)
    opt = IVON([p for p in model.parameters() if p.requires_grad], 0.1, ess=50.0, seed=0)
    with opt.sampled_params(train=True):
        model(X).sum().backward()
    opt.step()
    model.eval()
    posterior = opt.posterior(model)
    before = copy.deepcopy(model.state_dict())
    update_bn(model, posterior, BATCHES, samples=3)
    assert not model.training
    assert model[1].momentum == 0.1
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == ("running" in name or "tracked" in name), name
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(posterior.buffers[name], model.state_dict()[name])
    elsewhere = network()
    ours = predict(model, posterior, X, samples=2)
    assert torch.equal(predict(elsewhere, posterior, X, samples=2).probs, ours.probs)


def test_what_it_cannot_do_is_an_error():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="BatchNorm that tracks"):
        update_bn(model, posterior_of(model), BATCHES)
    model = network()
    with pytest.raises(ValueError, match="BatchNorm that tracks"):
        update_bn(model, posterior_of(model), BATCHES, samples=0)
    with pytest.raises(ValueError, match="no data"):
        update_bn(model, posterior_of(model), iter([]))
    before, once = statistics(model), iter(BATCHES)
    with pytest.raises(ValueError, match="for each sample"):
        update_bn(model, posterior_of(model), once, samples=2)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
