"""Language models from scratch: the loop, what it keeps, and the study over it."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from posterity.language import perplexity
from posterity_studies import data, judges, pretrain, runs
from posterity_studies.data import cache, text
from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.pretrain import Pretraining
from posterity_studies.recipes import UserError
from posterity_studies.settings import FinetuneIvon, LanguageAdamw, LanguageIvon, PairedIvon
from posterity_studies.studies import pretraining
from posterity_studies.train import silent, warmup_cosine

TOKENS = torch.frombuffer(
    bytearray(b"the cat sat on a mat and a dog sat on the cat. " * 60), dtype=torch.uint8
)
SMALL = Pretraining(
    GPTConfig(1, 2, 16, 12, 256), steps=12, batch=4, micro=2, warmup=2, every=4, held=5
)
BOTH = {
    "adamw": LanguageAdamw(lr=1e-2),
    "ivon": LanguageIvon(lr=20.0, ess=1e5, hess_init=0.1, memory=100),
}


def run(settings, folder, what=SMALL, seed=0):
    return pretrain.pretrain(what, settings, seed, folder, TOKENS, TOKENS[:500])


@pytest.mark.parametrize(
    ("settings", "betas"),
    [
        (LanguageAdamw(lr=1.0, beta2=0.9, beta1=0.8), (0.8, 0.9)),
        (LanguageIvon(memory=10, beta1=0.8), (0.8, 0.9)),
        (FinetuneIvon(), (0.9, 0.98)),  # a memory of a tenth of the steps
    ],
    ids=["AdamW", "IVON", "finetuning"],
)
def test_settings_reach_the_optimizer(settings, betas):
    opt = settings.build(GPT(SMALL.shape), 100, 500, 0)
    for group in opt.param_groups:
        assert group["betas"] == pytest.approx(betas)


@pytest.mark.parametrize("name", BOTH)
def test_a_run_learns_and_can_be_read(name, tmp_path):
    found = run(BOTH[name], tmp_path / "run", replace(SMALL, steps=60, every=20))
    assert found["curve"]["step"] == [20, 40, 60]
    for part in ("train", "held"):
        assert found["curve"][part][-1] < min(found["curve"][part][0], 4.0)  # of ln 256 = 5.5
    model, posterior = pretrain.load(tmp_path / "run")
    assert (posterior is None) == (name == "adamw")
    rows = pretrain.held_rows(TOKENS[:500], SMALL)
    assert rows.shape == (5, 12)
    assert pretrain.scored(model, rows, None)["mean"] == pytest.approx(found["curve"]["held"][-1])
    assert run(BOTH[name], tmp_path / "run", replace(SMALL, steps=60, every=20)) == found


def test_halves_of_a_pair_see_the_same_sequences(monkeypatch):
    """Of each micro-batch: m + σε, m − σε; and at the next step one sample of each."""
    torch.manual_seed(0)
    model = GPT(SMALL.shape)
    opt = PairedIvon(every=2).build(model, len(TOKENS), 10, 0)
    mean, seen = [p.detach().clone() for p in model.parameters()], []

    def look(module, inputs):
        moved = [p.detach() - m for p, m in zip(module.parameters(), mean, strict=True)]
        seen.append((inputs[0].clone(), moved[0].clone()))

    model.register_forward_pre_hook(look)
    what = replace(SMALL, batch=4, micro=2)
    for step in (1, 2):
        pretrain._step(what, model, opt, pretrain.windows(TOKENS, 4, SMALL.shape.context, 0, step))
        if step == 1:
            rows, moved = zip(*seen, strict=True)
            assert torch.equal(rows[0], rows[1])
            assert torch.equal(rows[2], rows[3])
            assert not torch.equal(rows[1], rows[2])
            for plus, minus in ((0, 1), (2, 3)):
                torch.testing.assert_close(moved[plus], -moved[minus], rtol=1e-3, atol=1e-7)
    assert len(seen) == 4 + 2


def test_a_compiled_network_learns_the_same(tmp_path, monkeypatch):
    compiled = []

    def traced(model):
        compiled.append(model)
        return whole(model, backend="eager", fullgraph=True)

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    curves = [
        run(BOTH["ivon"], tmp_path / str(how), replace(SMALL, compiled=how))["curve"]
        for how in (False, True)
    ]
    assert curves[0] == curves[1]
    assert len(compiled) == 1


def test_checkpoints_take_a_tenth_of_the_time(tmp_path, monkeypatch):
    """A disk for which the run is over before it is due again; the results do not depend on it."""
    write, written = runs.write_checkpoint, []

    def slow(path, content):
        written.append(content["step"])
        time.sleep(0.5)
        write(path, content)

    monkeypatch.setattr(runs, "write_checkpoint", slow)
    run(BOTH["adamw"], tmp_path / "run", replace(SMALL, every=1))
    assert written == [1]


@pytest.mark.parametrize("name", BOTH)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    run(BOTH[name], tmp_path / "whole")

    def killed(steps, total, label):
        for step in steps:
            if step == 7:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(SMALL, BOTH[name], 0, tmp_path / "killed", TOKENS, TOKENS[:500], killed)
    assert (tmp_path / "killed/checkpoint.pt").exists()
    again = run(BOTH[name], tmp_path / "killed")
    assert again["curve"] == runs.read_json(tmp_path / "whole/result.json")["curve"]
    assert not (tmp_path / "killed/checkpoint.pt").exists()
    files = ["model.safetensors", *(["posterior.safetensors"] if name == "ivon" else [])]
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """AdamW's steps are those of a plain loop over whole batches."""
    what = replace(SMALL, clip=1e9)
    run(BOTH["adamw"], tmp_path, what)
    torch.manual_seed(0)
    model = GPT(what.shape)
    opt = BOTH["adamw"].build(model, len(TOKENS), what.steps, 0)
    decay = {g["weight_decay"]: {p.dim() for p in g["params"]} for g in opt.param_groups}
    assert decay == {0.1: {2}, 0.0: {1}}
    rate = torch.optim.lr_scheduler.LambdaLR(opt, warmup_cosine(what.warmup, what.steps))
    for step in range(1, what.steps + 1):
        rows = pretrain.windows(TOKENS, what.batch, what.shape.context, 0, step)
        opt.zero_grad()
        cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        opt.step()
        rate.step()
    found = runs.read_tensors(tmp_path / "model.safetensors")
    for name, p in model.state_dict().items():
        torch.testing.assert_close(found[name], p, atol=2e-4, rtol=1e-3)


