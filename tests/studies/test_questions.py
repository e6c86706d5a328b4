"""``posterity study``: every study's smoke version, and what the command promises."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import cross_entropy

from posterity_studies import claims, recipes, runs, tasks, train
from posterity_studies.models import NETWORKS
from posterity_studies.settings import IvonSamples
from posterity_studies.studies import STUDIES, agreement, leave_one_out, mc_samples
from posterity_studies.studies.label_noise import quality

QUICK = (
    *("leave-one-out", "label-noise", "ood", "selective", "cost", "gap"),
    *("classification", "in-domain", "mc-samples", "agreement"),
)


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
    few = ("in-domain", "agreement", "mc-samples")  # one seed is no ensemble, nor 4 samples 64
    for claim in claims.CLAIMS:
        if claim.result == f"{name}/result.json" and name not in few:
            assert claim.judge(result)[1]


@pytest.mark.slow
@pytest.mark.network
def test_untouched_and_tuned_on_every_kind_of_task(call, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("pandas")
    done = call("study", "defaults", "--scale", "smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(math.isfinite(row["IVON's less AdamW's"]) for row in rows)
    assert (tmp_path / "defaults.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_is_not_replaced_by_another_studys_and_never_silently(call, tmp_path):
    kept = tmp_path / "kept"
    asked = ("--scale", "smoke", "--results", kept)
    assert call("study", "gap", *asked, "--out", tmp_path / "a").returncode == 0
    before = (kept / "result.json").read_text()
    (kept / "result.json").write_text(before.replace('"study": "gap"', '"study": "ood"'))
    done = call("study", "gap", *asked, "--out", tmp_path / "a")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is of study 'ood', not 'gap'" in done.stderr
    (kept / "result.json").write_text(before)
    done = call("study", "gap", *asked, "--out", tmp_path / "b", "--seeds", "1")
    assert done.returncode == 0
    assert "of seeds [0], finished" in done.stderr


def test_seeds_are_numbers_each_once(call, tmp_path):
    done = call("study", "gap", "--scale", "smoke", "--out", tmp_path, "--seeds", "0", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "each once" in done.stderr


def test_studies_are_listed_and_unknown_ones_named(call):
    listed = call("study").stdout
    assert all(name in listed for name in STUDIES)
    done = call("study", "astrology")
    assert done.returncode == 2
    assert "no study 'astrology'; there are pretraining" in done.stderr


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
    noisy, wrong = tasks.mislabelled(targets, 10, 0.05)
    assert wrong.sum() == 20
    assert torch.equal(noisy != targets, wrong)
    assert set(noisy.tolist()) == set(range(10))
    assert torch.equal(noisy, tasks.mislabelled(targets, 10, 0.05)[0])
    chosen = recipes.replace(recipes.recipe("smoke"), label_noise=0.1)
    task, clean = tasks.load_task(chosen), tasks.load_task(recipes.recipe("smoke"))
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


def test_several_samples_a_step_are_averaged(folder, tmp_path):
    """The run is that of ``step(closure)`` with as many samples."""
    base = recipes.recipe("smoke")
    ivon = base.settings("ivon")
    two = IvonSamples(**asdict(ivon), mc_samples=2)
    chosen = recipes.replace(base, optimizers={"ivon": two}, samples=0)
    train.train(chosen, "ivon", 0, tmp_path / "two")
    task = tasks.load_task(base)
    torch.manual_seed(0)
    model = NETWORKS[base.network](10)
    n = len(task.train[1])
    opt = two.build(model, n, 0, 0)
    steps = base.epochs * math.ceil(n / base.batch_size)
    rate = torch.optim.lr_scheduler.LambdaLR(opt, train.warmup_cosine(base.warmup * steps, steps))
    for epoch in range(base.epochs):
        for batch in tasks.batches(n, base.batch_size, 0, epoch):

            def closure(batch=batch):
                opt.zero_grad()
                loss = cross_entropy(model(task.train[0][batch]), task.train[1][batch])
                loss.backward()
                return loss

            opt.step(closure)
            rate.step()
    found = runs.read_tensors(tmp_path / "two/model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, found[name], atol=1e-6, rtol=1e-4)


def test_groups_of_samples_have_their_spread(folder):
    targets = torch.tensor([0, 1])
    groups = [torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])]
    found = mc_samples.spread(groups, targets)
    assert found["accuracy"] == pytest.approx((0.75, 0.5 / 2**0.5))
    nll = [-(math.log(0.9) + math.log(0.4)) / 2, -(math.log(0.8) + math.log(0.7)) / 2]
    assert found["NLL"] == pytest.approx((sum(nll) / 2, abs(nll[0] - nll[1]) / 2**0.5))
    assert mc_samples.spread(groups[:1], targets)["NLL"][1] == 0


def test_the_reference_samples_a_known_gaussian():
    """Moments of N(c, C) within standard errors of the draws that are worth so many."""
    from pyro.ops.stats import effective_sample_size

    precision = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    centre = torch.tensor([1.0, -2.0])

    def energy(weights):
        off = weights["w"] - centre
        return off @ precision @ off / 2

    found = agreement.sampled(energy, {"w": torch.zeros(2)}, 0, 100, 600, train.silent)["w"]
    assert found.shape == (600, 2)
    covariance = torch.linalg.inv(precision)
    worth = effective_sample_size(found[None])
    error = (covariance.diag() / worth).sqrt()
    assert ((found.mean(0) - centre).abs() < 4 * error).all()
    spread = found.var(0) / covariance.diag()
    assert ((spread - 1).abs() < 4 * (2 / worth.clamp(max=600)).sqrt()).all()


def test_agreement_and_total_variation_by_hand():
    exact = torch.tensor([[0.6, 0.4], [0.2, 0.8]])
    probs = torch.tensor([[0.4, 0.6], [0.1, 0.9]])
    found = agreement.measures(probs, exact, torch.tensor([0, 1]))
    assert found["agreement"] == 0.5
    assert found["total variation"] == pytest.approx((0.2 + 0.1) / 2)


def test_the_papers_scale_is_of_some_studies(call, tmp_path):
    done = call("study", "gap", "--scale", "paper", "--out", tmp_path / "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gap has no scale 'paper'; pretraining," in done.stderr
    chosen = recipes.recipe("published-baselines")
    assert chosen.network == "resnet20-frn"
    assert len(chosen.optimizers) == 8
    assert chosen.settings("dropout").rate == 0.05
    assert chosen.settings("swag").start * chosen.epochs == 160
    assert chosen.settings("bbb").lr == 2e-3
