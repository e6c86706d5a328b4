"""Data sets of the Hugging Face hub, read by its library; a folder of the same form will do.

To add sentences, name them in ``SENTENCES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posterity_studies.data.cache import DataError


@dataclass(frozen=True)
class Sentences:
    """Where sentences with classes are: a data set, its splits and its columns."""

    source: str  # OWNER/NAME, or a folder
    config: str | None = None
    columns: tuple[str, ...] = ("text",)  # two of a pair
    label: str = "label"
    train: str = "train"
    test: str = "test"


def _glue(config: str, *columns: str, test: str = "validation") -> Sentences:
    """A task of GLUE: the labels of its test set are not published."""
    return Sentences("nyu-mll/glue", config, columns, test=test)


SENTENCES = {
    "cola": _glue("cola", "sentence"),
    "sst2": _glue("sst2", "sentence"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2"),
    "qqp": _glue("qqp", "question1", "question2"),
    "mnli": _glue("mnli", "premise", "hypothesis", test="validation_matched"),
    "qnli": _glue("qnli", "question", "sentence"),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "imdb": Sentences("stanfordnlp/imdb"),
    "yelp": Sentences("fancyzhx/yelp_polarity"),
    "rotten-tomatoes": Sentences("cornell-movie-review-data/rotten_tomatoes"),
    "amazon": Sentences("fancyzhx/amazon_polarity", columns=("title", "content")),
}


def load(source: str, config: str | None = None, **how: Any) -> Any:
    """What ``datasets.load_dataset`` makes of it.

    Raises:
        DataError: the library is not installed, or the data cannot be had.
    """
    try:
        import datasets  # pyright: ignore
    except ImportError:
        raise DataError(f"{source} needs the library datasets: pip install datasets") from None
    try:
        return datasets.load_dataset(source, config, **how)
    except Exception as error:  # the network, the hub, the form of the files
        raise DataError(f"{source} cannot be had: {' '.join(str(error).split())}") from None


def sentences(name: str) -> tuple[Sentences, Any, Any]:
    """Where they are, and the data sets to train on and to test with.

    Args:
        name: one of ``SENTENCES``, or a data set with columns ``text`` and ``label`` and splits
            ``train`` and ``test``: OWNER/NAME on the hub, or a folder.

    Raises:
        DataError: they cannot be had, a split or a column is missing, or there are no labels.
    """
    what = SENTENCES.get(name) or Sentences(name)
    if name not in SENTENCES and "/" not in name:
        known = ", ".join(SENTENCES)
        raise DataError(f"no sentences {name!r}: name OWNER/NAME, a folder, or one of {known}")
    found: Mapping[str, Any] = load(what.source, what.config)
    for split in (what.train, what.test):
        if split not in found:
            raise DataError(f"{name} has no split {split!r}, but {', '.join(found)}")
        columns = found[split].column_names
        if missing := [c for c in (*what.columns, what.label) if c not in columns]:
            raise DataError(f"{name} has no column {missing[0]!r}, but {', '.join(columns)}")
        if min(found[split].unique(what.label), default=-1) < 0:
            raise DataError(f"{name} has no labels in its split {split!r}")
    return what, found[what.train], found[what.test]