def test_windows_are_from_anywhere_and_repeat():
    rows = pretrain.windows(TOKENS, 500, 12, seed=3, step=1)
    assert torch.equal(rows, pretrain.windows(TOKENS, 500, 12, seed=3, step=1))
    assert not torch.equal(rows, pretrain.windows(TOKENS, 500, 12, seed=3, step=2))
    numbered = pretrain.windows(torch.arange(40), 2000, 12, 0, 0)
    assert torch.equal(numbered - numbered[:, :1], torch.arange(13).expand(2000, 13))
    assert (numbered[:, 0].min(), numbered[:, 0].max()) == (0, 27)  # the last one ends the text


def test_scores_are_those_of_perplexity(tmp_path):
    run(BOTH["ivon"], tmp_path)
    model, posterior = pretrain.load(tmp_path)
    wide = posterior.temper(1e3)
    rows = pretrain.held_rows(TOKENS[:500], SMALL)
    found = pretrain.scored(model, rows, wide, (1, 4))
    assert found["4"] == pytest.approx(perplexity(model, wide, rows, samples=4).nll, rel=1e-6)
    assert found["1"] > found["4"]
    assert found["1 spread"] > 0 == found["4 spread"]
    assert found["mean"] == pytest.approx(model.loss(rows).item(), rel=1e-5)


