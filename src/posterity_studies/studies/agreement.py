"""How near is each method to the exact posterior? (section 4.2.4)

A network of 610 weights on 1,000 images of Fashion-MNIST, pooled to 7×7 pixels, and the prior
N(0, 1) on each weight. The reference is the No-U-Turn Sampler's (Hoffman and Gelman 2014, arXiv
1111.4246; Pyro's), chains from several starts. As in the NeurIPS 2021 competition: the share of
test images on which a method's most probable class is the reference's (agreement), and the mean
total variation between their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from posterity import metrics, predict
from posterity.binding import Samples
from posterity_studies import baselines, compare, jobs, runs
from posterity_studies.baselines import ENSEMBLES, LAPLACE
from posterity_studies.models import NETWORKS
from posterity_studies.recipes import Recipe, UserError, recipe
from posterity_studies.settings import Backprop, Dropout, Ivon, Sgd, Swag, Vogn
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task
from posterity_studies.train import EVAL_BATCH, Progress

N, PRIOR = 1000, 1.0
CHAINS, SAMPLES = 3, 1000  # of each method's samples: few would seem far from the reference


def small() -> Recipe:
    """What all methods train; the prior's precision over N is each one's weight decay."""
    delta = PRIOR / N
    ivon = {"lr": 0.1, "hess_init": 0.05, "weight_decay": delta}
    sgd: dict[str, Any] = {"lr": 0.05, "weight_decay": delta}
    return replace(
        recipe("fashion-mnist"),
        name="agreement",
        network="tiny",
        epochs=200,
        batch_size=50,
        train_limit=N,
        optimizers={
            "sgd": Sgd(**sgd),
            "ivon": Ivon(**ivon, memory=1e3),
            "dropout": Dropout(**sgd),
            "swag": Swag(**sgd, swag_lr=0.05),
            "bbb": Backprop(lr=5e-3, weight_decay=delta),
            "vogn": Vogn(**ivon, memory=1e3),
        },
    )


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each method, one for the reference's chains among themselves."""
    chosen, warmup, draws, count = small(), 300, 700, SAMPLES
    if scale == "smoke":
        chosen, warmup, draws, count = replace(chosen, epochs=1, samples=2), 2, 3, 4
    task = load_task(chosen)
    kept = [out / f"chain{k}-{N}-{PRIOR:g}-{warmup}-{draws}.safetensors" for k in range(CHAINS)]
    chains = [chain(path, task.train, k, warmup, draws, progress) for k, path in enumerate(kept)]
    each = [averaged(samples, task.test[0]) for samples in chains]
    exact, targets = torch.stack(each).mean(0), task.test[1]
    work = [
        (chosen, optimizer, seed, compare.run_folder(out, optimizer, seed))
        for seed in seeds
        for optimizer in chosen.optimizers
    ]
    jobs.train_all(work, progress)
    found: dict[str, list[dict[str, float]]] = {}
    for title, model, posterior, samples in methods(out, chosen, seeds, task.train[0], count):
        probs = predict(model, posterior, task.test[0], samples, batch_size=EVAL_BATCH).probs
        found.setdefault(title, []).append(measures(probs, exact, targets))
    apart = [
        measures(probs, torch.stack(each[:k] + each[k + 1 :]).mean(0), targets)
        for k, probs in enumerate(each)
    ]
    rows: list[dict[str, Any]] = [
        {"method": title, **{k: fmean(m[k] for m in every) for k in every[0]}}
        for title, every in {**found, "a chain and the others": apart}.items()
    ]
    own = {"agreement": 1.0, "total variation": 0.0}
    rows.append({"method": "the reference", **measures(exact, exact, targets), **own})
    draw(out / "agreement.png", rows[:-1])
    settings = {"warm-up": warmup, "draws": draws, "chains": CHAINS, "prior precision": PRIOR}
    settings["samples"] = count
    return {"rows": rows, "data": task.digest, "settings": settings}


