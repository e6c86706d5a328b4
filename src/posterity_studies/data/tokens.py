"""Corpora as GPT-2's tokens, in files that are read without loading them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posterity_studies import runs
from posterity_studies.data import hub, packages, text
from posterity_studies.data.cache import DataError
from posterity_studies.recipes import UserError
from posterity_studies.train import Progress, silent

END = 50256  # <|endoftext|>, after every document
HELD_OUT = 2000  # every so many-th document is held out, as nanoGPT does; texts have a part for it
AT_ONCE = 256  # documents between two saves
PARTS = ("train", "held")


def bpe() -> Any:
    """GPT-2's byte-level tokenizer: 50257 tokens.

    Raises:
        DataError: tokenizers is not installed, or the vocabulary cannot be fetched.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer  # pyright: ignore
    except ImportError:
        raise DataError("tokens need the library tokenizers: pip install tokenizers") from None
    folder = packages.folder("gpt2-bpe")
    return ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def documents(corpus: str) -> tuple[Iterable[str], int, Callable[[int], bool]]:
    """The documents of a corpus, always in the same order.

    Their number comes along (0: unknown), and which are held out, by their places, from 1 on.

    Args:
        corpus: a text of ``posterity_studies.data.text``, several joined by ``+``; a file, or a
            folder of files ``*.txt``; or a data set of the Hugging Face hub, ``OWNER/NAME``, whose
            column ``text`` is streamed: ``Skylion007/openwebtext``.

    Raises:
        UserError: there is no such corpus.
        DataError: it cannot be fetched.
    """
    if all(name in text.TEXTS for name in corpus.split("+")):
        bodies = [text.load(name) for name in corpus.split("+")]
        halves = zip(*(b.test.tensor_split(2) for b in bodies), strict=True)
        held_out = [half for every in halves for half in every]  # each half has some of every text
        train, held = (
            [piece for part in parts for piece in _pieces(bytes(part.numpy()))]
            for parts in ([b.train for b in bodies], held_out)
        )
        return train + held, len(train + held), lambda place: place > len(train)
    path = Path(corpus)
    if path.exists():
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no *.txt")
        if len(files) == 1:
            pieces = [*_pieces(files[0].read_bytes())]
            return pieces, len(pieces), _one_of(len(pieces))
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return texts, len(files), _one_of(len(files))
    if corpus.count("/") != 1:
        known = ", ".join(text.TEXTS)
        raise UserError(f"no corpus {corpus!r}: name a file or folder, OWNER/NAME, or {known}")
    rows = hub.load(corpus, split="train", streaming=True)
    return (row["text"] for row in rows), 0, _one_of(0)


def _one_of(total: int) -> Callable[[int], bool]:
    """Which documents are held out; of few every twentieth, or the last."""
    every = HELD_OUT if not total or total >= 2 * HELD_OUT else min(20, total)
    return lambda place: place % every == 0


def _pieces(body: bytes, size: int = 1 << 14) -> Iterator[str]:
    """A long text in pieces that end with a line."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start + size) + 1 or len(body)
        yield body[start:end].decode("utf-8", errors="replace")
        start = end


def prepare(corpus: str, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write ``train.bin`` and ``held.bin`` (uint16), and last ``tokens.json`` that tells of them.

    Documents are never in memory together; an interrupted call goes on where it was.

    Raises:
        UserError: the folder holds another corpus' tokens, or something else; another process
            is at work in it.
    """
    told = folder / "tokens.json"
    if not told.exists():
        with runs.occupied(folder):
            _write(corpus, folder, progress)
    facts = runs.read_json(told)
    if facts["corpus"] != corpus:
        raise UserError(f"{folder} holds the tokens of {facts['corpus']}: choose another --out")
    return facts


def _write(corpus: str, folder: Path, progress: Progress) -> None:
    saved = folder / "progress.json"
    if any(folder.iterdir()) and not saved.exists():
        raise UserError(f"{folder} is not empty and holds no tokens: choose another --out")
    state = {"corpus": corpus, "documents": 0, **dict.fromkeys(PARTS, 0)}
    if saved.exists() and (state := runs.read_json(saved))["corpus"] != corpus:
        raise UserError(f"{folder} holds the tokens of {state['corpus']}: choose another --out")
    every, total, is_held = documents(corpus)
    tokenizer = bpe()
    left = islice(every, state["documents"], None)
    runs.write_json(saved, state)
    with ExitStack() as stack:
        files = {part: stack.enter_context((folder / f"{part}.bin").open("ab")) for part in PARTS}
        for part, file in files.items():
            file.truncate(2 * state[part])  # what a killed call wrote after its last save
        bar = iter(progress(range(total), total, "documents")) if total else iter(())
        while batch := list(islice(left, AT_ONCE)):
            for encoded in tokenizer.encode_batch(batch):
                state["documents"] += 1
                part = "held" if is_held(state["documents"]) else "train"
                np.array([*encoded.ids, END], np.uint16).tofile(files[part])
                state[part] += len(encoded.ids) + 1
                next(bar, None)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            runs.write_json(saved, state)
    if not (state["train"] and state["held"]):
        for path in (saved, *(folder / f"{part}.bin" for part in PARTS)):
            path.unlink()  # the corpus may grow
        raise UserError(f"{corpus} is too short: needs documents, or pieces, to train and to test")
    runs.write_json(folder / "tokens.json", state)
    saved.unlink()


def load(folder: Path) -> dict[str, Tensor]:
    """``train`` and ``held``: uint16 tokens (n,), mapped from files.

    Raises:
        UserError: there are none, or a file is not whole.
    """
    if not (folder / "tokens.json").exists():
        raise UserError(f"{folder} holds no tokens: prepare some with posterity tokens")
    facts, found = runs.read_json(folder / "tokens.json"), {}
    for part in PARTS:
        path = folder / f"{part}.bin"
        if not path.exists() or path.stat().st_size != 2 * facts[part]:
            raise UserError(f"{path} is missing or not whole: remove {folder}, and prepare it anew")
        mapped = np.memmap(path, np.uint16, "c") if facts[part] else np.zeros(0, np.uint16)
        found[part] = torch.from_numpy(mapped)  # "c": written to in memory alone
    return found
