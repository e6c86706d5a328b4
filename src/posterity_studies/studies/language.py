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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posterity import IVON, Posterior
from posterity.language import perplexity
from posterity_studies import runs
from posterity_studies.data import text
from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.studies.pictures import COLOURS, label, picture
from posterity_studies.train import Progress, silent, warmup_cosine

COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Size:
    """A network, how long it is trained, on how much; λ is ``sharpness`` times these bytes."""

    layers: int
    heads: int
    width: int
    context: int
    train: int  # bytes
    steps: int
    batch: int = 24
    scored: int = 128  # sequences
    sharpness: float = 10.0  # 1 holds the weights so loosely that the network learns more slowly


SIZES = {
    "desk": Size(layers=4, heads=4, width=128, context=128, train=300_000, steps=1200),
    "smoke": Size(layers=1, heads=2, width=16, context=32, train=2_000, steps=20, scored=4),
}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Perplexities by the number of samples, means over seeds, and two pictures."""
    size, prose = SIZES[scale], text.load("anarchism")
    curves: list[dict[str, dict[str, float]]] = []
    sentence: dict[str, Any] = {}
    for seed in seeds:
        posterior = trained(out / f"seed{seed}.safetensors", size, prose.train, seed, progress)
        curves.append(averaged(posterior, size, prose.test, progress))
        sentence = sentence or uncertain(posterior, size, bytes(prose.test.numpy()))
    rows = [
        {"method": name, **{k: sum(c[name][k] for c in curves) / len(curves) for k in row}}
        for name, row in curves[0].items()
    ]
    draw(out / "language.png", rows)
    draw_sentence(out / "sentence.png", sentence)
    settings = {"size": asdict(size), "curves": curves, "sentence": sentence}
    return {"rows": rows, "data": prose.digest, **settings}


def network(size: Size) -> GPT:
    """A GPT over bytes."""
    return GPT(GPTConfig(size.layers, size.heads, size.width, size.context, vocabulary=256))


def trained(path: Path, size: Size, prose: Tensor, seed: int, progress: Progress) -> Posterior:
    """The posterior after training; one that was trained before is read."""
    if path.exists():
        return runs.read(path, Posterior.load)
    torch.manual_seed(seed)
    model, prose = network(size), prose[: size.train]
    plain = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": plain}, {"params": rest, "weight_decay": 0.0}]
    how = {"hess_init": 0.01, "betas": (0.9, 0.9995), "weight_decay": 1e-6, "clip_radius": 1e-3}
    opt = IVON(groups, lr=70.0, ess=size.sharpness * len(prose), seed=seed, **how)
    factor = warmup_cosine(size.steps / 10, size.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(size.context + 1)
    for _ in progress(range(size.steps), size.steps, f"seed {seed}"):
        starts = torch.randint(len(prose) - size.context, (size.batch, 1), generator=generator)
        with opt.sampled_params(train=True):
            opt.zero_grad()
            model.loss(prose[starts + window].long()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
    posterior = opt.posterior(model)
    with runs.replacing(path) as temporary:
        posterior.save(temporary)
    return posterior


def averaged(
    posterior: Posterior, size: Size, prose: Tensor, progress: Progress = silent
) -> dict[str, dict[str, float]]:
    """Perplexity at the mean, and of averages over S samples, for each S.

    Each sample's log-probabilities are had once. There are 32/S averages of S different samples:
    their mean is reported, and how they spread.
    """
    model = network(size)
    rows = prose[: len(prose) // size.context * size.context].view(-1, size.context)
    rows = rows[:: max(len(rows) // size.scored, 1)][: size.scored].long()
    with posterior.at_mean(model):
        found = {"the mean": _row(torch.tensor([perplexity(model, None, rows).nll]))}
    each = []
    for index in progress(range(max(COUNTS)), max(COUNTS), "posterior samples"):
        with posterior.sampled(model, 0, index):
            each.append(perplexity(model, None, rows).per_token[:, 1:].double())
    for count in COUNTS:
        groups = torch.stack(each).unflatten(0, (-1, count))
        nll = -(groups.logsumexp(1) - math.log(count)).mean((1, 2))
        found[f"{count} samples" if count > 1 else "1 sample"] = _row(nll)
    return found


def _row(nll: Tensor) -> dict[str, float]:
    spread = nll.exp().std().item() if len(nll) > 1 else 0.0
    return {"NLL": nll.mean().item(), "perplexity": nll.exp().mean().item(), "spread": spread}


def uncertain(posterior: Posterior, size: Size, prose: bytes) -> dict[str, Any]:
    """A sentence of the held-out prose, and how unsure the averaged model is at each byte."""
    longest = size.context - size.context // 4
    found = re.search(rb"(?<=\. )[A-Z][a-z ,]{%d,%d}\." % (longest // 2, longest - 2), prose)
    start, end = found.span() if found else (size.context // 4, size.context)
    row = torch.tensor(list(prose[max(end - size.context, 0) : end]))
    scores = perplexity(network(size), posterior, row[None], samples=max(COUNTS))
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
