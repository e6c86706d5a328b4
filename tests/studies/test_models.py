"""The networks have the published sizes, and a language model does not see what is to come."""

import math

import torch

from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.models.resnet import resnet20, resnet50_shapes


def test_published_sizes():
    with torch.device("meta"):
        gpt2 = list(GPT(GPTConfig()).parameters())
    assert (len(gpt2), sum(p.numel() for p in gpt2)) == (148, 124_439_808)  # OpenAI's gpt2
    shapes = resnet50_shapes()
    assert (len(shapes), sum(map(math.prod, shapes))) == (161, 25_557_032)  # torchvision's
    network = resnet20()
    assert sum(p.numel() for p in network.parameters()) == 269_722
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


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