def test_wrong_runs_say_so(tmp_path):
    run(BOTH["adamw"], tmp_path)
    with pytest.raises(UserError, match="other settings"):
        run(BOTH["ivon"], tmp_path)
    with pytest.raises(UserError, match="longer than a window"):
        pretrain.pretrain(SMALL, BOTH["adamw"], 0, tmp_path / "x", TOKENS[:9], TOKENS)
    with pytest.raises(UserError, match="diverged at step 4"):
        run(LanguageAdamw(lr=float("inf")), tmp_path / "y")
    with pytest.raises(UserError, match="at least 1"):
        replace(SMALL, micro=0)
    odd = replace(SMALL, batch=6, micro=5)
    with pytest.raises(UserError, match="equal parts of 5"):
        pretrain.pretrain(odd, BOTH["adamw"], 0, tmp_path / "z", TOKENS, TOKENS)


def test_held_out_sequences_are_of_the_whole_text():
    what = replace(SMALL, held=96)
    context = what.shape.context
    text = torch.arange(191 * context)  # one less than twice as many
    rows = pretrain.held_rows(text, what)
    assert len(rows) == 96
    assert (rows[0, 0], rows[-1, -1]) == (0, text[-1])
    gaps = rows[1:, 0] - rows[:-1, 0]
    assert gaps.max() <= 2 * context
    assert len(pretrain.held_rows(text[: 5 * context], what)) == 5


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """The study's texts, but short."""
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path / "cache"))
    origins = {}
    for name in (*pretraining.TEXTS, *pretraining.NEWS):
        arrays = {f"{split}.targets": np.zeros(0, np.uint8) for split in ("train", "test")}
        body = 255 - TOKENS.numpy() if name in pretraining.NEWS else TOKENS.numpy()
        arrays |= {f"{split}.inputs": body for split in ("train", "test")}
        cache.prepare(name)
        cache.write(name, arrays, "made for a test")
        digest = cache.digest(arrays)
        origins[name] = data.Origin(name=name, licence="none", digest=digest, sources=())
    monkeypatch.setattr(text, "TEXTS", origins)


def test_the_study_tries_both_alike_and_keeps_the_best(corpus, tmp_path, monkeypatch):
    diverging = LanguageAdamw(lr=float("inf"))
    trials = {"adamw": [diverging, BOTH["adamw"]], "ivon": [BOTH["ivon"], LanguageIvon(lr=1e-9)]}
    monkeypatch.setattr(text, "BLOCK", 500)
    monkeypatch.setattr(pretraining, "TEMPERATURES", (1.0, 3.0))
    smoke = pretraining.SCALES["smoke"]
    smoke = replace(smoke, what=replace(smoke.what, steps=40, every=20), trials=trials)
    monkeypatch.setitem(pretraining.SCALES, "smoke", smoke)
    found = pretraining.study(tmp_path / "out", [0, 1], "smoke", silent)
    assert json.loads(json.dumps(found, allow_nan=True))["rows"] == found["rows"]
    assert [len(tried) for tried in found["trials"].values()] == [2, 2]
    assert found["settings"]["adamw"]["lr"] == 1e-2
    assert found["settings"]["ivon"]["lr"] == 20.0
    names = ["AdamW", "IVON", "IVON, 1 sample", "IVON, 8 samples", "IVON, 32 samples"]
    assert [row["method"] for row in found["rows"]] == names
    tokens = [[r["tokens"] for r in every] for every in found["runs"].values()]
    assert tokens == [[2 * 1500] * 2] * 2  # every other block of 500 bytes of both texts
    assert len([*(tmp_path / "out").glob("*-seed*")]) == 4 + 2  # trials; the best with seed 1
    assert "IVON" in judges.pretrained(found)[1]
    assert (tmp_path / "out/pretraining.png").read_bytes().startswith(b"\x89PNG")
    assert pretraining.study(tmp_path / "out", [0, 1], "smoke", silent) == found
    assert_judged_on_news(found, tmp_path / "out")


