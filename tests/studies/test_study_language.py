"""The study of perplexities, on a small text of its own."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from posterity_studies import data
from posterity_studies.data import cache, text
from posterity_studies.studies import language

PROSE = b"The cat sat on a mat, and the dog sat on the cat. " * 60


@pytest.fixture
def prose(tmp_path, monkeypatch):
    """`anarchism`, but short."""
    arrays = {f"{split}.targets": np.zeros(0, np.uint8) for split in ("train", "test")}
    for split in ("train", "test"):
        arrays[f"{split}.inputs"] = np.frombuffer(bytearray(PROSE), np.uint8)
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path / "cache"))
    cache.prepare("anarchism")
    cache.write("anarchism", arrays, "made for a test")
    origin = data.Origin(name="anarchism", licence="none", digest=cache.digest(arrays), sources=())
    monkeypatch.setattr(text, "TEXTS", {"anarchism": origin})
    return text.load("anarchism")


def silent(items, total, name):
    return items


def test_the_study_leaves_a_table_pictures_and_what_it_trained(prose, tmp_path):
    found = language.study(tmp_path, [0, 1], "smoke", silent)
    assert json.dumps(found)
    names = ["the mean", "1 sample", *(f"{n} samples" for n in (2, 4, 8, 16, 32))]
    assert [row["method"] for row in found["rows"]] == names
    values = [row["NLL"] for row in found["rows"]]
    assert all(a > b for a, b in pairwise(values[1:]))  # by Jensen, on means over groups
    assert values[0] < math.log(256)
    for name in ("language.png", "sentence.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    sentence = found["sentence"]
    length = len(sentence["text"])
    assert 0 < length < 32
    assert len(sentence["entropy"]) == len(sentence["mutual information"]) == length
    again = language.study(tmp_path, [0, 1], "smoke", silent)  # from the saved posteriors
    assert again == found
