"""The finetuning study in small, and what it scores with."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from posterity import Posterior, merge, metrics
from posterity_studies import claims, finetune
from posterity_studies.recipes import UserError
from posterity_studies.settings import FinetuneAdamw, FinetuneIvon
from posterity_studies.studies import finetuning
from posterity_studies.subjects import WORDS, SmolLM2, Subject
from posterity_studies.train import silent


class Bag(nn.Module):
    """A class from the mean of word vectors."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        vectors = self.words(input_ids) * attention_mask[..., None]
        return self.head(vectors.sum(1) / attention_mask.sum(1, keepdim=True))


def rows(n=120):
    """The class is whether the first word is above 9."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        length = int(torch.randint(1, 6, (), generator=generator))
        word = int(torch.randint(1, 20, (), generator=generator))
        made.append(([word] * length, int(word > 9)))
    return made


@dataclass(frozen=True, kw_only=True)
class Words(Subject):
    """The bag, on words above 9."""

    domains: tuple[str, ...] = ("above",)
    batch: int = 8
    epochs: int = 8
    name = "bag"

    def make(self, seed, domain=""):
        torch.manual_seed(seed)
        return Bag()

    def sentences(self, domain, seed):
        return rows()[:80], rows()[80:100], rows()[100:]

    def logits(self, model, inputs):
        return model(**inputs)


BOTH = {
    "adamw": FinetuneAdamw(3e-2),
    "ivon": FinetuneIvon(1.0, 1e4, hess_init=0.1, clip_radius=1.0),
}


@pytest.mark.parametrize("name", BOTH)
def test_finetuning_learns(name):
    model = Words().make(0)
    opt = BOTH[name].build(model, 120, 30, 0)
    before = finetune.scored(model, None, rows(), Words(), 1)
    finetune.finetune(model, opt, rows(), Words(), seed=0)
    after = finetune.scored(model, None, rows(), Words(), 1)
    assert after["accuracy"] > 0.9 > before["accuracy"]


def test_h_tells_how_much_a_loss_varies(monkeypatch):
    """A loss seven times as large has 49 times the squared gradients, if nothing clips them."""
    found = []
    for scale in (5.0, 35.0):
        monkeypatch.setattr(
            finetune, "cross_entropy", lambda *a, s=scale, **b: s * cross_entropy(*a, **b)
        )
        model = Words().make(0)
        opt = FinetuneIvon(1e-9, 1e4, hess_init=1e-3).build(model, 120, 30, 0)
        finetune.finetune(model, opt, rows(), Words(), seed=0)
        h = torch.cat([s["hess"].flatten() for s in opt.state.values()])
        found.append(h.mean().item())
    assert 20 < found[1] / found[0] < 100


@pytest.mark.parametrize("name", BOTH)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    def run(folder, progress=silent):
        settings = BOTH[name]
        return finetune.run(Words(), "above", settings, 0, folder, samples=3, progress=progress)

    def killed(items, total, label):
        if label == "epoch 5":
            raise KeyboardInterrupt
        return items

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed)
    again = run(tmp_path / "killed")
    scores = ("validation", "test")
    assert {k: again[k] for k in scores} == {k: whole[k] for k in scores}
    kept = {"adamw": {"model"}, "ivon": {"posterior", "base"}}[name]
    found = {p.name for p in (tmp_path / "killed").iterdir()}
    assert found == {"config.json", "result.json", *(f"{k}.safetensors" for k in kept)}
    for file in kept:
        one, two = (tmp_path / way / f"{file}.safetensors" for way in ("whole", "killed"))
        assert one.read_bytes() == two.read_bytes()
    assert run(tmp_path / "killed") == again
    with pytest.raises(UserError, match="other settings"):
        finetune.run(Words(epochs=2), "above", BOTH[name], 0, tmp_path / "killed")


def test_what_a_run_keeps_can_be_merged(tmp_path):
    """Its base is what it started from, as wide as IVON was then."""
    settings = BOTH["ivon"]
    finetune.run(Words(), "above", settings, 0, tmp_path, samples=2)
    base = Posterior.load(tmp_path / "base.safetensors")
    for name, p in Words().make(0).named_parameters():
        assert torch.equal(base.mean[name], p)
    torch.testing.assert_close(base.precision["head.bias"], torch.full((2,), 1e4 * 0.1 + 1e-2))
    torch.testing.assert_close(base.hessian()["head.bias"], torch.full((2,), 1e4 * 0.1))
    merged = merge([Posterior.load(tmp_path / "posterior.safetensors")], base=base)
    assert not torch.equal(merged.mean["head.bias"], base.mean["head.bias"])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    settings = FinetuneAdamw(float("inf"))
    with pytest.raises(UserError, match="diverged"):
        finetune.run(Words(), "above", settings, 0, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_trial_is_judged_by_what_is_reported():
    scores = {"the mean": {"nll": 1.0}, "averaged": {"nll": 2.0}}
    assert finetuning._loss({"validation": scores}) == 2.0
    assert finetuning._loss({"validation": {"the mean": {"nll": 1.0}}}) == 1.0
    assert finetuning._loss(None) == math.inf


def test_the_study_finetunes_what_was_best_and_goes_on_where_one_diverges(tmp_path, monkeypatch):
    words = Words(domains=("above", "again"), epochs=2)
    worse = {"adamw": FinetuneAdamw(1e-6), "ivon": FinetuneIvon(1e-6, 1e4, hess_init=0.1)}
    trials = {o: [worse[o], BOTH[o]] for o in BOTH}
    trials["adamw"].append(FinetuneAdamw(float("inf")))
    trials["ivon"].append(worse["ivon"])
    monkeypatch.setattr(finetuning, "subjects", lambda scale: [(words, trials)])
    monkeypatch.setattr(finetuning, "SAMPLES", 2)
    found = finetuning.study(tmp_path, [0, 1], "desk", silent)
    tried = found["trials"]["bag, adamw"]
    assert [t["settings"]["lr"] for t in tried] == [3e-2, 1e-6, float("inf")]
    assert tried[-1]["scores"] is None
    assert {(row["domain"], row["method"]) for row in found["rows"]} == {
        (domain, method)
        for domain in words.domains
        for method in ("adamw, the mean", "ivon, the mean", "ivon, averaged")
    }
    folders = [p for p in (tmp_path / "bag").iterdir() if p.is_dir()]
    assert len(folders) == 6 + 2 * 3  # the trials; of the best, the other domain and the other seed
    (claim,) = (c for c in claims.CLAIMS if c.result == "finetuning/result.json")
    assert "IVON" in claim.judge(found)[1]


def test_batches_are_of_like_length_and_an_epoch_has_each_row_once():
    made = [finetune.padded(b) for b in finetune.batches(rows(100), 8, seed=0, epoch=0)]
    assert sum(len(y) for _, y in made) == 100
    seen = sorted(int(x["input_ids"][i, 0]) for x, y in made for i in range(len(y)))
    assert seen == sorted(row[0][0] for row in rows(100))
    padding = sum(int((1 - x["attention_mask"]).sum()) for x, _ in made)
    whole = finetune.padded(rows(100))[0]["attention_mask"]
    assert padding < 0.5 * int((1 - whole).sum())


def test_scores_average_over_samples_whatever_the_order():
    torch.manual_seed(0)
    model = Bag()
    mean = dict(model.named_parameters())
    posterior = Posterior(mean, {n: torch.full_like(p, 4.0) for n, p in mean.items()})
    found = finetune.scored(model, posterior, rows(), Words(), 5)
    inputs, targets = finetune.padded(rows())
    probs = 0
    for index in range(5):
        with posterior.sampled(model, 0, index), torch.no_grad():
            probs = probs + model(**inputs).softmax(1) / 5
    assert found["nll"] == pytest.approx(metrics.nll(probs, targets), rel=1e-5)
    assert found["accuracy"] == pytest.approx(metrics.accuracy(probs, targets))
    assert found["ece"] == pytest.approx(metrics.ece(probs, targets, 20), abs=1e-6)


@pytest.mark.slow
@pytest.mark.network
def test_the_study_has_a_row_for_each_way_and_is_not_done_again(tmp_path):
    pytest.importorskip("transformers")
    found = finetuning.study(tmp_path, [0], "smoke", silent)
    assert [row["method"] for row in found["rows"]] == [
        *("adamw, the mean", "ivon, the mean", "ivon, averaged")
    ]
    assert (tmp_path / "finetuning.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert finetuning.study(tmp_path, [0], "smoke", silent) == found
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}


@pytest.mark.parametrize("scale", ["smoke", "desk", "paper"])
def test_as_many_trials_of_each(scale):
    for _, trials in finetuning.subjects(scale):
        assert len({len(tried) for tried in trials.values()}) == 1


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_answers_with_single_words():
    pytest.importorskip("gguf")
    assert SmolLM2()._tokens([" negative", " positive"]) == [[w] for w in WORDS]
    train, held, test = SmolLM2().sentences("movies", 0)
    assert (len(train), len(held), len(test)) == (500, 100, 300)
    ending = SmolLM2()._tokens(["\nSentiment:"])[0][-2:]
    assert all(tokens[-2:] == ending for tokens, _ in test)
