"""The paper's claims: judged by the committed results, and the other way where these are worse."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from posterity_studies import claims, judges
from posterity_studies.claims import CLAIMS
from posterity_studies.studies import STUDIES

RESULTS = Path(__file__).parents[2] / "results"


def content(claim):
    files = sorted(RESULTS.glob(claim.result))
    if not files:
        pytest.skip("not run yet")
    read = [json.loads(path.read_text()) for path in files]
    return read if "*" in claim.result else read[0]


def seeds_of(change):
    """Change IVON's averaged evaluation in each run."""

    def worse(results):
        for result in results:
            if result["settings"]["optimizer"] == "ivon":
                change(result["evaluations"]["samples"])

    return worse


def row(start, **changes):
    """Change the rows of methods that start so."""

    def worse(result):
        for found in result["rows"]:
            if found["method"].startswith(start):
                found |= changes

    return worse


def each(method, **changes):
    def worse(result):
        for found in result["each"][method]:
            found |= changes

    return worse


def slower(bench):
    bench["found"]["GPT 10.9M, batch 16"]["IVON"]["ratio"] = 1.3


def less_accurate(result):
    for run in result["runs"]:
        run["test"]["Hessian of IVON"]["accuracy"] = {"movies": 0.5}


def unheard(result):
    for found in result["rows"]:
        if found["method"].startswith("IVON"):
            found["AUROC"] = 0.1


def less_sure(result):
    for found in result["each"].values():
        for title in (t for t in found if t.startswith("IVON, ")):
            found[title] = [run | {"nll": 9.0} for run in found[title]]


def unpaid(runs):
    for run in runs:
        run["32"] = 9.0


WORSE = {  # what makes a claim that holds fail
    "averaging": row("the mean", perplexity=1.0),
    "averaged": lambda result: unpaid(run["scores"] for run in result["runs"]["pairs"]),
    "elsewhere": lambda result: unpaid(result["news"]["runs"]["pairs"]),
    "speed": slower,
    "accuracy": seeds_of(lambda found: found.update(nll=3.0)),
    "classified": less_sure,
    "sampling": seeds_of(lambda found: found.update(ece=0.5)),
    "in_domain": each("IVON", nll=9.0),
    "multi": each("Multi-IVON", nll=9.0),
    "unknown": unheard,
    "more_samples": row("1 in", NLL=1.0),
    "exact": row("Multi-IVON", agreement=0.1),
    "pretrained": row("IVON", loss=9.0),
    "paired": row("IVON in pairs", loss=9.0),
    "finetuned": row("ivon, averaged", accuracy=0.1),
    "between": row("IVON, one run", **{"sd in the gap": 0.0}),
    "merged": less_accurate,
    "left_out": row("IVON", **{"rank correlation": 0.1}),
    "wrong_labels": row("sensitivity, IVON", AUROC=0.6),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.judge.__name__)
def test_a_worse_result_fails_the_claim(claim):
    found = content(claim)
    before = copy.deepcopy(found)
    claim.judge(found)
    assert found == before  # a judge only looks
    worse = copy.deepcopy(found)
    WORSE[claim.judge.__name__](worse)
    assert worse != found
    holds, ours = claim.judge(worse)
    assert not holds
    assert ours != claim.judge(found)[1]


def test_less_than_the_seeds_spread_is_no_difference():
    others = ("SGD", "Bayes by backprop", "MC-dropout", "SWAG")

    def result(ivon, dropout):
        each = {name: [{"nll": v} for v in (0.30, 0.31, 0.32)] for name in others}
        each["MC-dropout"] = [{"nll": v} for v in dropout]
        return {"each": each | {"IVON": [{"nll": v} for v in ivon]}}

    assert judges.in_domain(result((0.20, 0.21, 0.22), (0.30, 0.31, 0.32)))[0]
    holds, ours = judges.in_domain(result((0.20, 0.21, 0.22), (0.20, 0.211, 0.222)))
    assert not holds
    assert "within the seeds' spread of MC-dropout" in ours
    assert judges.in_domain(result((0.20,), (0.201,)))[0]  # one run has no spread
    assert not judges.in_domain(result((0.25, 0.26), (0.20, 0.21)))[0]


def test_averaging_must_gain_more_than_its_standard_errors():
    def result(*gains):
        runs = [{"mean": 1.2, "8": 1.0, "32": 1.2 - gain} for gain in gains]
        on_news = [run | {"softened": 1.1, "divisor": 1.1} for run in runs]
        news = {"runs": {"pairs": on_news}, "best": {"pairs": 30.0}}
        return {"runs": {"pairs": [{"scores": run} for run in runs]}, "news": news}

    for judge in (judges.averaged, judges.elsewhere):
        assert judge(result(0.010, 0.011, 0.012))[0]
        assert not judge(result(-0.010, -0.011, -0.012))[0]
        holds, ours = judge(result(0.001, 0.021, 0.041))
        assert not holds
        assert "the mean 1.2000, 32 samples add -0.02100 (s.e. 0.01155)" in ours
    assert "temperature 30; logits over 1.10 add -0.1000" in ours


def test_commands_are_of_studies_that_exist():
    for claim in CLAIMS:
        words = claim.command.split()
        if words[1:2] == ["study"]:
            assert words[2] in STUDIES


def test_the_page_says_what_the_results_say(call, tmp_path):
    results, out = tmp_path / "results", tmp_path / "page.html"
    shutil.copytree(RESULTS / "gap", results / "gap")
    (results / "paper").mkdir()
    language = json.loads((RESULTS / "language/result.json").read_text()) | {"scale": "paper"}
    for place, content in (("paper/language", language), ("ood", {"scale": "smoke"})):
        (results / place).mkdir()
        (results / place / "result.json").write_text(json.dumps(content))
    done = call("study", "--report", "--results", results, "--out", out)
    assert done.returncode == 0, done.stderr
    found = {(j.claim.text, j.scale): j for j in claims.judged(results)}
    assert len(found) == 2 * len(CLAIMS)
    run = {key for key, j in found.items() if j.status != "not yet run"}
    assert run == {
        ("The variance grows where there are no data.", "desk"),
        ("Averaging more than 8 posterior samples lowers perplexity further.", "paper"),
    }
    text = out.read_text()
    for judged in found.values():
        assert judged.ours in text
    assert text.count('data-status="holds"') == 1
    assert text.count('data-status="not yet run"') == len(CLAIMS) - 1
    assert "At desk scale <b>1</b> hold, <b>0</b> do not" in text
    assert "://" not in text


def test_damaged_results_and_no_results_get_one_line(call, tmp_path):
    (tmp_path / "gap").mkdir()
    for damaged in ("{", '{"rows": 3}'):
        (tmp_path / "gap/result.json").write_text(damaged)
        done = call("study", "--report", "--results", tmp_path, "--out", tmp_path / "page.html")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "gap/result.json" in done.stderr
    (tmp_path / "gap/result.json").write_text('{"rows": []}')
    told = {j.status: j.ours for j in claims.judged(tmp_path) if j.ours}
    assert told == {"not yet run": "the result lacks 'IVON, one run'"}
    done = call("study", "--report", "--results", tmp_path / "none")
    assert "is no folder" in done.stderr
    assert not (tmp_path / "page.html").exists()
