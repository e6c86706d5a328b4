"""Search settings on a validation split by successive halving, alike for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from joblib import parallel_config
from matplotlib.ticker import LogLocator
from sklearn.base import BaseEstimator
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import HalvingRandomSearchCV

from posterity_studies import compare, jobs, runs
from posterity_studies.recipes import Diverged, Recipe
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task
from posterity_studies.train import Progress, train

VALIDATION = 10_000  # training images held out
KEPT = ("nll", "accuracy", "ece", "brier")
FACTOR = 3  # a third of the trials goes on, for three times as long
FINALISTS = 3  # trials of each optimizer that are trained again
SEEDS = (0, 1, 2)  # with these seeds
WORST = 1e3  # nats: of a trial that diverged, for scikit-learn sorts finite scores

Trial = dict[str, Any]  # settings, epochs, number of seeds, mean validation metrics


@dataclass(frozen=True)
class LogUniform:
    """A range to draw from, to three digits."""

    low: float
    high: float

    def rvs(self, random_state: Any) -> float:
        """A value, as scikit-learn asks for it."""
        return float(f"{self.low * (self.high / self.low) ** random_state.uniform():.3g}")


class Run(BaseEstimator):
    """A run as scikit-learn trains one: ``given`` has settings, ``epochs``, and ``call``,
    which is what else :func:`validated` takes.
    """

    def __init__(self, **given: Any):
        self.given = given

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return dict(self.given)

    def set_params(self, **given: Any) -> Run:
        self.given = self.given | given
        return self

    def fit(self, images: Any, labels: Any = None) -> Run:
        """Train; the recipe knows its own images."""
        settings = dict(self.given)
        call, epochs = settings.pop("call"), settings.pop("epochs")
        self.loss = validated(*call, epochs=epochs, settings=settings)["nll"]
        return self

    def score(self, images: Any, labels: Any = None) -> float:
        return -min(self.loss, WORST)


def validated(
    recipe: Recipe,
    optimizer: str,
    out: Path,
    seed: int,
    epochs: int,
    settings: Mapping[str, float],
) -> dict[str, float]:
    """Metrics on the recipe's validation images; infinite where the training diverged.

    IVON is judged with posterior samples, as it will be used. What is finished is read.
    """
    given = replace(recipe.settings(optimizer), **settings)
    chosen = replace(recipe, epochs=epochs, optimizers={optimizer: given})
    folder = out / "-".join([optimizer, *(f"{k}={v:g}" for k, v in settings.items())])
    folder = folder.with_name(f"{folder.name}-epochs={epochs}-seed{seed}")
    try:
        evaluations = train(chosen, optimizer, seed, folder)["evaluations"]
    except Diverged:
        found = dict.fromkeys(KEPT, math.inf)
    else:
        found = evaluations.get("samples") or evaluations["mean"]
    print(f"{folder.name}: validation NLL {found['nll']:.4f}", flush=True)
    return {key: found[key] for key in KEPT}


def halved(
    recipe: Recipe, optimizer: str, n: int, first: int | None, engine: jobs.Engine, out: Path
) -> list[Trial]:
    """Each trial at its longest, best first: the longer ones, and then by NLL.

    Each round trains from the start, under a schedule of its own length: a trial that was merely
    cut short would favour small rates.
    """
    space = {key: LogUniform(*ends) for key, ends in recipe.search[optimizer].items()}
    call = (recipe, optimizer, out, SEEDS[0])
    shortest = min(first, recipe.epochs) if first else "exhaust"
    options: dict[str, Any] = {"n_candidates": n, "factor": FACTOR, "resource": "epochs"}
    options |= {"min_resources": shortest, "max_resources": recipe.epochs}
    options |= {"cv": [([0], [1])], "refit": False, "return_train_score": False}
    options |= {"error_score": "raise", "random_state": 0, "n_jobs": engine.at_a_time}
    run = Run(call=call, epochs=recipe.epochs, **dict.fromkeys(space, 1.0))
    search = HalvingRandomSearchCV(run, space, **options)
    with parallel_config("loky", inner_max_num_threads=engine.threads):
        search.fit([[0], [1]])
    longest: dict[tuple[float, ...], Trial] = {}
    columns = ("params", "n_resources", "mean_test_score")
    for given, epochs, score in zip(*(search.cv_results_[c] for c in columns), strict=True):
        settings = {key: given[key] for key in space}
        trial = {"settings": settings, "epochs": int(epochs), "seeds": 1}
        longest[tuple(settings.values())] = trial | {"validation": {"nll": -float(score)}}
    return sorted(longest.values(), key=lambda t: (-t["epochs"], _nll(t)))


def tune(
    recipe: Recipe,
    n: int,
    engine: jobs.Engine,
    out: Path,
    progress: Progress,
    first: int | None = None,
) -> dict[str, Any]:
    """``n`` trials of every optimizer, as many epochs for each; the lowest NLL is best.

    The best :data:`FINALISTS` are then trained in full with more seeds, and the lowest mean NLL
    wins: one seed alone would choose by luck. Finished runs are not run again.

    Args:
        recipe: what is trained, and where to search.
        n: trials of each optimizer, drawn from its search space.
        engine: how many run at a time.
        out: folder of the runs.
        progress: of the finalists.
        first: epochs of the first round, by default so few that the last has three trials at most;
            with the recipe's own number there is but one round.

    Returns:
        Facts and provenance of the search, and optimizer → {"best", "trials"}: trials with
        settings, epochs, number of seeds and mean validation metrics; finalists first.
    """
    recipe = replace(recipe, validation=recipe.validation or VALIDATION)
    ranked = {o: halved(recipe, o, n, first, engine, out) for o in recipe.search}
    finals = [(o, t) for o, trials in ranked.items() for t in trials[:FINALISTS]]
    calls = [
        (recipe, o, out, seed, recipe.epochs, t["settings"]) for o, t in finals for seed in SEEDS
    ]
    with jobs.on(engine):
        found = jobs.each(validated, calls, progress, "finalists")
    best: dict[str, list[Trial]] = {o: [] for o in ranked}
    for k, (o, t) in enumerate(finals):
        each = found[k * len(SEEDS) : (k + 1) * len(SEEDS)]
        mean = {key: fmean(metrics[key] for metrics in each) for key in KEPT}
        trained = {"epochs": recipe.epochs, "seeds": len(SEEDS), "validation": mean}
        best[o].append({"settings": t["settings"], **trained})
    facts = {"recipe": recipe.name, "epochs": recipe.epochs, "validation": recipe.validation}
    for o, trials in ranked.items():
        table = sorted(best[o], key=_nll) + trials[FINALISTS:]
        facts[o] = {"best": table[0]["settings"], "trials": table}
    return facts | {"provenance": runs.provenance(0, load_task(recipe).digest)}


def _nll(trial: Trial) -> float:
    return trial["validation"]["nll"]


def draw(path: Path, found: dict[str, Any]) -> None:
    """NLL of every trial by its lr and, of IVON, by the noise it starts with.

    Finalists are filled; the shorter a trial was trained, the smaller.
    """
    tables = {o: found[o]["trials"] for o in compare.LABELS if o in found}
    panels = [(o, "lr", "lr") for o in tables]
    if "ivon" in tables:
        panels.append(("ivon", "noise", "√N σ at the start, √(temperature/hess_init)"))
    with picture(path, len(panels), (3.4, 3.2)) as drawn:
        for panel, (optimizer, key, name) in zip(drawn, panels, strict=True):
            for trial in tables[optimizer]:
                given = trial["settings"]
                if key == "noise":
                    given = {key: (given.get("temperature", 1) / given["hess_init"]) ** 0.5}
                fill = "C0" if trial["seeds"] > 1 else "none"
                size = 3 + 3 * trial.get("epochs", found["epochs"]) / found["epochs"]
                panel.plot(given[key], _nll(trial), "o", mfc=fill, mec="C0", ms=size)
            label(
                panel, compare.LABELS[optimizer], name, "validation NLL, nats" * (panel is drawn[0])
            )
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
        finite = [_nll(t) for table in tables.values() for t in table if _nll(t) < WORST]
        for panel in drawn:
            panel.set_ylim(min(finite) - 0.005, min(max(finite), 2 * min(finite)) + 0.005)
