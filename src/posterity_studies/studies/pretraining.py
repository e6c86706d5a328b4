"""A language model from scratch: IVON and AdamW on the same tokens (figures 1 and 2).

IVON twice: as the paper has it, and with h from a pair of samples at every tenth step.

A GPT over bytes, on 43 MB of essays and a dictionary, autocast to bf16. All three have as
many trials, as long as the runs (what is best after a quarter of the steps is not best in the end),
with the first seed, judged on one half of the held-out text, IVON's as it will be used: averaged
over samples. The best is trained with every seed and scored on the other half.

All are scored on news too, which none was trained on: the posterior at the temperature that is best
on half of it, with the first seed, and the mean with its logits divided by what is best there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from posterity_studies import jobs, runs
from posterity_studies.data import text, tokens
from posterity_studies.models.gpt import GPTConfig
from posterity_studies.pretrain import RECIPES, Pretraining, held_rows, load, pretrain, scored
from posterity_studies.settings import LanguageAdamw, LanguageIvon, PairedIvon, Settings
from posterity_studies.studies.pictures import label, picture
from posterity_studies.train import Progress, silent

TEXTS = ("anarchism", "dictionary")
NEWS = ("news",)
COUNTS, TRIED = (1, 8, 32), (8,)  # posterior samples: of results and of trials
TEMPERATURES = (1.0, 10.0, 30.0, 100.0, 300.0)  # t: λ/t in place of λ
DIVISORS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3)  # of logits
LABELS = {"adamw": "AdamW", "ivon": "IVON", "pairs": "IVON in pairs"}
STYLES = {"adamw": ":", "ivon": "--", "pairs": "-."}
Trials = Mapping[str, Sequence[Settings]]  # as many of each optimizer


def trials(
    adamw: Sequence[tuple[float, ...]],
    ivon: Sequence[tuple[float, ...]],
    pairs: Sequence[tuple[Any, ...]],
) -> Trials:
    """AdamW with each lr, β2 and β1, and IVON with each lr, λ, memory, β1 and clip.

    Noise alone holds h at λg²/(2·memory), g² the gradients' mean square (docs/hessian.md), and the
    larger a tensor's gradients the shorter are its unclipped steps: with λ/memory of several
    millions the first layer's attention and the positions hardly learn, with one or less most steps
    are as long as the clip allows.
    """
    of_adamw, of_ivon = ("lr", "beta2", "beta1"), ("lr", "ess", "memory", "beta1", "clip_radius")
    return {  # what is left out has its default
        "adamw": [LanguageAdamw(**dict(zip(of_adamw, each, strict=False))) for each in adamw],
        "ivon": [LanguageIvon(**dict(zip(of_ivon, each, strict=False))) for each in ivon],
        "pairs": [PairedIvon(**dict(zip(of_ivon, each, strict=False))) for each in pairs],
    }


Scores = Mapping[str, float]
Source = Path | tuple[str, ...]  # a folder of tokens, or names of texts


class Chosen(NamedTuple):
    """The best trial's number and settings, and all trials."""

    number: int
    settings: Settings
    trials: list[dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """What is trained, the trials, and on how many sequences all is scored.

    ``corpus`` is what ``tokens.prepare`` takes, for GPT-2's tokens; None for bytes of TEXTS, of
    which every ``thin``-th block is trained on.
    """

    what: Pretraining
    trials: Trials
    test: int = 1024
    corpus: str | None = None
    thin: int = 1


DESK = Pretraining(GPTConfig(4, 4, 256, 128, vocabulary=256), steps=1500, bf16=True)
# Half the text, two bytes for each weight, seen six times: there the weights' noise can pay.
LIMITED = Pretraining(
    GPTConfig(6, 6, 384, 256, vocabulary=256),
    steps=8000,
    batch=64,
    micro=64,
    warmup=500,
    bf16=True,
    compiled=True,
)
SCALES = {
    "desk": Scale(
        DESK,
        trials(
            ((2e-3, 0.95), (2.5e-3, 0.95), (2.5e-3, 0.99), (2.5e-3, 0.95, 0.8)),
            (
                *((500.0, 3e8, 300.0), (500.0, 3e8, 300.0, 0.85)),
                *((700.0, 3e8, 300.0, 0.8), (400.0, 3e8, 300.0, 0.8, 1.5e-3)),
            ),
            (
                *((10.0, 1e9, 300.0, 0.8, 0.3), (14.0, 1e9, 300.0, 0.8, 0.3)),
                *((20.0, 1e9, 300.0, 0.8, 0.3), (20.0, 3e8, 300.0, 0.8, 0.3)),
            ),
        ),
    ),
    "gpu": Scale(
        LIMITED,
        {
            "adamw": [
                LanguageAdamw(lr, weight_decay=decay)
                for lr, decay in ((2e-3, 0.1), (2e-3, 0.5), (4e-3, 0.5))
            ],
            "ivon": [
                LanguageIvon(700.0, ess, memory=LIMITED.steps / 5, weight_decay=decay, beta1=0.8)
                for ess, decay in ((1e8, 1e-6), (1e8, 2e-5), (2e5 * LIMITED.steps, 2e-5))
            ],
            "pairs": [  # at every step: a graph replays one kind of step
                PairedIvon(10.0, ess, 1e-3, 300.0, decay, 0.3, beta1=0.8, every=1)
                for ess, decay in ((1e9, 1e-6), (1e8, 1e-6), (1e9, 1e-5))
            ],
        },
        thin=2,
    ),
    "smoke": Scale(
        Pretraining(GPTConfig(1, 2, 16, 32, vocabulary=256), steps=4, batch=2, every=2, held=2),
        trials(
            ((3e-3, 0.95), (3e-3, 0.99)),
            ((1e3, 1e10, 2e3), (1e3, 1e9, 5e2)),
            ((7.0, 1e9, 20.0, 0.8, 0.3), (7.0, 1e8, 20.0, 0.8, 0.3)),
        ),
        test=4,
        thin=2,
    ),
}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Held-out loss of each optimizer at its best settings; nats a token, means over seeds."""
    if scale == "paper":  # its settings need no trials
        what, settings = RECIPES["gpt2"]
        size = Scale(what, {o: [s] for o, s in settings.items()}, corpus="Skylion007/openwebtext")
    else:
        size = SCALES[scale]
    place, digest = None, ""
    if size.corpus is None:
        digest = " ".join(str(text.load(name).digest) for name in (*TEXTS, *NEWS))
    else:
        place = out / "tokens"
        facts = tokens.prepare(size.corpus, place, progress)
        digest = f"{facts['corpus']}, {facts['documents']} documents"
    chosen = search(out, size, place, seeds[0], progress)
    work = [(o, seed) for seed in seeds for o in chosen]
    how = place, 1, size.test, COUNTS, size.thin
    calls = [
        (run_folder(out, o, chosen[o].number, seed), size.what, chosen[o].settings, seed, *how)
        for o, seed in work
    ]
    results = jobs.each(trained, calls, progress, "runs", [c[0] for c in calls], bars=True)
    made = [{**run, "scores": scores} for run, scores in results]
    found = {o: made[k :: len(chosen)] for k, o in enumerate(chosen)}
    news = on_news(out, size, chosen, seeds, progress) if place is None else {}
    rows = [row for o in found for row in table(LABELS[o], found[o], news.get("runs", {}).get(o))]
    draw(out / "pretraining.png", found, news.get("temperatures", {}))
    return {
        "rows": rows,
        "data": digest,
        "trials": {o: best.trials for o, best in chosen.items()},
        "settings": {o: asdict(best.settings) for o, best in chosen.items()},
        "size": {"test": size.test, "thin": size.thin, **asdict(size.what)},
        "runs": found,
        "news": news,
    }


def learnt(thin: int = 1) -> Tensor:
    """Every ``thin``-th block of the study's own texts to train on."""
    blocks = (text.load(name).train.split(text.BLOCK)[::thin] for name in TEXTS)
    return torch.cat([block for each in blocks for block in each])


def halves(source: Source) -> Sequence[Tensor]:
    """Held-out text to choose by, and to test with."""
    if isinstance(source, Path):
        return tokens.load(source)["held"].tensor_split(2)
    both = (text.load(name).test.tensor_split(2) for name in source)
    return [torch.cat(half) for half in zip(*both, strict=True)]


def search(
    out: Path, size: Scale, place: Path | None, seed: int, progress: Progress
) -> dict[str, Chosen]:
    """Of each optimizer the trial of the lowest loss, and all of them, best first."""
    if all(len(every) == 1 for every in size.trials.values()):
        return {o: Chosen(0, only, []) for o, (only,) in size.trials.items()}
    work = [(o, k, s) for o, every in size.trials.items() for k, s in enumerate(every)]
    calls = [
        (run_folder(out, o, k, seed), size.what, s, seed, place, 0, size.test, TRIED, size.thin)
        for o, k, s in work
    ]
    attempt = partial(jobs.unless_diverged, trained)
    results = jobs.each(attempt, calls, progress, "trials", [c[0] for c in calls], bars=True)
    known: dict[str, list[tuple[float, int, Settings, Scores]]] = {o: [] for o in size.trials}
    for (optimizer, k, settings), result in zip(work, results, strict=True):
        scores = result[1] if result else {}
        loss = scores.get(str(max(TRIED)), scores.get("mean", math.inf))
        known[optimizer].append((loss, k, settings, scores))
    chosen: dict[str, Chosen] = {}
    for optimizer, every in known.items():
        ranked = sorted(every, key=lambda t: t[:2])
        table = [{"settings": asdict(s), **scores} for _, _, s, scores in ranked]
        chosen[optimizer] = Chosen(ranked[0][1], ranked[0][2], table)
    return chosen


def run_folder(out: Path, optimizer: str, number: int, seed: int) -> Path:
    """Of a run with an optimizer's settings of this number; a trial is one of them."""
    return out / f"{optimizer}-{number}-seed{seed}"


def trained(
    folder: Path,
    what: Pretraining,
    settings: Settings,
    seed: int,
    place: Path | None,
    part: int,
    test: int,
    counts: tuple[int, ...],
    thin: int = 1,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Scores]:
    """A run, and its losses on a half of the held-out text; what is done is read.

    Args:
        folder: of the run.
        what: the experiment.
        settings: the optimizer's.
        seed: of the run.
        place: a folder of tokens; None for bytes of the study's own texts.
        part: 0 for the half to choose by, which is also looked at in training, 1 for the other.
        test: how many sequences of it are scored.
        counts: how many posterior samples are averaged.
        thin: every so many-th block of the study's own texts is trained on.
        progress: of its steps and samples.
    """
    source = place or TEXTS
    train = learnt(thin) if place is None else tokens.load(place)["train"]
    run = pretrain(what, settings, seed, folder, train, halves(source)[0], progress)
    return run, rescored(folder, what, source, part, test, counts, progress=progress)


def rescored(
    folder: Path,
    what: Pretraining,
    source: Source,
    part: int,
    test: int,
    counts: tuple[int, ...],
    temperature: float = 1.0,
    progress: Progress = silent,
) -> Scores:
    """A finished run's losses, as :func:`trained` has them, its samples at this temperature."""
    name, asked = f"{part}", _asked(folder, test) | {"samples": counts}
    if source == NEWS:
        name, asked = f"news-{part}", asked | {"text": text.TEXTS[NEWS[0]].digest}
    if temperature != 1:
        name, asked = f"{name}-t{temperature:g}", asked | {"temperature": temperature}

    def make() -> dict[str, float]:
        model, posterior = load(folder)
        rows = held_rows(halves(source)[part], replace(what, held=test))
        tempered = None if posterior is None else posterior.temper(temperature)
        return dict(scored(model, rows, tempered, counts, progress, what.micro))

    return runs.kept(folder / f"scores-{name}.json", asked, make)


def softened(folder: Path, what: Pretraining, test: int) -> Scores:
    """The mean's loss on news, its logits over the divisor that half of it likes best."""
    asked = _asked(folder, test) | {"text": text.TEXTS[NEWS[0]].digest, "divisors": DIVISORS}

    def make() -> dict[str, float]:
        first, second = (held_rows(half, replace(what, held=test)) for half in halves(NEWS))
        model, _ = load(folder)
        last = parameters_to_vector(model.norm.parameters()).detach()  # logits are linear in these

        def loss(divisor: float, rows: Tensor) -> float:
            vector_to_parameters(last / divisor, model.norm.parameters())
            return scored(model, rows, None, batch=what.micro)["mean"]

        best = min(DIVISORS, key=lambda divisor: loss(divisor, first))
        return {"divisor": best, "softened": loss(best, second)}

    return runs.kept(folder / "scores-softened.json", asked, make)


def _asked(folder: Path, test: int) -> dict[str, Any]:
    return {"of": runs.read_json(folder / "result.json")["provenance"], "sequences": test}


def on_news(
    out: Path,
    size: Scale,
    chosen: Mapping[str, Chosen],
    seeds: Sequence[int],
    progress: Progress,
) -> dict[str, Any]:
    """``temperatures`` and losses with these, on both kinds of text; the ``best``; all ``runs``."""
    what, test = size.what, size.test
    folders = {o: [run_folder(out, o, c.number, seed) for seed in seeds] for o, c in chosen.items()}
    sampled = [
        o for o, (first, *_) in folders.items() if (first / "posterior.safetensors").exists()
    ]
    tries = [(o, t) for o in sampled for t in TEMPERATURES]

    def each(function: Callable[..., Scores], calls: Sequence[tuple[Any, ...]]) -> list[Scores]:
        return jobs.each(function, calls, progress, "scores", [c[0] for c in calls])

    same, news = (
        each(rescored, [(folders[o][0], what, source, 0, test, TRIED, t) for o, t in tries])
        for source in (TEXTS, NEWS)
    )
    tried: dict[str, list[dict[str, Any]]] = {o: [] for o in sampled}
    for (o, t), on_held, elsewhere in zip(tries, same, news, strict=True):
        tried[o].append({"temperature": t, "held": on_held, "news": elsewhere})
    most = str(max(TRIED))
    best = {o: min(r, key=lambda row: row["news"][most])["temperature"] for o, r in tried.items()}
    work = [(o, folder) for o in folders for folder in folders[o]]
    calls = [(folder, what, NEWS, 1, test, COUNTS, best.get(o, 1.0)) for o, folder in work]
    scores, soft = (
        each(rescored, calls),
        each(softened, [(folder, what, test) for _, folder in work]),
    )
    every: dict[str, list[Scores]] = {o: [] for o in folders}
    for (o, _), a, b in zip(work, scores, soft, strict=True):
        every[o].append({**a, **b})
    return {"best": best, "temperatures": tried, "runs": every}


def table(
    name: str, found: Sequence[dict[str, Any]], news: Sequence[Scores] | None
) -> list[dict[str, Any]]:
    """A row at the mean, and one for each number of samples; on news at their best temperature."""
    seconds = min(run["seconds_per_step"] for run in found)  # runs beside others are slower
    rows = []
    for key in ("mean", *map(str, COUNTS)):
        losses = [run["scores"][key] for run in found if key in run["scores"]]
        if losses:
            method = name if key == "mean" else f"{name}, {key} sample{'s' * (key != '1')}"
            spread = stdev(losses) if len(losses) > 1 else 0.0
            row = {"method": method, "loss": fmean(losses), "s.d.": spread}
            if news:
                row["on news"] = fmean(run[key] for run in news)
            rows.append(row | {"seconds a step": seconds})
    return rows


def draw(
    path: Path,
    found: Mapping[str, Sequence[dict[str, Any]]],
    temperatures: Mapping[str, Sequence[dict[str, Any]]],
) -> None:
    """Held-out loss over steps, and what averaging samples makes of it, there and on news."""
    with picture(path, 2 + bool(temperatures)) as panels:
        for optimizer, every in found.items():
            steps = every[0]["curve"]["step"]
            curves = torch.tensor([run["curve"]["held"] for run in every])
            panels[0].plot(steps, curves.mean(0).tolist(), label=LABELS[optimizer])
            at_mean = fmean(run["scores"]["mean"] for run in every)
            if str(COUNTS[0]) in every[0]["scores"]:
                values = [fmean(run["scores"][str(c)] for run in every) for c in COUNTS]
                panels[1].plot(COUNTS, values, "o-", label=f"{LABELS[optimizer]}, averaged")
            style = {"color": "#444444", "ls": STYLES[optimizer]}
            panels[1].axhline(at_mean, label=LABELS[optimizer], **style)
        label(panels[0], "While training", "step", "held-out loss, nats a token")
        label(panels[1], "In the end, on other text", "posterior samples", "loss, nats a token")
        panels[1].set_xscale("log", base=2)
        for optimizer, rows in temperatures.items():
            most = str(max(TRIED))
            for name, style in (("held", "o--"), ("news", "o-")):
                gains = [row[name][most] - row[name]["mean"] for row in rows]
                title = f"{LABELS[optimizer]}, {'news' if name == 'news' else 'text of its kind'}"
                panels[2].plot([row["temperature"] for row in rows], gains, style, label=title)
        if temperatures:
            panels[2].axhline(0, color="#444444", lw=0.8)
            change = f"loss with {max(TRIED)} samples less the mean's"
            label(panels[2], "Where averaging pays", "temperature of the posterior", change)
            panels[2].set_xscale("log")
            panels[2].set_yscale("symlog", linthresh=1e-3)
        for panel in panels:
            panel.legend(fontsize=8)
