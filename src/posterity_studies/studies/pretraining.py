"""A language model from scratch: IVON and AdamW on the same tokens (figures 1 and 2).

A GPT over bytes, on 43 MB of essays and a dictionary. Both optimizers have as many short trials,
judged on one part of the held-out text, IVON's as it will be used: averaged over samples. The best
is trained in full with every seed and scored on the other part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from posterity_studies import runs
from posterity_studies.data import text, tokens
from posterity_studies.models.gpt import GPTConfig
from posterity_studies.pretrain import RECIPES, Pretraining, held_rows, load, pretrain, scored
from posterity_studies.recipes import UserError
from posterity_studies.settings import LanguageAdamw, LanguageIvon, Settings
from posterity_studies.studies.pictures import label, picture
from posterity_studies.train import Progress

TEXTS = ("anarchism", "dictionary")
COUNTS = (1, 8, 32)  # posterior samples
LABELS = {"adamw": "AdamW", "ivon": "IVON"}
TRIALS: dict[str, list[Settings]] = {  # as many of each
    "adamw": [
        LanguageAdamw(lr=lr, beta2=b) for b in (0.95, 0.99) for lr in (1e-3, 2e-3, 3e-3, 5e-3)
    ],
    "ivon": [
        LanguageIvon(lr=lr, ess=ess, memory=memory)
        for lr, ess, memory in (
            *((1000, 1e10, 2e3), (1500, 1e10, 2e3), (1000, 1e10, 5e2), (1500, 1e10, 5e2)),
            *((1000, 1e9, 2e3), (1000, 1e9, 5e2), (1000, 3e9, 1e3), (1500, 3e9, 1e3)),
        )
    ],
}


Corpus = tuple[Tensor, tuple[Tensor, Tensor], str]


@dataclass(frozen=True)
class Scale:
    """What is trained in full, how long a trial is, and how many there are."""

    full: Pretraining
    trial_steps: int
    trials: int = 8
    test: int = 256  # sequences that the results are scored on


SCALES = {
    "desk": Scale(Pretraining(GPTConfig(4, 4, 256, 128, vocabulary=256), steps=1500), 400),
    "smoke": Scale(
        Pretraining(GPTConfig(1, 2, 16, 32, vocabulary=256), steps=4, batch=2, every=2, held=2),
        *(2, 2, 4),
    ),
}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Held-out loss of each optimizer at its best settings; nats a byte, means over seeds."""
    if scale == "paper":
        size, chosen, (train, held, digest) = published(out, progress)
    else:
        size = SCALES[scale]
        train, held, digest = corpus()
        chosen = {o: search(out / "trials", o, size, train, held, progress) for o in TRIALS}
    found: dict[str, list[dict[str, Any]]] = {}
    for optimizer, (settings, _) in chosen.items():
        for seed in seeds:
            folder = out / f"{optimizer}-seed{seed}"
            run = pretrain(size.full, settings, seed, folder, train, held[0], progress)
            scores = tested(folder, size, held[1], progress)
            found.setdefault(optimizer, []).append({**run, "scores": scores})
    rows = [row for optimizer in found for row in table(LABELS[optimizer], found[optimizer])]
    draw(out / "pretraining.png", found)
    return {
        "rows": rows,
        "data": digest,
        "trials": {o: tried for o, (_, tried) in chosen.items()},
        "settings": {o: asdict(settings) for o, (settings, _) in chosen.items()},
        "size": asdict(size),
        "runs": found,
    }


def published(
    out: Path, progress: Progress
) -> tuple[Scale, dict[str, tuple[Settings, list[dict[str, Any]]]], Corpus]:
    """GPT-2 (124M) on OpenWebText with the paper's settings, which need no trials."""
    what, settings = RECIPES["gpt2"]
    facts = tokens.prepare("Skylion007/openwebtext", out / "tokens", progress)
    read = tokens.load(out / "tokens")
    first, second = read["held"].tensor_split(2)
    chosen: dict[str, tuple[Settings, list[dict[str, Any]]]] = {
        o: (s, []) for o, s in settings.items()
    }
    digest = f"{facts['corpus']}, {facts['documents']} documents"
    return Scale(what, what.steps), chosen, (read["train"], (first, second), digest)


