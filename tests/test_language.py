"""Language models: against `predict`, loops written by hand, and what the memory is said to be."""

import copy
import gc
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.data import DataLoader, TensorDataset

from posterity import Mixture, Posterior, predict
from posterity.language import candidates, generate, mbr, perplexity, token_f1
from posterity_studies.data import packages
from posterity_studies.models.gpt import GPT, GPTConfig

VOCABULARY = 11
TOKENS = torch.randint(VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=16, context=24, vocabulary=VOCABULARY))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # predictions far from uniform
    return model


def around(model, precision=25.0, shift=0.0):
    mean = {n: p.detach() + shift for n, p in model.named_parameters() if p.requires_grad}
    return Posterior(mean, {n: torch.full_like(m, precision) for n, m in mean.items()})


def each(model, posterior, tokens, samples, seed=0):
    """(samples, sequences, tokens − 1, vocabulary) log-probabilities, one plain loop in float64."""
    every = []
    for index in range(samples):
        with posterior.sampled(model, seed, index), torch.no_grad():
            every.append(log_softmax(model(tokens)[:, :-1].double(), -1))
    return torch.stack(every)


def of(log_probs, tokens):
    return log_probs.gather(-1, tokens[:, 1:, None].expand(*log_probs.shape[:-1], 1))[..., 0]


