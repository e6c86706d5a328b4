"""The variance between the data is larger than at them, and the regions are what they say."""

import json

import pytest
import torch

from posterity_studies.studies import gap


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("gap")
    return out, gap.study(out, [0], "smoke", lambda items, total, name: items)


def test_the_variance_in_the_gap_exceeds_that_at_the_data(found):
    out, result = found
    one, mixture, means = result["rows"]
    for row in (one, mixture):
        assert row["sd in the gap"] > 1.2 * row["sd at the data"]
        assert row["sd at the data"] > 0.01
    assert mixture["sd in the gap"] > one["sd in the gap"]
    assert means["sd at the data"] < 0.5 * one["sd at the data"]
    assert one["error at the data"] < 0.2
    assert json.dumps(result)
    assert (out / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_there_are_no_data_in_the_gap():
    x, y = gap.observations(3)
    assert x.shape == y.shape == (gap.EXAMPLES, 1)
    assert ((x.abs() >= gap.NEAR) & (x.abs() <= gap.FAR)).all()
    assert (x > 0).sum() == gap.EXAMPLES // 2
    assert (y - gap.truth(x)).std().item() == pytest.approx(gap.NOISE, rel=0.25)
    assert torch.equal(x, gap.observations(3)[0])
    assert not torch.equal(x, gap.observations(4)[0])


def test_widths_are_of_their_regions():
    grid = torch.linspace(-gap.EDGE, gap.EDGE, 241)[:, None]
    x = grid[:, 0].abs()
    sd = torch.where(x < gap.NEAR, 3.0, torch.where(x <= gap.FAR, 1.0, 5.0))
    band = gap.truth(grid[:, 0]) + 0.5, (sd.square() + gap.NOISE**2).sqrt()
    found = gap.widths(band, grid)
    expected = {"sd at the data": 1.0, "sd in the gap": 3.0, "sd beyond": 5.0}
    assert found == pytest.approx({**expected, "error at the data": 0.5}, rel=1e-4)
