"""Finetuning with AdamW and with IVON: accuracy and calibration (section 4.3).

MiniLM in full on each of four domains of sentiment, and SmolLM2-135M by low-rank adapters on film
reviews, as a language model that names the sentiment; at the paper's scale RoBERTa and DeBERTa on
GLUE, whose settings the paper's text does not tell. Both optimizers have as many trials, judged by
NLL on held-out sentences of the first domain, IVON's averaged over posterior samples. Trials have
seed 0, whose held-out sentences other seeds may train on or test with: so it is for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from posterity_studies import jobs
from posterity_studies.data import packages
from posterity_studies.finetune import MEASURES, run
from posterity_studies.settings import FinetuneAdamw, FinetuneIvon, Settings
from posterity_studies.studies.pictures import label, picture
from posterity_studies.subjects import TINY, MiniLM, Pretrained, SmolLM2, Subject
from posterity_studies.train import Progress

SAMPLES = 16
Trials = Mapping[str, Sequence[Settings]]  # of each optimizer, as many of both
Job = tuple[str, int, Settings, str, int]  # optimizer, number of the settings, these, domain, seed
ENCODERS: Trials = {
    "adamw": [FinetuneAdamw(lr) for lr in (5e-5, 1e-4, 2e-4, 4e-4)],
    "ivon": [
        FinetuneIvon(lr, ess) for lr, ess in ((0.03, 1e7), (0.03, 1e6), (0.03, 3e6), (0.06, 3e6))
    ],
}
ADAPTERS: Trials = {
    "adamw": [FinetuneAdamw(lr, 0.0) for lr in (2e-4, 1e-3)],
    "ivon": [FinetuneIvon(lr, weight_decay=0.0) for lr in (0.3, 1.0)],
}
LARGE: Trials = {
    "adamw": [FinetuneAdamw(lr) for lr in (5e-6, 1e-5, 2e-5, 3e-5)],
    "ivon": [
        FinetuneIvon(lr, ess) for lr, ess in ((0.01, 1e7), (0.03, 1e7), (0.01, 1e8), (0.03, 1e8))
    ],
}
MODELS, EPOCHS = ("FacebookAI/roberta-large", "microsoft/deberta-v3-large"), 3
GLUE = ("rte", "mrpc", "cola", "sst2", "qnli", "qqp", "mnli")


def subjects(scale: str) -> list[tuple[Subject, Trials]]:
    """What is finetuned, and with which settings it is tried."""
    if scale == "smoke":
        first = {optimizer: tried[:1] for optimizer, tried in ENCODERS.items()}
        return [(replace(TINY, domains=TINY.domains[:1]), first)]
    if scale == "paper":
        return [(Pretrained(model=m, domains=GLUE, epochs=EPOCHS), LARGE) for m in MODELS]
    return [(MiniLM(domains=tuple(packages.DOMAINS)), ENCODERS), (SmolLM2(), ADAPTERS)]


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each model, domain and way to predict: means over seeds."""
    samples = 2 if scale == "smoke" else SAMPLES
    rows, tried, found = [], {}, {}
    for subject, trials in subjects(scale):
        folder = out / subject.name

        def calls_of(
            work: Sequence[Job], folder: Path = folder, subject: Subject = subject
        ) -> list[Any]:
            return [
                (subject, d, s, seed, folder / f"{o}-{k}-{d}-seed{seed}", samples, False)
                for o, k, s, d, seed in work
            ]

        work = [
            (o, k, settings, subject.domains[0], 0)
            for o, every in trials.items()
            for k, settings in enumerate(every)
        ]
        calls = calls_of(work)
        attempt = partial(jobs.unless_diverged, run)
        results = jobs.each(attempt, calls, progress, "trials", [c[4] for c in calls], bars=True)
        chosen = {}
        for optimizer in trials:
            mine = [
                (_loss(r), w, r) for w, r in zip(work, results, strict=True) if w[0] == optimizer
            ]
            ranked = sorted(mine, key=lambda trial: trial[0])
            chosen[optimizer] = ranked[0][1]
            tried[f"{subject.name}, {optimizer}"] = [
                {"settings": asdict(w[2]), "scores": r and r["validation"]} for _, w, r in ranked
            ]
        work = [
            (*best[:3], domain, seed)
            for seed in seeds
            for domain in subject.domains
            for best in chosen.values()
        ]
        calls = calls_of(work)
        results = jobs.each(run, calls, progress, "runs", [c[4] for c in calls], bars=True)
        for (optimizer, _, _, domain, _), result in zip(work, results, strict=True):
            for way, each in result["test"].items():
                found.setdefault((subject.name, domain, f"{optimizer}, {way}"), []).append(each)
    for (model, domain, method), each in found.items():
        row: dict[str, Any] = {"method": method, "model": model, "domain": domain}
        for measure in MEASURES:
            values = [e[measure] for e in each]
            row[measure] = fmean(values)
            row[f"{measure} s.d."] = stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    draw(out / "finetuning.png", rows)
    read = " ".join(packages.PACKAGES[name].sha256 for name in ("minilm", "smollm2", "sentiment"))
    return {
        "rows": rows,
        "data": "GLUE, as the hub has it" if scale == "paper" else read,
        "trials": tried,
    }


def _loss(result: Mapping[str, Any] | None) -> float:
    """The NLL to choose by, of the way to predict that is reported; infinite where it diverged."""
    if result is None:
        return math.inf
    scores = result["validation"]
    return scores.get("averaged", scores["the mean"])["nll"]


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A measure a panel, a dot for each way to predict."""
    places = list(dict.fromkeys(f"{row['model']}, {row['domain']}" for row in rows))[::-1]
    with picture(path, len(MEASURES), (3.8, 3.2)) as panels:
        for panel, measure in zip(panels, MEASURES, strict=True):
            for k, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
                mine = [row for row in rows if row["method"] == method]
                at = [places.index(f"{row['model']}, {row['domain']}") for row in mine]
                panel.plot([row[measure] for row in mine], at, "osD"[k], label=method)
            panel.set_yticks(range(len(places)), places if panel is panels[0] else [])
            label(panel, measure.upper() if measure != "accuracy" else measure, measure, "")
        panels[0].legend(fontsize=8)
