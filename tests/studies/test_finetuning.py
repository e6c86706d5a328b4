"""The finetuning study in small, and what it scores with."""

import pytest
import torch
from torch import nn

from posterity import Posterior, metrics
from posterity_studies import finetune
from posterity_studies.studies import finetuning
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


def logits(model, inputs):
    return model(**inputs)


@pytest.mark.parametrize(
    "settings", [finetune.AdamW(3e-2), finetune.Ivon(1.0, 1e4, hess_init=0.1, clip_radius=1.0)]
)
def test_finetuning_learns(settings):
    torch.manual_seed(0)
    model = Bag()
    opt = settings.build(list(model.parameters()), 0)
    before = finetuning.scored(model, None, rows(), logits, 1)
    finetune.finetune(model, opt, rows(), batch=8, epochs=8, seed=0, logits=logits)
    after = finetuning.scored(model, None, rows(), logits, 1)
    assert after["accuracy"] > 0.9 > before["accuracy"]


def test_batches_are_of_like_length_and_an_epoch_has_each_row_once():
    made = list(finetune.batches(rows(100), 8, torch.Generator().manual_seed(0)))
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
    found = finetuning.scored(model, posterior, rows(), logits, 5)
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
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("scores.json")}
    assert finetuning.study(tmp_path, [0], "smoke", silent) == found
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("scores.json")}


def test_as_many_trials_of_each():
    trials = finetuning.minilm(tiny=False).trials
    assert len({len(tried) for tried in trials.values()}) == 1
