"""The merging study in small: every method on every domain, resumed without training again."""

import pytest
import torch

from posterity import Posterior
from posterity_studies.data import packages
from posterity_studies.recipes import UserError
from posterity_studies.settings import FinetuneIvon
from posterity_studies.studies import merging
from posterity_studies.subjects import TINY

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.network]


def silent(items, total, label):
    return items


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("merging")


@pytest.fixture(scope="module")
def found(out):
    return merging.study(out, [0], "smoke", silent)


def test_every_method_is_tested_on_every_domain(found, out):
    methods = [row["method"] for row in found["rows"]]
    assert methods[0] == "Hessian of IVON"
    assert len(set(methods)) == 12
    (run,) = found["runs"]
    for method in methods:
        assert set(run["test"][method]["accuracy"]) == set(TINY.domains)
    trials = {name: len(scores) for name, scores in run["validation"].items()}
    assert {n for n in trials.values() if n > 1} == {5}
    costly = {row["method"] for row in found["rows"] if row["further seconds"]}
    assert costly == {"squared gradients", "Fisher average, squared gradients"}
    assert (out / "merging.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_chosen_is_the_best_on_validation(found):
    (run,) = found["runs"]
    for method, scores in run["validation"].items():
        ranks = {
            name: (round(sum(score["accuracy"].values()), 9), -sum(score["nll"].values()))
            for name, score in scores.items()
        }
        assert ranks[run["chosen"][method]] == max(ranks.values())


def test_finished_training_is_read_and_other_settings_are_refused(found, out, monkeypatch):
    path = out / "seed0" / "movies.safetensors"
    before = path.stat().st_mtime_ns
    (out / "seed0" / "result.json").unlink()
    assert merging.study(out, [0], "smoke", silent)["rows"] == found["rows"]
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr(merging, "SETTINGS", FinetuneIvon(lr=1.0))
    with pytest.raises(UserError, match="other settings"):
        merging.study(out, [0], "smoke", silent)


def test_domains_start_from_one_head_and_move_all_but_the_word_vectors(found, out):
    weights = merging.trained(TINY.make(0))
    assert not any("word_embeddings" in name for name in weights)
    for domain in TINY.domains:
        tuned = Posterior.load(out / "seed0" / f"{domain}.safetensors")
        assert set(tuned.mean) == set(weights)
        gap = (tuned.mean["classifier.weight"] - weights["classifier.weight"]).abs().max()
        assert 0 < gap < 0.1


def test_squares_are_sums_over_single_examples(tmp_path):
    model = TINY.make(0)
    weights = merging.trained(model)
    ones = {name: torch.ones_like(p) for name, p in weights.items()}
    at = Posterior(weights, ones, prior_precision=0.5)
    rows = TINY.sentences("airline", 0)[0][:3]
    found = merging.squares(tmp_path / "s.safetensors", model, at, rows).hessian()
    name, expected = "classifier.weight", 0.0
    for row in rows:
        inputs, targets = merging.padded([row])
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, targets)
        expected += torch.autograd.grad(loss, weights[name])[0] ** 2
    torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)


def test_splits_share_no_sentence_and_airline_tweets_name_one():
    texts, labels = packages.sentiment("airline")
    assert len(texts) == len(labels) > 10_000
    assert all(packages.AIRLINES.search(text) for text in texts)
    splits = TINY.sentences("airline", 0)
    assert [len(rows) for rows in splits] == [16, 8, 8]
    tokens = [tuple(row) for rows in splits for row, _ in rows]
    assert len(set(tokens)) == len(tokens)
    others = {tuple(row) for row, _ in TINY.sentences("movies", 0)[0]}
    assert not others & set(tokens)


def test_a_hessian_that_noise_took_below_zero_is_raised():
    mean = {"a": torch.zeros(3), "b": torch.zeros(1)}
    precision = {"a": torch.tensor([0.5, 1.0, 4.0]), "b": torch.tensor([1.5])}  # h from −δ on
    posterior = Posterior(mean, precision, prior_precision=1.0, ess=2.0)
    least = 1e-6 * (-0.5 + 0 + 3) / 3
    found = merging.raised(posterior).hessian()
    torch.testing.assert_close(found["a"][:2], torch.full((2,), least), rtol=0.2, atol=0)
    assert found["a"][2] == 3
    assert found["b"] == 0.5
    merging.merge([merging.raised(posterior)] * 2, method="fisher")
    with pytest.raises(ValueError, match="not positive"):
        merging.merge([posterior] * 2, method="fisher")
