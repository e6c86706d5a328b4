"""Is IVON good untouched? Its defaults for a kind of task beside AdamW, tuned on each.

AdamW has the settings that the studies' searches found: of `fashion-mnist` and `cifar10-resnet20`
(their recipes), of each table (`tabular`'s trials), of a language model (four rates, the rest from
`pretraining`) and of MiniLM on film reviews (`finetuning`'s). IVON has those of
``IVON.defaults_for``, which were found on these tasks or smaller ones, but are one set for a kind
of task. Its predictions are averaged over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from posterity_studies import finetune, jobs, train
from posterity_studies.data import packages
from posterity_studies.models.gpt import GPTConfig
from posterity_studies.pretrain import Pretraining
from posterity_studies.recipes import recipe
from posterity_studies.settings import FinetuneAdamw, LanguageAdamw, Settings, Untouched
from posterity_studies.studies import pretraining, tabular
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.subjects import TINY, MiniLM
from posterity_studies.train import Progress

SAMPLES = 16
Judge = Callable[..., float]  # folder, optimizer, settings, seed, smoke → NLL
# name, folder, seed, smoke, progress → the best of some trials, and its run where it is a whole one
Search = Callable[..., tuple[Settings, Path | None]]
LABELS = {"adamw": "AdamW, tuned", "ivon": "IVON, untouched"}
TEXT = pretraining.Scale(
    Pretraining(
        GPTConfig(6, 6, 384, 128, vocabulary=256), steps=1500, batch=12, micro=12, bf16=True
    ),
    {"adamw": [LanguageAdamw(lr, beta1=0.8) for lr in (1e-3, 1.7e-3, 6e-4, 4e-4)]},
    test=512,
)


def images(
    name: str, folder: Path, optimizer: str, settings: Settings, seed: int, smoke: bool
) -> float:
    """Of a recipe, on its test images."""
    chosen = recipe("smoke" if smoke else name)
    if smoke:
        chosen = replace(chosen, epochs=1, train_limit=200)
    chosen = replace(chosen, optimizers={optimizer: settings})
    found = train.train(chosen, optimizer, seed, folder)["evaluations"]
    return found.get("samples", found["mean"])["nll"]


def table(
    name: str, folder: Path, optimizer: str, settings: Settings, seed: int, smoke: bool
) -> float:
    """Of a split's tenth, in the target's units: of five runs, on average."""
    epochs = 1 if smoke else tabular.EPOCHS
    path = folder.with_suffix(".json")
    scores = tabular.judged(path, name, optimizer, settings, seed, epochs)
    return scores[tabular.TITLES[optimizer][0]]["NLL"]


def tuned_table(
    name: str, folder: Path, seed: int, smoke: bool, progress: Progress
) -> tuple[Settings, None]:
    """AdamW's best of `tabular`'s trials on a table's validation rows."""
    trials = tabular.TRIALS["adamw"][: 1 if smoke else None]
    epochs = 1 if smoke else tabular.EPOCHS
    paths = [folder / f"{name}-adamw-{k}.json" for k in range(len(trials))]
    pairs = zip(paths, trials, strict=True)
    losses = [tabular.tried_on(path, name, settings, epochs) for path, settings in pairs]
    return trials[losses.index(min(losses))], None


def text(
    name: str, folder: Path, optimizer: str, settings: Settings, seed: int, smoke: bool
) -> float:
    """A token's, on the half of the held-out text that no setting was chosen by."""
    size = _text(smoke)
    how = None, 1, size.test, pretraining.COUNTS, size.thin
    scores = pretraining.trained(folder, size.what, settings, seed, *how)[1]
    return scores.get(str(max(pretraining.COUNTS)), scores["mean"])


def tuned_text(
    name: str, folder: Path, seed: int, smoke: bool, progress: Progress
) -> tuple[Settings, Path]:
    """AdamW's best trial on the half to choose by, a run that is scored on the other."""
    best = pretraining.search(folder, _text(smoke), None, seed, progress)["adamw"]
    return best.settings, pretraining.run_folder(folder, "adamw", best.number, seed)


def _text(smoke: bool) -> pretraining.Scale:
    small = pretraining.SCALES["smoke"]
    return replace(small, trials={"adamw": small.trials["adamw"]}) if smoke else TEXT


def sentences(
    name: str, folder: Path, optimizer: str, settings: Settings, seed: int, smoke: bool
) -> float:
    """Of MiniLM, finetuned on a domain."""
    subject, samples = (TINY, 2) if smoke else (MiniLM(domains=tuple(packages.DOMAINS)), SAMPLES)
    found = finetune.run(subject, name, settings, seed, folder, samples, keep=False)["test"]
    return found.get("averaged", found["the mean"])["nll"]


