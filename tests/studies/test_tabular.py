"""Tables, and the study on them in small."""

import math

import pytest
import torch

from posterity_studies.data import tabular
from posterity_studies.data.cache import DataError
from posterity_studies.settings import Adamw, IvonSamples
from posterity_studies.studies import tabular as study
from posterity_studies.train import silent

pytest.importorskip("pandas")
pytestmark = [pytest.mark.slow, pytest.mark.network]

SHAPES = {"boston": (506, 13), "concrete": (1030, 8), "auto": (392, 7), "diamonds": (53940, 9)}


@pytest.mark.parametrize("name", tabular.TABLES)
def test_tables_are_whole(name):
    x, y = tabular.load(name)
    assert tuple(x.shape) == SHAPES[name]
    assert len(y) == len(x)
    assert x.isfinite().all()
    assert y.min() > 0
    assert len(x.unique(dim=0)) > 0.9 * len(x) or name == "diamonds"


def test_an_unknown_table_says_so():
    with pytest.raises(DataError, match="no table 'x'; there are boston"):
        tabular.load("x")


def test_splits_are_disjoint_and_standardised_by_what_is_trained_on():
    (x, y), (_, targets), unit = study.split("auto", 3)
    torch.testing.assert_close(x.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(7), atol=1e-4, rtol=0)
    assert (len(y), len(targets)) == (353, 39)
    every = torch.cat([y, targets]).double() * unit
    truth = tabular.load("auto")[1].double()
    spread = every.sort().values - truth.sort().values
    torch.testing.assert_close(spread, spread[:1].expand(392), atol=1e-4, rtol=0)
    assert not torch.equal(study.split("auto", 4)[2] * torch.ones(1), unit * torch.ones(1))


@pytest.mark.parametrize(
    "settings",
    [
        Adamw(lr=1e-2, weight_decay=0.1),
        IvonSamples(lr=0.1, hess_init=0.5, weight_decay=5e-3, memory=1e3, mc_samples=2),
    ],
)
def test_a_fit_is_better_than_the_targets_own_gaussian(settings):
    train, test, unit = study.split("auto", 0)
    found = study.scored(*study.fitted(train, settings, 0, epochs=20), test, unit)
    naive = 0.5 * math.log(2 * math.pi * math.e) + math.log(unit)
    assert found["NLL"] < naive - 0.5
    assert found["RMSE"] < 0.5 * unit


def test_the_study_is_resumed(tmp_path):
    found = study.study(tmp_path, [0, 1], "smoke", silent)
    assert [row["method"] for row in found["rows"]] == [
        title for pair in study.TITLES.values() for title in pair
    ]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert len(before) == 4 + 2  # two splits, and a trial, of each optimizer
    assert study.study(tmp_path, [0, 1], "smoke", silent) == found
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