class Named(nn.Module):
    """The face of Hugging Face: keywords, an attention mask, an object with logits."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.dropout = nn.Dropout(0.5)  # off in eval mode

    def forward(self, input_ids, attention_mask):
        logits = self.gpt(input_ids) + 0 * attention_mask[..., None]
        return SimpleNamespace(logits=self.dropout(logits))


# --- perplexity ------------------------------------------------------------------------------


def test_perplexity_is_that_of_predict_on_the_same_samples(gpt):
    q = around(gpt)
    found = perplexity(gpt, q, TOKENS, samples=7, seed=3, batch_size=2)
    other = predict(gpt, q, TOKENS, samples=7, seed=3)
    for got, expected in (
        (found.per_token, other.log_probs[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]),
        (found.entropy, other.entropy[:, :-1]),
        (found.mutual_information, other.mutual_information[:, :-1]),
    ):
        assert got.shape == TOKENS.shape
        assert got[:, 0].isnan().all()  # there is nothing before the first token
        torch.testing.assert_close(got[:, 1:], expected, rtol=1e-5, atol=1e-5)
    assert found.mutual_information[:, 1:].max() > 0.05
    assert torch.equal(found.scored, torch.ones_like(TOKENS).cumsum(1) > 1)


class Placed(nn.Module):
    """With absolute places, which it counts from the first column unless it is told."""

    def __init__(self, gpt):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.places = nn.Embedding(24, 6)

    def forward(self, input_ids, attention_mask, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        seen = self.tokens(input_ids) + self.places(position_ids)
        summed = (seen * attention_mask[..., None]).cumsum(1)
        return SimpleNamespace(logits=self.head(summed))


class OwnPlaces(nn.Module):
    """One that numbers places itself, as RoBERTa does, and would be led astray."""

    create_position_ids_from_input_ids = None

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask, position_ids=None):
        assert position_ids is None
        return self.inner(input_ids, attention_mask, (attention_mask.cumsum(1) - 1).clamp(min=0))


def test_padding_on_the_left_changes_no_score(gpt):
    model = Placed(gpt)
    q = around(model)
    bare = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    plain = perplexity(model, None, bare).per_sequence
    alone = perplexity(model, q, {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)})
    for side in ("left", "right"):
        width = (3, 0) if side == "left" else (0, 3)
        padded = {
            "input_ids": nn.functional.pad(TOKENS, width),
            "attention_mask": nn.functional.pad(torch.ones_like(TOKENS), width),
        }
        found = perplexity(model, q, padded)
        torch.testing.assert_close(found.per_sequence, alone.per_sequence)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(perplexity(compiled, None, padded).per_sequence, plain)
    own = perplexity(OwnPlaces(model), None, padded).per_sequence
    torch.testing.assert_close(own, perplexity(model, None, padded).per_sequence)
    told = padded | {"position_ids": torch.zeros_like(padded["input_ids"])}
    assert not torch.allclose(perplexity(model, q, told).per_sequence, alone.per_sequence)


def test_perplexity_against_a_loop(gpt):
    q = around(gpt)
    found = perplexity(gpt, q, TOKENS, samples=6, seed=5)
    log_probs = each(gpt, q, TOKENS, 6, seed=5)
    mean = log_probs.exp().mean(0)
    nll = -of(mean.log(), TOKENS).mean().item()
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert nll < -of(log_probs, TOKENS).mean().item() - 0.01  # averaging is seen
    whole = of(log_probs, TOKENS).sum(-1).exp().mean(0).log()
    torch.testing.assert_close(found.per_sequence.double(), whole, rtol=1e-5, atol=1e-5)
    information = Categorical(mean).entropy() - Categorical(log_probs.exp()).entropy().mean(0)
    got = found.mutual_information[:, 1:].double()
    torch.testing.assert_close(got, information, rtol=0, atol=1e-5)


def test_one_sample_is_the_plain_cross_entropy(gpt):
    q = around(gpt)
    with torch.no_grad():
        assert perplexity(gpt, None, TOKENS).nll == pytest.approx(gpt.loss(TOKENS).item(), rel=1e-6)
        with q.sampled(gpt, 2, 0):
            loss = gpt.loss(TOKENS).item()
    found = perplexity(gpt, q, TOKENS, samples=1, seed=2)
    assert found.nll == pytest.approx(loss, rel=1e-6)
    assert (found.mutual_information[found.scored] == 0).all()
    torch.testing.assert_close(found.per_sequence, found.per_token.nansum(1))


def test_a_mixture_divides_the_samples(gpt):
    parts = [around(gpt), around(gpt, shift=0.1)]
    found = perplexity(gpt, Mixture(parts), TOKENS, samples=4)
    probs = [
        of(each(gpt, parts[i % 2], TOKENS, 4)[i], TOKENS).exp() for i in range(4)
    ]  # sample i is its component's own sample i
    expected = torch.stack(probs).mean(0).log()
    torch.testing.assert_close(found.per_token[:, 1:].double(), expected, rtol=1e-5, atol=1e-5)


def test_every_form_of_data_is_the_same(gpt):
    q = around(gpt)
    model = Named(gpt)
    named = around(model)
    expected = perplexity(gpt, q, TOKENS, samples=3, batch_size=2).nll
    labels = TOKENS.clone()
    mask = torch.ones_like(TOKENS)
    plain = [TensorDataset(TOKENS), list(TOKENS.split(2)), (TOKENS, labels)]
    plain += [DataLoader(TensorDataset(TOKENS, labels), 2), iter(TOKENS.split(2))]
    for data in plain:
        assert perplexity(gpt, q, data, samples=3, batch_size=2).nll == pytest.approx(expected)
    expected = perplexity(model, named, {"input_ids": TOKENS, "attention_mask": mask}, 3).nll
    batch = {"input_ids": TOKENS, "attention_mask": mask, "labels": labels}
    for data in (batch, [batch], ({"input_ids": TOKENS, "attention_mask": mask}, labels)):
        assert perplexity(model, named, data, samples=3).nll == pytest.approx(expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_counts_for_nothing(gpt, side):
    """On the left, the model here takes padding for text; only what is scored is looked at."""
    model = Named(gpt)
    mask = torch.ones_like(TOKENS)
    hidden = slice(6, None) if side == "right" else slice(None, 3)
    mask[0, hidden] = 0
    padded = TOKENS.clone()
    padded[0, hidden] = 0
    found = perplexity(model, around(model), {"input_ids": padded, "attention_mask": mask}, 3)
    first = slice(1, 6) if side == "right" else slice(4, None)
    assert found.scored[0].nonzero().flatten().tolist() == list(range(9))[first]
    assert found.per_token[0, ~found.scored[0]].isnan().all()
    assert int(found.scored.sum()) == 4 * 8 + 5
    if side == "right":
        alone = perplexity(gpt, _inner(around(model)), TOKENS[:1, :6], 3)
        torch.testing.assert_close(found.per_token[0, 1:6], alone.per_token[0, 1:])
        torch.testing.assert_close(found.per_sequence[:1], alone.per_sequence)


def _inner(posterior):
    """The same values under the names that the model has inside `Named`; the noise differs."""

    class Inner:
        def sampled(self, model, seed, index):
            return posterior.sampled(Named(model), seed, index)

    return Inner()


def test_ignored_labels_count_for_nothing(gpt):
    labels = TOKENS.clone()
    labels[:, :5] = -100
    labels[1] = -100
    found = perplexity(gpt, around(gpt), (TOKENS, labels), samples=2)
    whole = perplexity(gpt, around(gpt), TOKENS, samples=2)
    kept = [0, 2, 3, 4]
    assert found.nll == pytest.approx(-whole.per_token[kept, 5:].mean().item(), rel=1e-5)
    assert found.per_sequence[1] == 0
    without_zero = perplexity(gpt, around(gpt), TOKENS, samples=2, ignore_index=0)
    assert torch.equal(without_zero.scored, whole.scored & (TOKENS != 0))


def test_batches_may_differ_in_length(gpt):
    data = [TOKENS[:2, :4], TOKENS[2:]]
    found = perplexity(gpt, around(gpt), data, samples=2)
    assert found.per_token.shape == (5, 9)
    assert found.scored.sum(1).tolist() == [3, 3, 8, 8, 8]
    whole = perplexity(gpt, around(gpt), TOKENS, samples=2)
    torch.testing.assert_close(found.per_token[:2, 1:4], whole.per_token[:2, 1:4])
    assert found.nll == pytest.approx(-whole.per_token[found.scored].mean().item(), rel=1e-5)


def test_a_model_that_gives_nan_is_seen(gpt):
    with torch.no_grad():
        gpt.norm.bias.fill_(math.nan)
    assert math.isnan(perplexity(gpt, None, TOKENS).nll)


def test_memory_is_that_of_one_batch():
    """Bytes of all live tensors at every forward pass, with a vocabulary of 20,000."""
    vocabulary, width = 20_000, 4
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))
    q = around(model)
    tokens = torch.randint(vocabulary, (48, 8))
    sizes = []

    def live(*_):
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        sizes.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

    gc.collect()
    gc.freeze()
    model.register_forward_pre_hook(live)
    try:
        perplexity(model, q, tokens, samples=4, batch_size=2)
    finally:
        gc.unfreeze()
    batch = 2 * 8 * vocabulary * 4
    assert len(sizes) == 24 * 4
    assert max(sizes[:4]) - sizes[0] > 0.8 * batch  # it sees the running mean
    assert max(sizes) - sizes[0] < 1.5 * batch  # and no more of it, of 24 batches


def test_wrong_input_is_named(gpt):
    q = around(gpt)
    with pytest.raises(ValueError, match="no tokens to score"):
        perplexity(gpt, q, TOKENS[:, :1])
    with pytest.raises(ValueError, match="no tokens to score"):
        perplexity(gpt, q, [])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\]"):
        perplexity(gpt, q, (TOKENS, TOKENS + 5))
    with pytest.raises(ValueError, match="shaped as the tokens"):
        perplexity(gpt, q, (TOKENS, TOKENS[:, 1:]))
    with pytest.raises(ValueError, match="mapping with input_ids"):
        perplexity(gpt, q, {"tokens": TOKENS})
    with pytest.raises(ValueError, match="at least one sample"):
        perplexity(gpt, q, TOKENS, samples=0)
    with pytest.raises(ValueError, match=r"not \(batch, tokens, vocabulary\)"):
        perplexity(Last(), None, TOKENS)


class Cacheless(nn.Module):
    """Says that it keeps a cache, and does not."""

    def forward(self, input_ids, use_cache):
        return torch.zeros(*input_ids.shape, VOCABULARY)


class Last(nn.Module):
    """Scores the last token alone."""

    def forward(self, tokens):
        return torch.zeros(len(tokens), VOCABULARY)


class Failing(nn.Module):
    def __init__(self, gpt, calls):
        super().__init__()
        self.gpt, self.left = gpt, calls

    def forward(self, tokens):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck")
        return self.gpt(tokens)


@pytest.mark.parametrize("keep", [None, True, False])
def test_an_exception_leaves_the_model_as_it_was(gpt, keep):
    model = Failing(gpt, 5).train()
    model.gpt.norm.eval()
    q = around(model, shift=1.0)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    use = partial(perplexity, data=TOKENS, batch_size=3)
    if keep is not None:
        use = partial(generate, prompt=TOKENS, max_new_tokens=4, keep=keep)
    with pytest.raises(RuntimeError, match="out of luck"):
        use(model, q, samples=4)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# --- generation ------------------------------------------------------------------------------


def test_greedy_generation_of_a_model_is_the_loop_over_argmax(gpt):
    found = generate(gpt, None, TOKENS, 6)
    tokens = TOKENS
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, gpt(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.tokens, tokens[:, 9:])
    assert (found.mutual_information == 0).all()
    losses = cross_entropy(gpt(tokens)[:, 8:-1].transpose(1, 2), tokens[:, 9:], reduction="none")
    torch.testing.assert_close(found.log_probs, -losses.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_generation_takes_each_token_from_the_averaged_distribution(gpt, keep):
    q = around(gpt)
    found = generate(gpt, q, TOKENS, 5, samples=6, seed=4, keep=keep)
    tokens = TOKENS
    for step in range(5):
        other = predict(gpt, q, tokens, samples=6, seed=4)
        here = other.log_probs[:, -1]
        token = here.argmax(-1)
        assert torch.equal(found.tokens[:, step], token)
        for got, expected in (
            (found.log_probs, here.amax(-1)),
            (found.entropy, other.entropy[:, -1]),
            (found.mutual_information, other.mutual_information[:, -1]),
        ):
            torch.testing.assert_close(got[:, step], expected, rtol=1e-4, atol=1e-5)
        tokens = torch.cat([tokens, token[:, None]], 1)
    assert found.mutual_information.min() > 0
    scored = perplexity(gpt, q, tokens, samples=6, seed=4)
    torch.testing.assert_close(scored.per_token[:, 9:], found.log_probs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found.tokens, generate(gpt, None, TOKENS, 5).tokens)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_are_drawn_from_the_tempered_average(gpt, temperature):
    q, n = around(gpt), 4000
    prompt = TOKENS[:1].expand(n, -1)
    found = generate(gpt, q, prompt, 1, samples=3, temperature=temperature, seed=1)
    probs = predict(gpt, q, TOKENS[:1], samples=3, seed=1).probs[0, -1].double()
    target = probs ** (1 / temperature)
    target /= target.sum()
    share = torch.bincount(found.tokens[:, 0], minlength=VOCABULARY).double() / n
    assert ((share - target).abs() < 5 * (target * (1 - target) / n).sqrt() + 1e-9).all()
    torch.testing.assert_close(found.log_probs[:, 0], probs.log().float()[found.tokens[:, 0]])


def test_a_seed_repeats_and_a_generator_goes_on(gpt):
    q = around(gpt)
    how = {"samples": 2, "temperature": 1.0}
    first, again = (generate(gpt, q, TOKENS, 8, seed=3, **how).tokens for _ in range(2))
    assert torch.equal(first, again)
    one = torch.Generator().manual_seed(0)
    first, second = (generate(gpt, q, TOKENS, 8, generator=one, **how).tokens for _ in range(2))
    assert not torch.equal(first, second)


def test_a_row_ends_at_its_stop(gpt):
    free = generate(gpt, None, TOKENS, 8, temperature=1.0, seed=5)
    stop = int(free.tokens[0, 2])
    found = generate(gpt, None, TOKENS, 8, temperature=1.0, seed=5, stop=stop)
    end = free.tokens[0].tolist().index(stop) + 1
    assert torch.equal(found.tokens[0, :end], free.tokens[0, :end])
    for row, values in zip(found.tokens, found.log_probs, strict=True):
        end = row.tolist().index(stop) + 1 if stop in row else len(row)
        assert (row[end:] == stop).all()
        assert values[:end].isfinite().all()
        assert values[end:].isnan().all()
    assert found.log_probs[0, -1].isnan()
    alone = generate(gpt, None, TOKENS[:1], 8, stop=int(generate(gpt, None, TOKENS[:1], 1).tokens))
    assert alone.tokens.shape == (1, 1)  # nothing is left to write


def test_wrong_prompts_are_named(gpt):
    q = around(gpt)
    with pytest.raises(ValueError, match="prompt needs"):
        generate(gpt, q, TOKENS[0], 3)
    with pytest.raises(ValueError, match="prompt needs"):
        generate(gpt, q, TOKENS[:, :0], 3)
    with pytest.raises(ValueError, match="max_new_tokens of 1"):
        generate(gpt, q, TOKENS, 0)
    with pytest.raises(ValueError, match="by name"):
        generate(gpt, q, {"input_ids": TOKENS, "labels": TOKENS}, 3)
    mask = torch.ones_like(TOKENS)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad them on the left"):
        generate(gpt, q, {"input_ids": TOKENS, "attention_mask": mask}, 3)
    with pytest.raises(ValueError, match="pass cache=False"):
        generate(Cacheless(), None, TOKENS, 3, cache=True)
    model = Named(gpt)
    named = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(
        generate(model, None, named, 3).tokens, generate(gpt, None, TOKENS, 3).tokens
    )


# --- decoding --------------------------------------------------------------------------------


def test_candidates_are_written_by_one_sample_each(gpt):
    q = around(gpt)
    found = candidates(gpt, q, TOKENS[:1], 6, 2, samples=3, temperature=0.0, seed=8)
    for index in range(3):
        with q.sampled(gpt, 8, index):
            alone = generate(gpt, None, TOKENS[:1], 6).tokens[0].tolist()
        assert found[2 * index : 2 * index + 2] == [alone, alone]
    assert len({tuple(c) for c in found}) > 1
    drawn = candidates(gpt, q, TOKENS[:1], 6, 2, samples=3, seed=8)
    assert drawn == candidates(gpt, q, TOKENS[:1], 6, 2, samples=3, seed=8)
    assert any(drawn[i] != drawn[i + 1] for i in (0, 2, 4))  # of one sample, but drawn twice
    stop = drawn[0][3]
    ended = candidates(gpt, q, TOKENS[:1], 6, 2, samples=3, seed=8, stop=stop)
    assert ended[0] == drawn[0][: drawn[0].index(stop)]
    assert len(candidates(gpt, None, TOKENS[:1], 2, 5, samples=3)) == 5
    with pytest.raises(ValueError, match="one prompt"):
        candidates(gpt, q, TOKENS, 3)


def test_mbr_picks_the_consensus():
    texts = ["no idea", "the cat sat down", "the cat sat", "a cat sat there"]
    found = mbr(texts)
    assert (found.best, found.index) == ("the cat sat", 2)
    table = torch.tensor([[token_f1(a, b) for b in texts] for a in texts], dtype=torch.float64)
    torch.testing.assert_close(found.utility, table.mean(1))
    others = (table.sum(1) - 1) / 3  # without one's own
    assert int(others.argmax()) == found.index
    assert mbr(texts, weights=[9, 1, 1, 1]).index == 0
    assert mbr([[1, 2], [1, 2, 3], [4]]).index == 0


def test_utility_is_of_candidate_and_reference():
    """A candidate that holds all of the others, under a utility that asks only for that."""

    def recall(candidate, reference):
        return len(set(candidate) & set(reference)) / len(reference)

    assert mbr([[1], [2], [1, 2, 3, 4], [3]], recall).index == 2
    assert mbr([[1], [2], [1, 2, 3, 4], [3]], lambda a, b: recall(b, a)).index != 2


@pytest.mark.parametrize(
    ("weights", "texts"), [(None, []), ([1.0], ["a", "b"]), ([1, -1], ["a", "b"]), ([0, 0], "ab")]
)
def test_wrong_weights_are_errors(weights, texts):
    with pytest.raises(ValueError, match=r"no candidates|weights"):
        mbr(texts, weights=weights)


def test_token_f1():
    assert token_f1("a b c", "a b c") == 1
    assert token_f1("a a b", "a b b") == pytest.approx(2 / 3)  # as often as in both
    assert token_f1([1, 2], [3]) == 0
    assert token_f1("", "") == 1


# --- Hugging Face ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_changes_nothing_nor_does_padding(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = transformers.LlamaConfig(vocab_size=40, **size, **heads)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    tokens = torch.randint(1, 40, (3, 7))
    q = around(model)
    cached, uncached, turns = (
        generate(model, q, tokens, 9, samples=3, **how)
        for how in ({}, {"cache": False}, {"cache": True, "keep": False})
    )
    for other in (uncached, turns):
        assert torch.equal(cached.tokens, other.tokens)
        torch.testing.assert_close(cached.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            cached.mutual_information, other.mutual_information, rtol=1e-3, atol=1e-4
        )
    assert cached.mutual_information.max() > 0.01
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], 1)
    padded[0, :3] = torch.tensor([5, 6, 7])  # a longer first prompt
    mask = (padded != 0).long()
    padded[0, 3], mask[0, :4] = 8, 1
    for cache in (True, False):
        prompt = {"input_ids": padded, "attention_mask": mask}
        found = generate(model, q, prompt, 9, samples=3, cache=cache)
        assert torch.equal(found.tokens[1:], cached.tokens[1:])
        torch.testing.assert_close(found.log_probs[1:], cached.log_probs[1:], rtol=1e-4, atol=1e-4)
    greedy = model.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=9, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(generate(model, None, tokens, 9).tokens, greedy[:, 7:])


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_writes_with_and_without_a_cache():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder, name = packages.folder("smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    how = {"gguf_file": name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(model, lora)
    q = around(model, precision=1 / 0.02**2)  # of the adapter alone
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    cached, uncached = (generate(model, q, tokens, 4, samples=2, cache=c) for c in (None, False))
    assert "Paris" in tokenizer.decode(cached.tokens[0])
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.log_probs, uncached.log_probs, rtol=1e-3, atol=1e-3)
    information = cached.mutual_information
    torch.testing.assert_close(information, uncached.mutual_information, rtol=1e-2, atol=1e-4)
    assert information.min() > 0
    text = torch.cat([tokens, cached.tokens], 1)
    scored = perplexity(model, q, {"input_ids": text}, samples=2)
    torch.testing.assert_close(
        scored.per_token[:, tokens.shape[1] :], cached.log_probs, rtol=1e-3, atol=1e-3
    )
