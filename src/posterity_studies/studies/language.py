"""What does averaging over posterior samples do for a language model? (Fig. 2)

A byte-level GPT trained with IVON on essays, scored on essays that were held out whole: perplexity
by the number of posterior samples, beside that of the mean. And how unsure the averaged model is at
each byte of a sentence. λ, learning rate and length were chosen on these essays, from a few trials:
the mean and its samples are compared here, not one training with another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from posterity.binding import Samples
from posterity.language import perplexity
from posterity_studies.data import text
from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.pretrain import Pretraining, held_rows, load, pretrain, scored
from posterity_studies.settings import LanguageIvon
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.train import Progress

COUNTS = (1, 2, 4, 8, 16, 32)
TRAIN = 300_000  # bytes
SHAPE = GPTConfig(layers=4, heads=4, width=128, context=128, vocabulary=256)
TINY = GPTConfig(layers=1, heads=2, width=16, context=32, vocabulary=256)
SIZES = {
    "desk": Pretraining(SHAPE, steps=1200, warmup=120, every=400, held=128),
    "smoke": Pretraining(TINY, steps=20, warmup=2, every=10, held=4),
}
# λ is ten times the bytes: with as many as the bytes it holds the weights so loosely that the
# network learns more slowly.
SETTINGS = LanguageIvon(lr=70.0, ess=10.0 * TRAIN, hess_init=0.01, memory=2e3)


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Perplexities by the number of samples, means over seeds, and two pictures."""
    what, prose = SIZES[scale], text.load("anarchism")
    rows_held = held_rows(prose.test, what)
    curves: list[dict[str, float]] = []
    sentence: dict[str, Any] = {}
    for seed in seeds:
        folder = out / f"seed{seed}"
        pretrain(what, SETTINGS, seed, folder, prose.train[:TRAIN], prose.test, progress)
        model, posterior = load(folder)
        assert posterior is not None
        curves.append(dict(scored(model, rows_held, posterior, COUNTS, progress)))
        sentence = sentence or uncertain(model, posterior, bytes(prose.test.numpy()))
    rows = []
    for key in ("mean", *map(str, COUNTS)):
        name = {"mean": "the mean", "1": "1 sample"}.get(key, f"{key} samples")
        nll = fmean(curve[key] for curve in curves)
        spread = math.exp(nll) * fmean(curve.get(f"{key} spread", 0.0) for curve in curves)
        row = {"method": name, "NLL": nll, "perplexity": math.exp(nll), "spread": spread}
        rows.append(row)
    draw(out / "language.png", rows)
    draw_sentence(out / "sentence.png", sentence)
    settings = {**asdict(what), **asdict(SETTINGS), "train": TRAIN}
    kept = {"settings": settings, "curves": curves, "sentence": sentence}
    return {"rows": rows, "data": prose.digest, **kept}


def uncertain(model: GPT, posterior: Samples, prose: bytes) -> dict[str, Any]:
    """A sentence of the held-out prose, and how unsure the averaged model is at each byte."""
    context = model.positions.num_embeddings
    longest = context - context // 4
    found = re.search(rb"(?<=\. )[A-Z][a-z ,]{%d,%d}\." % (longest // 2, longest - 2), prose)
    start, end = found.span() if found else (context // 4, context)
    row = torch.tensor(list(prose[max(end - context, 0) : end]))
    scores = perplexity(model, posterior, row[None], samples=max(COUNTS))
    shown = slice(len(row) - (end - start), None)
    columns = {
        "surprise": -scores.per_token,
        "entropy": scores.entropy,
        "mutual information": scores.mutual_information,
    }
    values = {name: column[0, shown].tolist() for name, column in columns.items()}
    return {"text": prose[start:end].decode("latin-1"), **values}


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Perplexity over the number of samples, and the mean's."""
    mean, *sampled = rows
    with picture(path) as panels:
        panel = panels[0]
        panel.axhline(mean["perplexity"], color="#444444", ls="--", label="at the mean")
        values, spread = ([row[k] for row in sampled] for k in ("perplexity", "spread"))
        panel.errorbar(COUNTS, values, spread, marker="o", capsize=3, label="averaged samples")
        label(panel, "Held-out essays", "posterior samples", "perplexity per byte")
        panel.set(xscale="log", xticks=COUNTS, xticklabels=COUNTS)
        panel.minorticks_off()
        panel.legend()


def draw_sentence(path: Path, sentence: dict[str, Any]) -> None:
    """Entropy before each byte, and the part of it that the samples disagree about."""
    letters = sentence["text"].replace(" ", "␣").replace("\n", "⏎")
    places = range(len(letters))
    tenfold = [10 * value for value in sentence["mutual information"]]
    with picture(path, size=(12, 3.2)) as panels:
        panel = panels[0]
        panel.bar(places, sentence["entropy"], 0.8, color=COLOURS[0], alpha=0.6, label="entropy")
        panel.bar(places, tenfold, 0.4, color=COLOURS[1], label="mutual information × 10")
        panel.plot(places, sentence["surprise"], "o", color="#222222", ms=3, label="surprise")
        label(panel, "How unsure of each byte, given those before it", "", "nats")
        panel.set_xticks(places, letters, fontsize=9, family="monospace")
        panel.set_xlim(-1, len(letters))
        panel.grid(visible=False, axis="x")
        panel.legend(ncols=3, fontsize=8)
