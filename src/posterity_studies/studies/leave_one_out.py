"""Does the leave-one-out estimate follow the test loss while a network trains? (Fig. 5)

LeNet-5 on Fashion-MNIST with the authors' settings. At steps on a logarithmic scale, the estimate
from a third of the training images beside the loss on the test images, for IVON and for AdamW's
stand-in.
Then by brute force: on 5,000 images, training goes on without each of 100, on common noise.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from posterity import IVON, leave_one_out
from posterity.integrations.adam import adam_posterior
from posterity.perturbation import perturb
from posterity_studies import jobs, runs
from posterity_studies.compare import LABELS
from posterity_studies.models import NETWORKS
from posterity_studies.recipes import Recipe, recipe
from posterity_studies.settings import Ivon
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import Task, batches, load_task
from posterity_studies.train import Progress, train

CHECKPOINTS = 24
PRIOR = 60.0  # λδ of the authors' settings: the prior precision of both
STEPS, RATE, MEMORY = 500, 0.01, 1e3  # of the brute force: its steps, lr, and 1/(1−β2)


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Estimates during training, and the brute force."""
    chosen = recipe("lenet5")
    if scale == "smoke":
        chosen = replace(chosen, epochs=2, train_limit=1000, samples=2)
    task = load_task(chosen)
    curves = {
        f"{optimizer}-seed{seed}": follow(chosen, task, optimizer, seed, out, progress)
        for seed in seeds
        for optimizer in ("ivon", "adamw")
    }
    steps = math.ceil(len(task.train[1]) / chosen.batch_size)
    rows = [
        {"method": f"{LABELS[o]}, seed {s}", **agreement(curves[f"{o}-seed{s}"], after=2 * steps)}
        for o in ("ivon", "adamw")
        for s in seeds
    ]
    draw(out / "leave-one-out.png", curves, seeds[0], steps)
    brute = by_brute_force(chosen, seeds[0], out, scale, progress)
    return {"rows": rows, "data": task.digest, "curves": curves, "brute_force": brute}


