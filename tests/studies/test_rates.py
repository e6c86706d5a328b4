"""AdamW's rate carried over: who is compared with whom."""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch

from posterity_studies import runs
from posterity_studies.settings import FromAdamw
from posterity_studies.studies import rates
from posterity_studies.train import silent


def test_ivon_is_built_of_that_adamw():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    opt = FromAdamw(3e-5).build(model, n_train=800, steps=50, seed=7)
    (group,) = opt.param_groups
    assert group["lr"] * group["clip_radius"] == pytest.approx(3e-5)
    assert (group["seed"], group["params"]) == (7, [model.weight])
    assert FromAdamw(3e-5).settings["lr"] == pytest.approx(0.03)  # what a run's folder tells


@pytest.mark.slow
@pytest.mark.network
def test_both_learn_at_each_rate_with_each_seed(tmp_path):
    pytest.importorskip("transformers")
    found = rates.study(tmp_path, [0, 1], "smoke", silent)
    (row,) = found["rows"]
    kept = {
        method: [
            runs.read_json(tmp_path / f"{method}-3e-05-seed{s}" / "result.json") for s in (0, 1)
        ]
        for method in rates.SETTINGS
    }
    assert {r["settings"]["lr"] for every in kept.values() for r in every} == {3e-5}
    adamw = [r["test"]["the mean"]["nll"] for r in kept["AdamW"]]
    ivon = [r["test"]["averaged"]["nll"] for r in kept["IVON at its rate"]]
    gaps = [i - a for a, i in zip(adamw, ivon, strict=True)]
    assert (row["rate"], row["AdamW"], row["IVON at its rate"]) == (3e-5, fmean(adamw), fmean(ivon))
    assert row["IVON's less AdamW's"] == pytest.approx(fmean(gaps))
    assert row["s.e."] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    assert math.isfinite(row["s.e."])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "results" / "rates" / "result.json").read_text())["rows"]


def test_ivon_is_ahead_up_to_adamws_best_rates_and_the_page_says_where_not():
    ahead = [row["rate"] for row in ROWS if row["IVON's less AdamW's"] < 0]
    assert ahead == [1e-5, 3e-5, 1e-4]
    best = min(ROWS, key=lambda row: row["AdamW"])
    assert best["rate"] in ahead
    worse = [row for row in ROWS if row["rate"] not in ahead]
    assert [row["IVON's less AdamW's"] > 2 * row["s.e."] for row in worse] == [True]


def test_the_page_shows_the_committed_rates():
    page = (ROOT / "docs" / "migrate" / "adamw.md").read_text()
    lines = page.split("| AdamW's rate |")[1].split("\n\n")[0].splitlines()[2:]
    shown = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
    told = [f"{row['rate']:.0e}".replace("e-0", "e-") for row in ROWS]
    values = [(*(row[m] for m in rates.SETTINGS), row["IVON's less AdamW's"]) for row in ROWS]
    found = [[f"{v:.3f}".replace("0.", ".").replace("-", "−") for v in each] for each in values]
    errors = [f"{row['s.e.']:.3f}".removeprefix("0") for row in ROWS]
    assert shown == [
        [t, a, i, f"{d}, {e}"] for t, (a, i, d), e in zip(told, found, errors, strict=True)
    ]