@dataclass(frozen=True)
class Task:
    """What is trained, AdamW's tuned settings, and the kind of task that IVON is told."""

    title: str
    judge: Judge
    name: str
    kind: str
    adamw: Settings | Search
    short: bool = True  # a run takes less than ten minutes: all seeds, else the first
    smoke: bool = True


TASKS = (
    Task(
        "Fashion-MNIST, small CNN",
        images,
        "fashion-mnist",
        "plain",
        recipe("fashion-mnist").optimizers["adamw"],
    ),
    *(
        Task(
            f"{name}, one hidden layer", table, name, "tabular", tuned_table, smoke=name == "boston"
        )
        for name in ("boston", "concrete", "auto", "diamonds")
    ),
    Task(
        "a GPT of 10.8M weights on 43 MB of text",
        text,
        "gpt",
        "language_pairs",
        tuned_text,
        short=False,
    ),
    Task("MiniLM on film reviews", sentences, "movies", "finetuning", FinetuneAdamw(5e-5)),
    Task(
        "CIFAR-10, ResNet-20, 20 epochs",
        images,
        "cifar10-resnet20",
        "vision",
        recipe("cifar10-resnet20").optimizers["adamw"],
        short=False,
        smoke=False,
    ),
)


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each task: NLL of both, and IVON's less AdamW's with its standard error."""
    smoke = scale == "smoke"
    tasks = [t for t in TASKS if t.smoke] if smoke else TASKS
    how = out / "trials", seeds[0], smoke, progress
    work: list[tuple[Task, str, Settings, int, Path]] = []
    for task in tasks:
        adamw = task.adamw(task.name, *how) if callable(task.adamw) else (task.adamw, None)
        for seed in seeds if task.short else seeds[:1]:
            for optimizer, (settings, run) in {
                "adamw": adamw,
                "ivon": (Untouched(task.kind), None),
            }.items():
                folder = run if run and seed == seeds[0] else _folder(out, task, optimizer, seed)
                work.append((task, optimizer, settings, seed, folder))
    calls = [
        (task.judge, task.name, folder, optimizer, settings, seed)
        for task, optimizer, settings, seed, folder in work
    ]
    calls = [(*call, smoke) for call in calls]
    losses = jobs.each(_judged, calls, progress, "runs", [call[2] for call in calls])
    found: dict[str, dict[str, list[float]]] = {}
    for (task, optimizer, *_), loss in zip(work, losses, strict=True):
        found.setdefault(task.title, {}).setdefault(optimizer, []).append(loss)
    draw(out / "defaults.png", found)
    rows = [_row(title, each) for title, each in found.items()]
    return {"rows": rows, "data": "those of the tasks' own studies", "each": found}


def _judged(judge: Judge, *call: Any) -> float:
    return judge(*call)


def _folder(out: Path, task: Task, optimizer: str, seed: int) -> Path:
    return out / f"{task.name}-{optimizer}-seed{seed}"


def _row(title: str, each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    means = {LABELS[o]: fmean(losses) for o, losses in each.items()}
    gap = difference(each["adamw"], each["ivon"])
    return {"method": title, **means, **gap, "seeds": len(each["ivon"])}


def difference(adamw: Sequence[float], ivon: Sequence[float]) -> dict[str, Any]:
    """IVON's loss less AdamW's with the same seeds, and its standard error, of one seed none."""
    gaps = [i - a for a, i in zip(adamw, ivon, strict=True)]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else ""
    return {"IVON's less AdamW's": fmean(gaps), "s.e.": error}


def draw(path: Path, found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """IVON's loss less AdamW's, a dot for each seed, in hundredths of AdamW's mean size."""
    with picture(path, 1, (6.4, 3.6)) as (panel,):
        titles = [*found][::-1]
        for k, title in enumerate(titles):
            each = found[title]
            size = abs(fmean(each["adamw"])) / 100
            gaps = [(i - a) / size for a, i in zip(each["adamw"], each["ivon"], strict=True)]
            panel.plot(gaps, [k] * len(gaps), "o", color=COLOURS[0], alpha=0.5)
            panel.plot(fmean(gaps), k, "D", color=COLOURS[1])
        panel.axvline(0, color="#444444", lw=1)
        panel.set_yticks(range(len(titles)), titles)
        label(panel, "Left of the line untouched IVON is better", "difference in NLL, %", "")