def assert_judged_on_news(found, out):
    tried = found["news"]["temperatures"]["ivon"]
    assert [*found["news"]["temperatures"]] == ["ivon"]  # AdamW has no posterior
    assert [row["temperature"] for row in tried] == [1.0, 3.0]
    of_trial = next(t for t in found["trials"]["ivon"] if t["settings"]["lr"] == 20.0)
    assert tried[0]["held"] == {k: v for k, v in of_trial.items() if k != "settings"}
    assert tried[0]["held"]["mean"] == tried[1]["held"]["mean"] != tried[1]["news"]["mean"]
    assert found["news"]["best"] == {"ivon": 3.0}  # it knows nothing of the news
    for folder, every, name in (
        ("adamw-1", found["news"]["runs"]["adamw"], "scores-news-1.json"),
        ("ivon-0", found["news"]["runs"]["ivon"], "scores-news-1-t3.json"),
    ):
        for seed, run in enumerate(every):
            kept = runs.read_json(out / f"{folder}-seed{seed}" / name)["found"]
            assert kept.items() < run.items()
            assert run["divisor"] in pretraining.DIVISORS
    news = {row["method"]: row["on news"] for row in found["rows"]}
    each = [run["8"] for run in found["news"]["runs"]["ivon"]]
    assert news["IVON, 8 samples"] == pytest.approx(sum(each) / 2)


def test_one_half_of_the_news_chooses_and_the_other_is_told(tmp_path, monkeypatch):
    losses = {  # where it is least, by text and half
        (pretraining.TEXTS, 0): 10.0,
        (pretraining.NEWS, 0): 30.0,
        (pretraining.NEWS, 1): 100.0,
    }

    def rescored(folder, what, source, part, test, counts, temperature=1.0):
        loss = abs(math.log(temperature / losses[source, part]))
        return {"8": loss, "folder": folder.name, "temperature": temperature, "part": part}

    monkeypatch.setattr(pretraining, "rescored", rescored)
    monkeypatch.setattr(pretraining, "softened", lambda folder, what, test: {"softened": 1.0})
    folders = [tmp_path / f"{o}-seed{seed}" for o in ("adamw-2", "pairs-1") for seed in (3, 4)]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "pairs-1-seed3/posterior.safetensors").touch()
    chosen = {o: pretraining.Chosen(k, BOTH["adamw"], []) for o, k in (("adamw", 2), ("pairs", 1))}
    found = pretraining.on_news(tmp_path, pretraining.SCALES["smoke"], chosen, [3, 4], silent)
    assert found["best"] == {"pairs": 30.0}
    told = [run for every in found["runs"].values() for run in every]
    assert [run["folder"] for run in told] == [folder.name for folder in folders]
    assert [run["temperature"] for run in told] == [1.0, 1.0, 30.0, 30.0]
    assert {run["part"] for run in told} == {1}


def test_samples_of_no_temperature_are_the_mean(corpus, tmp_path):
    pretraining.trained(tmp_path, SMALL, BOTH["ivon"], 0, None, 0, 4, (4,))
    args = tmp_path, SMALL, pretraining.NEWS, 0, 4, (4,)
    cold, hot = (pretraining.rescored(*args, temperature) for temperature in (1e-12, 1e3))
    assert cold["4"] == pytest.approx(cold["mean"], abs=1e-5)
    assert hot["4"] > hot["mean"] + 0.01
    assert hot["mean"] == cold["mean"]


def test_logits_are_divided_by_what_one_half_likes_best(corpus, tmp_path, monkeypatch):
    pretraining.trained(tmp_path, SMALL, BOTH["adamw"], 0, None, 0, 4, ())
    noise = torch.randint(256, (500,), generator=torch.Generator().manual_seed(0))
    first, second = TOKENS[:500], noise  # learnt, and not to be learnt
    monkeypatch.setattr(pretraining, "halves", lambda source: [first, second])
    monkeypatch.setattr(pretraining, "DIVISORS", (0.5, 2.0))
    model, _ = pretrain.load(tmp_path)

    def loss(half, divisor):
        rows = pretrain.held_rows(half, replace(SMALL, held=4))
        with torch.no_grad():
            logits = model(rows[:, :-1]).double() / divisor
        return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()

    assert loss(first, 0.5) < loss(first, 2.0)
    assert loss(second, 0.5) > loss(second, 2.0)
    found = pretraining.softened(tmp_path, SMALL, 4)
    assert found == {"divisor": 0.5, "softened": pytest.approx(loss(second, 0.5), abs=1e-5)}


def test_as_many_trials_of_each():
    for scale in pretraining.SCALES.values():
        assert len({len(tried) for tried in scale.trials.values()}) == 1
