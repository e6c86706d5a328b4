"""AdamW's rate carried over: who is compared with whom."""

import math
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