def corpus() -> Corpus:
    """Bytes to train on, to choose by and to test with, and a digest."""
    texts = [text.load(name) for name in TEXTS]
    halves = [t.test.tensor_split(2) for t in texts]
    first, second = (torch.cat(half) for half in zip(*halves, strict=True))
    return (
        torch.cat([t.train for t in texts]),
        (first, second),
        " ".join(str(t.digest) for t in texts),
    )


def search(
    out: Path,
    optimizer: str,
    size: Scale,
    train: Tensor,
    held: tuple[Tensor, Tensor],
    progress: Progress,
) -> tuple[Settings, list[dict[str, Any]]]:
    """The trial of the lowest loss, and all of them, best first."""
    short = replace(size.full, steps=size.trial_steps, every=size.trial_steps)
    tried = []
    for number, settings in enumerate(TRIALS[optimizer][: size.trials]):
        folder = out / f"{optimizer}-{number}"
        try:
            pretrain(short, settings, 0, folder, train, held[0], progress)
            scores = tested(folder, size, held[0], progress)
            loss = scores.get(str(max(COUNTS)), scores["mean"])
        except UserError as error:
            if "diverged" not in str(error):
                raise
            scores, loss = {}, float("inf")
        tried.append((loss, number, settings, scores))
    tried.sort(key=lambda t: t[:2])
    table = [{"settings": asdict(s), "loss": loss, **scores} for loss, _, s, scores in tried]
    return tried[0][2], table


def tested(folder: Path, size: Scale, held: Tensor, progress: Progress) -> Mapping[str, float]:
    """Losses of a finished run, at the mean and averaged over samples; kept in a file."""
    kept = folder / "scores.json"
    if kept.exists():
        return runs.read_json(kept)
    model, posterior = load(folder)
    rows = held_rows(held, replace(size.full, held=size.test))
    found = scored(model, rows, posterior, COUNTS, progress)
    runs.write_json(kept, dict(found))
    return found


def table(name: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row at the mean, and one for each number of samples."""
    seconds = fmean(run["seconds_per_step"] for run in found)
    rows = []
    for key in ("mean", *map(str, COUNTS)):
        losses = [run["scores"][key] for run in found if key in run["scores"]]
        if losses:
            method = name if key == "mean" else f"{name}, {key} sample{'s' * (key != '1')}"
            spread = stdev(losses) if len(losses) > 1 else 0.0
            row = {"method": method, "loss": fmean(losses), "s.d.": spread}
            rows.append(row | {"seconds a step": seconds})
    return rows


def draw(path: Path, found: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Held-out loss over steps, and what averaging samples makes of it."""
    with picture(path, 2) as panels:
        for optimizer, every in found.items():
            steps = every[0]["curve"]["step"]
            curves = torch.tensor([run["curve"]["held"] for run in every])
            panels[0].plot(steps, curves.mean(0).tolist(), label=LABELS[optimizer])
            at_mean = fmean(run["scores"]["mean"] for run in every)
            if str(COUNTS[0]) in every[0]["scores"]:
                values = [fmean(run["scores"][str(c)] for run in every) for c in COUNTS]
                panels[1].plot(COUNTS, values, "o-", label=f"{LABELS[optimizer]}, averaged")
            style = {"color": "#444444", "ls": "--" if optimizer == "ivon" else ":"}
            panels[1].axhline(at_mean, label=LABELS[optimizer], **style)
        label(panels[0], "While training", "step", "held-out loss, nats a byte")
        label(panels[1], "In the end, on other text", "posterior samples", "loss, nats a byte")
        panels[1].set_xscale("log", base=2)
        for panel in panels:
            panel.legend(fontsize=8)
