"""Does AdamW's rate carry over? MiniLM, finetuned at several rates with AdamW and with IVON.

IVON is ``IVON.from_adamw`` of that AdamW, and nothing else is set; its predictions are averaged
over samples. On film reviews, NLL on the sentences to test with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from posterity_studies import finetune, jobs
from posterity_studies.data import packages
from posterity_studies.settings import FinetuneAdamw, FromAdamw
from posterity_studies.studies.defaults import difference
from posterity_studies.studies.pictures import label, picture
from posterity_studies.subjects import TINY, MiniLM
from posterity_studies.train import Progress

RATES = (1e-5, 3e-5, 1e-4, 3e-4)
SETTINGS = {"AdamW": FinetuneAdamw, "IVON at its rate": FromAdamw}
DOMAIN, SAMPLES = "movies", 16
Losses = Mapping[float, Mapping[str, Sequence[float]]]  # rate → method → one of each seed


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each rate: NLL of both, and IVON's less AdamW's with its standard error."""
    smoke = scale == "smoke"
    rates = RATES[1:2] if smoke else RATES
    subject, samples = (TINY, 2) if smoke else (MiniLM(), SAMPLES)
    work = [(rate, method, seed) for rate in rates for method in SETTINGS for seed in seeds]
    calls = [
        (subject, DOMAIN, SETTINGS[m](rate), seed, out / f"{m}-{rate:g}-seed{seed}", samples, False)
        for rate, m, seed in work
    ]
    results = jobs.each(finetune.run, calls, progress, "runs", [c[4] for c in calls], bars=True)
    found: dict[float, dict[str, list[float]]] = {rate: {m: [] for m in SETTINGS} for rate in rates}
    for (rate, method, _), result in zip(work, results, strict=True):
        scores = result["test"]
        found[rate][method].append(scores.get("averaged", scores["the mean"])["nll"])
    draw(out / "rates.png", found)
    digest = " ".join(packages.PACKAGES[name].sha256 for name in ("minilm", "sentiment"))
    return {"rows": [_row(*each) for each in found.items()], "data": digest, "each": found}


def _row(rate: float, each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    means = {method: fmean(losses) for method, losses in each.items()}
    return {"rate": rate, **means, **difference(*each.values())}


def draw(path: Path, found: Losses) -> None:
    """NLL by rate: a dot for each seed, a line through the means."""
    with picture(path, 1, (4.8, 3.4)) as (panel,):
        for k, method in enumerate(SETTINGS):
            means = [fmean(each[method]) for each in found.values()]
            panel.plot([*found], means, "-", color=f"C{k}", label=method)
            for rate, each in found.items():
                panel.plot([rate] * len(each[method]), each[method], "o", color=f"C{k}", alpha=0.6)
        panel.set_xscale("log")
        label(panel, "MiniLM on film reviews", "AdamW's rate", "test NLL, nats")
        panel.legend()
