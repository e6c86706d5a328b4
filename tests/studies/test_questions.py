"""``posterity study``: every study's smoke version, and what the command promises."""

import json
import math

import pytest
import torch

from posterity_studies import recipes, train
from posterity_studies.studies import STUDIES, leave_one_out
from posterity_studies.studies.label_noise import quality

QUICK = ("leave-one-out", "label-noise", "ood", "selective", "cost", "gap", "in-domain")


@pytest.mark.parametrize("name", QUICK)
def test_a_study_leaves_a_table_pictures_and_provenance(call, tmp_path, name):
    out, kept = tmp_path / "out", tmp_path / "kept"
    done = call("study", name, "--scale", "smoke", "--out", out, "--results", kept)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert json.loads((kept / "result.json").read_text()) == result
    assert (result["study"], result["scale"], result["seeds"]) == (name, "smoke", [0])
    assert result["provenance"]["git"]
    assert result["rows"]
    assert all(row["method"][:5] in done.stdout for row in result["rows"])
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert bool(pictures) == (name != "cost")
    assert sorted(path.name for path in kept.glob("*.png")) == pictures
    assert all((out / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    again = call("study", name, "--scale", "smoke", "--out", out)
    assert again.stdout == done.stdout
    other = call("study", name, "--scale", "smoke", "--out", out, "--seeds", "1")
    assert other.returncode == 2
    assert "holds another result" in other.stderr


def test_studies_are_listed_and_unknown_ones_named(call):
    listed = call("study").stdout
    assert all(name in listed for name in STUDIES)
    done = call("study", "astrology")
    assert done.returncode == 2
    assert "no study 'astrology'; there are leave-one-out" in done.stderr


def test_agreement_is_of_ranks_and_of_late_gaps():
    steps = range(1, 6)
    test = [2.0, 1.5, 1.0, 0.5, 0.25]
    curve = [
        {"step": s, "test": t, "leave_one_out": 1.1 * t, "train": -t}
        for s, t in zip(steps, test, strict=True)
    ]
    found = leave_one_out.agreement(curve, after=2)
    assert found["rank correlation"] == pytest.approx(1)
    assert found["of the training loss"] == pytest.approx(-1)
    assert found["gap"] == pytest.approx(0.1)
    assert found["gap of the training loss"] == pytest.approx(2)


def test_a_share_of_the_labels_is_made_wrong_always_the_same(folder):
    targets = torch.arange(10).repeat(40)
    noisy, wrong = train.mislabelled(targets, 10, 0.05)
    assert wrong.sum() == 20
    assert torch.equal(noisy != targets, wrong)
    assert set(noisy.tolist()) == set(range(10))
    assert torch.equal(noisy, train.mislabelled(targets, 10, 0.05)[0])
    chosen = recipes.replace(recipes.recipe("smoke"), label_noise=0.1)
    task, clean = train.load_task(chosen), train.load_task(recipes.recipe("smoke"))
    assert task.wrong is not None
    assert torch.equal(task.train[1] != clean.train[1], task.wrong)
    assert torch.equal(task.test[1], clean.test[1])
    assert "label_noise" in train.configuration(chosen, "sgd", 0)


def test_a_perfect_ranking_has_all_wrong_labels_on_top():
    wrong = torch.zeros(100, dtype=torch.bool)
    wrong[:5] = True
    assert quality(wrong.float(), wrong) == {"AUROC": 1.0, "precision at 5 %": 1.0}
    worst = quality(-wrong.float(), wrong)
    assert worst["AUROC"] == 0
    assert math.isclose(worst["precision at 5 %"], 0)
