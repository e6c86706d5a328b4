"""Prose for language models: pages to plain text, essays held out, checked as all data are."""

from dataclasses import replace

import pytest
import torch

from posterity_studies import data
from posterity_studies.data import DataError, Source, cache, text

PAGE = b"""<!DOCTYPE html><html><head><title>Not this</title></head><body class="x">
<h1>On &quot;order&quot;</h1><!-- nor <p>this</p> --><script>var or = "this";</script>
<p>Caf\xc3\xa9s &amp; <b>bars</b>,
   one&nbsp;line.<br>Another<em>!</em></p></body></html>"""


def test_a_page_is_its_prose():
    assert text.plain(PAGE.decode()) == 'On "order"\nCafés & bars, one line.\nAnother!'


def test_every_twelfth_essay_is_held_out():
    pages = [f"<body><p>essay {i}</p></body>".encode() for i in range(25)]
    arrays = text.decode(pages)
    assert bytes(arrays["test.inputs"]) == b"essay 11\n\nessay 23"
    train = bytes(arrays["train.inputs"]).decode().split("\n\n")
    assert train == [f"essay {i}" for i in range(25) if i not in (11, 23)]


def test_every_twelfth_article_is_held_out():
    articles = [f"Title {i}\n\n  Prose. \r\n".encode() for i in range(12)]
    articles[9] = b"\xa35m"  # in Latin-1
    arrays = text.decode_articles(articles)  # dealt: 0, 10, 1, 11, 2, ..., 9
    assert bytes(arrays["test.inputs"]).decode() == "\N{REPLACEMENT CHARACTER}5m"
    train = bytes(arrays["train.inputs"]).decode()
    assert train.startswith("Title 0\nProse.\n\nTitle 10\nProse.\n\nTitle 1\nProse.\n\n")


def test_a_page_without_a_body_is_an_error():
    with pytest.raises(ValueError, match="without a body"):
        text.decode([b"404"])


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A text served by a list of pages; how often it was asked."""
    asked = []

    def served(address, files):
        asked.append(address)
        return [PAGE] * 12

    digest = cache.digest(text.decode([PAGE] * 12))
    source = Source(served, "here", (), text.decode)
    origin = data.Origin(name="short", licence="none", digest=digest, sources=(source,))
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path))
    monkeypatch.setattr(text, "TEXTS", {"short": origin})
    return asked


def test_a_text_is_fetched_once(short):
    first, second = text.load("short"), text.load("short")
    assert len(short) == 1
    assert torch.equal(first.train, second.train)
    assert first.train.dtype == torch.uint8
    assert bytes(first.test.numpy()).decode() == text.plain(PAGE.decode())
    assert (second.source, second.licence) == ("served here", "none")
    with pytest.raises(ValueError, match="no text 'long'; there are short"):
        text.load("long")


def test_another_text_than_the_known_one_is_refused(short, monkeypatch):
    wrong = replace(text.TEXTS["short"], digest="sha256:0")
    monkeypatch.setattr(text, "TEXTS", {"short": wrong})
    with pytest.raises(DataError, match="expected sha256:0"):
        text.load("short")
    assert not cache.path("short").exists()


@pytest.mark.network
def test_the_essays_are_those_that_are_known():
    found = text.load("anarchism")
    assert (len(found.train), len(found.test)) == (6_583_918, 933_660)
    assert b"liberty" in found.test.numpy().tobytes()


@pytest.mark.network
def test_the_news_are_those_that_are_known():
    found = text.load("news")
    assert (len(found.train), len(found.test)) == (4_621_621, 411_031)
    assert b"Indonesia" in found.test.numpy().tobytes()