def methods(
    out: Path, chosen: Recipe, seeds: Sequence[int], inputs: Tensor, count: int
) -> Iterator[tuple[str, nn.Module, Samples | None, int]]:
    """Name, model, what predicts, and how many samples of it."""
    trained: dict[str, list[tuple[nn.Module, Samples | None]]] = {}
    for optimizer in chosen.optimizers:
        for seed in seeds:
            _, model, posterior = runs.load(compare.run_folder(out, optimizer, seed))
            trained.setdefault(optimizer, []).append((model, posterior))
            title = compare.LABELS[optimizer]
            if posterior is not None:
                yield f"{title} at the mean", model, None, 1
            yield title, model, posterior, count
    for model, _ in trained["sgd"]:
        for title, fit in LAPLACE.items():
            yield title, model, fit(model, inputs, PRIOR), count
    if len(seeds) > 1:
        for title, optimizer in ENSEMBLES.items():
            yield title, trained[optimizer][0][0], *baselines.together(trained[optimizer], count)


def measures(probs: Tensor, exact: Tensor, targets: Tensor) -> dict[str, float]:
    """Of one method's probabilities, (images, classes)."""
    return {
        "agreement": (probs.argmax(1) == exact.argmax(1)).double().mean().item(),
        "total variation": (probs - exact).abs().sum(1).mean().item() / 2,
        "accuracy": metrics.accuracy(probs, targets),
        "NLL": metrics.nll(probs, targets),
        "ECE": metrics.ece(probs, targets, 20),
    }


def chain(
    path: Path,
    data: tuple[Tensor, Tensor],
    seed: int,
    warmup: int,
    draws: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Samples of the exact posterior (draws, \\*shape of the weight); a file where it is done."""
    if path.exists():
        return runs.read_tensors(path)
    torch.manual_seed(seed)
    model = NETWORKS["tiny"](10)
    start = {name: p.detach() for name, p in model.named_parameters()}
    inputs, targets = data

    def energy(weights: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, weights, (inputs,))
        prior = torch.stack([p.square().sum() for p in weights.values()]).sum()
        return cross_entropy(logits, targets, reduction="sum") + PRIOR / 2 * prior

    samples = sampled(energy, start, seed, warmup, draws, progress)
    runs.write_tensors(path, samples)
    return samples


def sampled(
    energy: Callable[[dict[str, Tensor]], Tensor],
    start: dict[str, Tensor],
    seed: int,
    warmup: int,
    draws: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Draws from the density exp(−energy), by Pyro's No-U-Turn Sampler.

    Raises:
        UserError: Pyro is not installed.
    """
    try:
        import pyro
        from pyro.infer import MCMC, NUTS
    except ImportError:
        raise UserError("the reference needs Pyro: pip install pyro-ppl") from None
    total = warmup + draws
    bar = iter(progress(range(total), total, f"reference, chain {seed}"))
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        NUTS(potential_fn=energy, max_tree_depth=8),
        num_samples=draws,
        warmup_steps=warmup,
        initial_params=start,
        hook_fn=lambda *_: next(bar, None),
        disable_progbar=True,
    )
    mcmc.run()
    next(bar, None)  # the bar's end
    return mcmc.get_samples()


def averaged(samples: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Probabilities (images, classes), averaged over samples of the weights."""
    model, draws = NETWORKS["tiny"](10), len(next(iter(samples.values())))
    total = torch.zeros(len(inputs), 10)
    with torch.no_grad():
        for k in range(draws):
            weights = {name: values[k] for name, values in samples.items()}
            total += functional_call(model, weights, (inputs,)).softmax(1) / draws
    return total


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A bar for each method."""
    names = [row["method"] for row in rows][::-1]
    with picture(path, 2, (5.0, 4.2)) as panels:
        for panel, key in zip(panels, ("agreement", "total variation"), strict=True):
            values = [row[key] for row in rows][::-1]
            panel.plot(values, names, "o")
            panel.axvline(values[0], color="#8a8a8a", lw=0.8)  # as near as a chain is
        label(panels[0], "Right is better", "agreement with the reference", "")
        label(panels[1], "Left is better", "total variation to the reference", "")