def follow(
    chosen: Recipe, task: Task, optimizer: str, seed: int, out: Path, progress: Progress
) -> list[dict[str, float]]:
    """Train, and estimate at steps on a logarithmic scale; what is known of a step is kept."""
    folder = out / f"{optimizer}-seed{seed}"
    path = out / f"{optimizer}-seed{seed}.json"
    known = {row["step"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    n = len(task.train[1])
    part = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: math.ceil(n / 3)]
    train_part = task.train[0][part], task.train[1][part]
    last = chosen.epochs * math.ceil(n / chosen.batch_size)
    first = min(10, last / CHECKPOINTS)
    wanted = {round(first * (last / first) ** (i / (CHECKPOINTS - 1))) for i in range(CHECKPOINTS)}

    def watch(step: int, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        if step not in wanted or step in known:
            return
        if isinstance(opt, IVON):
            posterior = opt.posterior(model)
        else:
            posterior = adam_posterior(opt, model, n, PRIOR)
        estimate = leave_one_out(model, posterior, train_part, n_train=n).nll
        found = {"leave_one_out": estimate, "train": loss(model, train_part)}
        known[step] = {"step": step, **found, "test": loss(model, task.test)}
        runs.write_json(path, list(known.values()))

    train(chosen, optimizer, seed, folder, progress, watch)
    return [known[step] for step in sorted(known)]


@torch.no_grad()
def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The mean loss of a model as it stands."""
    model.eval()
    batches = zip(*(part.split(1000) for part in data), strict=True)
    total = sum(cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
    model.train()
    return total / len(data[1])


def agreement(curve: Sequence[dict[str, float]], after: int) -> dict[str, float]:
    """Rank correlation of all checkpoints, and the mean gap after a step, relative to the test."""
    estimate, truth = (torch.tensor([row[k] for row in curve]) for k in ("leave_one_out", "test"))
    late = torch.tensor([row["step"] > after for row in curve])
    gaps = ((estimate - truth).abs() / truth)[late]
    training = torch.tensor([row["train"] for row in curve])
    return {
        "rank correlation": rank_correlation(estimate, truth),
        "of the training loss": rank_correlation(training, truth),
        "gap": gaps.mean().item(),
        "gap of the training loss": ((training - truth).abs() / truth)[late].mean().item(),
        "checkpoints": len(curve),
        "test NLL at the end": truth[-1].item(),
        "estimate at the end": estimate[-1].item(),
    }


def draw(
    path: Path, curves: dict[str, list[dict[str, float]]], seed: int, steps_per_epoch: int
) -> None:
    """Test loss, estimate and training loss over the epochs, a panel for each optimizer."""
    with picture(path, 2) as panels:
        for optimizer, panel in zip(("ivon", "adamw"), panels, strict=True):
            curve = curves[f"{optimizer}-seed{seed}"]
            epochs = [row["step"] / steps_per_epoch for row in curve]
            for key, name, style in (
                ("test", "test images", "-"),
                ("leave_one_out", "estimate, from training images", "o"),
                ("train", "training images", ":"),
            ):
                panel.plot(epochs, [row[key] for row in curve], style, label=name)
            title = {"ivon": "IVON's posterior", "adamw": "AdamW's stand-in"}[optimizer]
            label(panel, title, "epochs", "mean loss, nats")
            panel.set(xscale="log", yscale="log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.xaxis.set_major_formatter("{x:g}")
        panels[1].legend(loc="lower left")


def by_brute_force(
    chosen: Recipe, seed: int, out: Path, scale: str, progress: Progress
) -> dict[str, Any]:
    """How each of some images' own logits move when training goes on without it, and the estimate.

    The images are evenly spaced by their estimated sensitivity: most others would not move at all.
    Every continuation starts from the same state and sees the same batches and the same noise.
    """
    limit, count, steps = (5000, 100, STEPS) if scale == "desk" else (500, 4, 5)
    ivon = Ivon(lr=0.1, hess_init=0.1, weight_decay=PRIOR / limit, memory=MEMORY)
    few = replace(chosen, train_limit=limit, optimizers={"ivon": ivon})
    task = load_task(few)
    path = out / "brute-force" / "trained.pt"
    last = few.epochs * math.ceil(limit / few.batch_size)

    def watch(step: int, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        if step == last:
            runs.write_checkpoint(path, {"model": model.state_dict(), "opt": opt.state_dict()})

    train(few, "ivon", seed, out / "brute-force" / "run", progress, watch)
    saved = runs.read_checkpoint(path)
    model, opt = restored(saved, ivon, limit)
    posterior = opt.posterior(model)
    found = perturb(model, posterior, task.train, shifts=True)
    assert found.shift is not None
    order = found.sensitivity.argsort()
    images = order[torch.linspace(0, limit - 1, count).round().long()].tolist()
    start = time.perf_counter()
    base = continued(saved, ivon, task.train, None, steps, seed)
    with torch.no_grad():
        before = base(task.train[0][images])
    calls = [(path, few, image, steps, seed) for image in images]
    after = torch.tensor(jobs.each(left_out, calls, progress, "images left out", images))
    seconds = time.perf_counter() - start
    truth, estimate = after - before, found.shift[images]
    draw_moves(out / "brute-force.png", truth, estimate)
    return {
        "images": images,
        "steps": steps,
        "seconds": seconds,
        "correlation of the logits": correlation(truth.flatten(), estimate.flatten()),
        "slope": ((truth * estimate).sum() / estimate.square().sum()).item(),
        "rank correlation of the lengths": rank_correlation(
            truth.norm(dim=1), estimate.norm(dim=1)
        ),
        "true": truth.tolist(),
        "estimated": estimate.tolist(),
    }


def draw_moves(path: Path, truth: Tensor, estimate: Tensor) -> None:
    """Each logit's move (images, classes) and their lengths, against the estimates."""
    with picture(path, 2) as panels:
        for panel, (x, y), what in (
            (panels[0], (estimate.flatten(), truth.flatten()), "each logit"),
            (panels[1], (estimate.norm(dim=1), truth.norm(dim=1)), "length of the move"),
        ):
            panel.plot(x, y, "o", alpha=0.5, markeredgewidth=0)
            panel.axline((1, 1), (2, 2), color="#8a8a8a", lw=1)
            panel.set_ylim(1.2 * y.min() if y.min() < 0 else 0.8 * y.min(), 1.2 * y.max())
            label(panel, what, "estimated from the posterior", "without the image")
        panels[1].set(xscale="log", yscale="log")


def left_out(path: Path, few: Recipe, image: int, steps: int, seed: int) -> list[float]:
    """An image's logits when training has gone on without it."""
    ivon, task = few.settings("ivon"), load_task(few)
    assert isinstance(ivon, Ivon)
    model = continued(runs.read_checkpoint(path), ivon, task.train, image, steps, seed)
    with torch.no_grad():
        return model(task.train[0][image : image + 1])[0].tolist()


def restored(saved: dict[str, Any], settings: Ivon, n: int) -> tuple[nn.Module, IVON]:
    """A network and its optimizer as they were when they were saved."""
    model = NETWORKS["lenet5"](10)
    model.load_state_dict(saved["model"])
    opt = settings.build(model, n, steps=0, seed=0)
    assert isinstance(opt, IVON)
    opt.load_state_dict(copy.deepcopy(saved["opt"]))
    return model, opt


def continued(
    saved: dict[str, Any],
    settings: Ivon,
    data: tuple[Tensor, Tensor],
    without: int | None,
    steps: int,
    seed: int,
) -> nn.Module:
    """Train on for some steps; the image that is left out weighs nothing in its batches."""
    inputs, targets = data
    model, opt = restored(saved, settings, len(targets))
    for group in opt.param_groups:
        group["lr"] = RATE
    weights = torch.ones(len(targets))
    if without is not None:
        weights[without] = 0
    per_epoch = math.ceil(len(targets) / 256)
    for step in range(steps):
        if step % per_epoch == 0:
            order = batches(len(targets), 256, seed, 10**6 + step // per_epoch)
        which = order[step % per_epoch]
        with opt.sampled_params(train=True):
            opt.zero_grad()
            each = cross_entropy(model(inputs[which]), targets[which], reduction="none")
            (each * weights[which]).mean().backward()
        opt.step()
    return model.eval()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, without ties."""
    return correlation(a.argsort().argsort(), b.argsort().argsort())
