"""The networks have the published sizes, and a language model does not see what is to come."""

import math

import pytest
import torch
from torch import nn

from posterity_studies.models import NETWORKS, Regression
from posterity_studies.models.gpt import GPT, GPT2, GPTConfig
from posterity_studies.models.resnet import FilterResponse

SIZES = {  # of the weights, with so many classes
    "alexnet": (10, 1_070_410),  # counted by hand
    "densenet121": (10, 6_956_298),  # kuangliu/pytorch-cifar's
    "preresnet110": (10, 1_730_522),  # He et al.: 1.7M
    "resnet18": (10, 11_173_962),  # kuangliu/pytorch-cifar's
    "resnet20": (10, 269_722),
    "resnet20-frn": (10, 270_410),
    "resnet50": (1000, 25_557_032),  # torchvision's
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_published_sizes(name):
    classes, size = SIZES[name]
    with torch.device("meta"):
        model = NETWORKS[name](classes)
        assert count(model) == size
        pixels = 224 if "50" in name else 32
        assert model(torch.randn(2, 3, pixels, pixels)).shape == (2, classes)


def test_gpt2s_have_the_published_sizes():
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
    assert sizes.keys() == GPT2.keys()
    with torch.device("meta"):
        assert {name: count(GPT(shape)) for name, shape in GPT2.items()} == sizes
        assert len(list(GPT(GPT2["gpt2"]).parameters())) == 148
        assert len(list(NETWORKS["resnet50"](1000).parameters())) == 161


def test_filter_response_norm_is_its_formula_and_sees_one_example():
    torch.manual_seed(0)
    norm = FilterResponse(3)
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 3, 5, 6)
    y = norm(x)
    for n, c in ((0, 0), (3, 2)):
        size = x[n, c].square().mean() + 1e-6
        expected = (norm.gamma[c] * x[n, c] / size.sqrt() + norm.beta[c]).maximum(norm.tau[c])
        torch.testing.assert_close(y[n, c], expected)
    torch.testing.assert_close(norm(x[1:2]), y[1:2])
    torch.testing.assert_close(norm(7 * x), y, atol=1e-5, rtol=1e-4)


def test_a_block_without_weight_is_its_shortcut():
    model = NETWORKS["resnet20"](10)
    block = model[3 + 3]  # the first of the second stage: 16 to 32 channels, half the size
    for p in block.path.parameters():
        nn.init.zeros_(p)
    x = torch.rand(2, 16, 8, 8)
    y = block.eval()(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 16:], torch.zeros(2, 16, 4, 4))


def test_in_bfloat16_it_is_the_same_network_a_rounding_apart():
    torch.manual_seed(0)
    plain, half = NETWORKS["resnet20"](10), NETWORKS["resnet20-bf16"](10)
    half.load_state_dict(plain.state_dict())
    x = torch.randn(16, 3, 32, 32)
    ours, theirs = half(x), plain(x)
    assert ours.dtype == torch.float32
    spread = (ours - theirs).norm() / theirs.norm()
    assert 1e-4 < spread < 5e-2
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for p, q in zip(half.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9


def test_the_regression_network_has_a_mean_and_a_noise():
    mean, noise = Regression(7)(torch.randn(5, 7))
    assert mean.shape == noise.shape == (5,)


def test_gpt_predicts_from_the_past_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=16, context=12, vocabulary=50))
    tokens = torch.randint(50, (3, 12))
    other = tokens.clone()
    other[:, 7:] = torch.randint(50, (3, 5))
    same, changed = model(tokens), model(other)
    torch.testing.assert_close(same[:, :7], changed[:, :7])
    assert not torch.allclose(same[:, 7:], changed[:, 7:])
    uniform = model.loss(tokens).item()
    assert abs(uniform - math.log(50)) < 0.2  # before training every token is as likely


def test_gpt_learns_a_sequence():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1, heads=2, width=16, context=8, vocabulary=9))
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.arange(9)[None].repeat(4, 1)
    for _ in range(60):
        opt.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        opt.step()
    assert loss.item() < 0.1
