"""The one train-and-evaluate loop: a recipe, an optimizer, a seed → a run folder."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from posterity import metrics, predict
from posterity.binding import Samples
from posterity_studies import ranks, runs
from posterity_studies.data.imagenet import Pictures
from posterity_studies.graphs import replayed, taken_up
from posterity_studies.models import NETWORKS
from posterity_studies.recipes import Diverged, Recipe, UserError
from posterity_studies.tasks import WORKERS, Streamed, Task, batches, load

EVAL_BATCH = 250  # small enough for a CPU's cache

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, how many, label) → items
Watch = Callable[[int, nn.Module, torch.optim.Optimizer], None]  # after step 1, 2, …


def silent(items: Iterable[int], total: int, label: str) -> Iterable[int]:
    """No progress bar."""
    return items


def configuration(recipe: Recipe, optimizer: str, seed: int) -> dict[str, Any]:
    """All that decides a run's bits, as plain values."""
    settings = {"optimizer": optimizer, **asdict(recipe.settings(optimizer))}
    rest = {k: v for k, v in asdict(recipe).items() if k not in ("optimizers", "search")}
    for key in ("label_noise", "augment", "compiled"):  # as it was before there was any
        if not rest[key]:
            del rest[key]
    return json.loads(json.dumps({**rest, "settings": settings, "seed": seed}))


def finished(recipe: Recipe, optimizer: str, seed: int, folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; None where there is none yet.

    Raises:
        UserError: the folder holds a run with other settings, or something else.
    """
    if (folder / "config.json").exists():
        if runs.read_json(folder / "config.json") != configuration(recipe, optimizer, seed):
            raise UserError(
                f"{folder} holds a run with other settings: choose another --out, or remove it"
            )
        if (folder / "result.json").exists():
            return runs.read_json(folder / "result.json")
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another --out")
    return None


def train(
    recipe: Recipe,
    optimizer: str,
    seed: int,
    folder: Path,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train one optimizer with one seed; a finished run is returned, a killed one goes on.

    Writes ``config.json``, ``metrics.jsonl`` (a line a step, and one an epoch), ``checkpoint.pt``
    while it runs, then ``model.safetensors``, ``posterior.safetensors`` (of a method that has one),
    ``predictions.safetensors`` and, last, ``result.json``. Under torchrun every rank calls this,
    takes its part of each batch and of the posterior samples, and gets the result; the first one
    writes. All must see the same folder. ``watch`` is called after each step.

    Raises:
        UserError: the folder holds another run, or a damaged file, or another process works there.
        Diverged: the outputs are not finite.
    """
    result = finished(recipe, optimizer, seed, folder)
    ranks.together()  # before the first one writes what the others have looked for
    if result is not None:
        return result
    with runs.occupied(folder):
        return _train(recipe, optimizer, seed, folder, progress, watch)


def _train(
    recipe: Recipe,
    optimizer: str,
    seed: int,
    folder: Path,
    progress: Progress,
    watch: Watch | None,
) -> dict[str, Any]:
    code, config = runs.git_hash(), configuration(recipe, optimizer, seed)
    task = load(recipe)
    torch.manual_seed(seed)
    model = NETWORKS[recipe.network](len(task.class_names)).to(ranks.device())
    n = len(task.train[1])
    steps = recipe.epochs * math.ceil(n / recipe.batch_size)
    opt = recipe.settings(optimizer).build(model, n, steps, seed)
    if ranks.first():
        runs.write_json(folder / "config.json", config)  # nothing is written for wrong settings
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, warmup_cosine(recipe.warmup * steps, steps))
    log = _Log(folder / "metrics.jsonl")
    forget_peak_memory()
    done, seconds = _resume(folder / "checkpoint.pt", model, opt, schedule, log)
    replica = ranks.replica(model)
    if recipe.compiled:
        replica = cast(nn.Module, torch.compile(replica, dynamic=False))
    step = partial(_step, replica, opt)
    if recipe.compiled and ranks.alone():
        step = replayed(step, opt)
    after = (lambda number: watch(number, model, opt)) if watch else None
    for epoch in range(done, recipe.epochs):
        order = batches(n, recipe.batch_size, seed, epoch)
        bar = progress(range(len(order)), len(order), f"{optimizer} epoch {epoch + 1}")
        feed = task.feed(order, recipe.augment, seed, epoch)
        replica.train()
        seconds.append(_epoch(step, opt, schedule, feed, order, seed, epoch, bar, log, after))
        if not ranks.first():
            continue
        at_mean = evaluate(model, None, task.test)
        log.write({"epoch": epoch + 1, "nll": at_mean["nll"], "accuracy": at_mean["accuracy"]})
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": opt.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
            "seconds": seconds,
            "log": log.position,
        }
        runs.write_checkpoint(folder / "checkpoint.pt", checkpoint)
    peak = peak_memory()
    curve = log.curve() if ranks.first() else {"train_loss": [math.nan]}
    verdicts = diagnosed(opt, model, curve["train_loss"][-1], recipe.batch_size)
    evaluations = _finish(recipe, task, model, opt, folder, progress)
    if not ranks.first():
        ranks.together()
        return runs.read_json(folder / "result.json")
    result = {
        **config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_epoch": sorted(seconds)[len(seconds) // 2],
        "peak_memory_mib": peak,
        "evaluations": evaluations,
        "diagnostics": verdicts,
        "curve": curve,
        "provenance": runs.provenance(seed, task.digest, code),
    }
    runs.write_json(folder / "result.json", result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    ranks.together()
    return result


def diagnosed(
    opt: torch.optim.Optimizer, model: nn.Module, loss: float, batch: int
) -> list[dict[str, Any]]:
    """Verdicts on a training, of an optimizer that gives them."""
    look = getattr(opt, "diagnostics", None)
    return [v._asdict() for v in look(model, loss=loss, batch=batch).verdicts] if look else []


def _epoch(
    step: Callable[..., Tensor],
    opt: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    feed: Iterator[tuple[Tensor, Tensor]],
    order: tuple[Tensor, ...],
    seed: int,
    epoch: int,
    bar: Iterable[int],
    log: _Log,
    after: Callable[[int], None] | None,
) -> float:
    """One pass over the data; how long it took, in seconds."""
    torch.manual_seed(1_000_003 * seed + epoch)  # a resumed run repeats what is random
    losses, rates = [], []
    start = time.perf_counter()
    for i, (inputs, targets) in zip(bar, feed, strict=False):  # the bar ends first
        rates.append(torch.as_tensor(opt.param_groups[0]["lr"], dtype=torch.float64))
        share = ranks.world() / len(order[i])  # ranks are averaged: this makes it the batch's mean
        losses.append(step(inputs, targets, share=share))
        schedule.step()
        if after:
            after(epoch * len(order) + i + 1)
    whole = ranks.average(torch.stack(losses)).tolist()  # a GPU is waited for
    seconds = time.perf_counter() - start
    numbered = enumerate(
        zip(whole, torch.stack(rates).tolist(), strict=True), epoch * len(order) + 1
    )
    log.write(*({"step": step, "loss": loss, "lr": lr} for step, (loss, lr) in numbered))
    return seconds


def _step(
    model: nn.Module, opt: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, share: float
) -> Tensor:
    """One step, on as many posterior samples as the optimizer wants; their mean loss."""
    sampled_params = getattr(opt, "sampled_params", lambda train: nullcontext())
    backward = getattr(opt, "backward", _backward)
    found = []
    for _ in range(getattr(opt, "samples_due", 1)):
        with sampled_params(train=True):
            opt.zero_grad()
            found.append(backward(model, inputs, targets, share))
    opt.step()
    return torch.stack(found).mean()


def _backward(model: nn.Module, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
    """Gradients of ``share`` times the summed loss, and that loss."""
    loss = nn.functional.cross_entropy(model(inputs), targets, reduction="sum") * share
    loss.backward()
    return loss.detach()


def forget_peak_memory() -> None:
    """Start the peak afresh, so that it is training's and not that of loading the data."""
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """The process's largest resident memory, in MiB."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def warmup_cosine(warmup: float, steps: int) -> Callable[[int], float]:
    """The factor of a learning rate at each step: linear to 1, then half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor


def _resume(
    path: Path,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    log: _Log,
) -> tuple[int, list[float]]:
    """Take up the last checkpoint; epochs done, and the seconds each took."""
    if not path.exists():
        log.truncate(0)
        return 0, []
    saved = runs.read_checkpoint(path)
    model.load_state_dict(saved["model"])
    taken_up(opt, schedule, (saved["optimizer"], saved["schedule"]))
    log.truncate(saved["log"])
    return saved["epoch"], saved["seconds"]


def _finish(
    recipe: Recipe,
    task: Task | Streamed,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Save the model and its posterior; the evaluations, by name."""
    rows: dict[str, Samples | None] = {"mean": None}
    if ranks.first():
        runs.write_tensors(folder / "model.safetensors", model.state_dict())
    if (found := getattr(opt, "posterior", None)) is not None:
        posterior = found(model)
        if ranks.first():
            posterior.save(folder / "posterior.safetensors")
        if recipe.samples:
            rows["samples"] = posterior
    evaluations, predictions = {}, {}
    ood = None if recipe.validation else task.ood  # nothing is chosen by what is unknown
    for name, posterior in rows.items():
        found = evaluate(model, posterior, task.test, ood, recipe.samples, progress)
        for key in ("probs", "ood_probs"):
            if key in found:
                predictions[f"{name}.{key}"] = found.pop(key).float()
        evaluations[name] = found
    if ranks.first():
        runs.write_tensors(folder / "predictions.safetensors", predictions)
    return evaluations


def evaluate(
    model: nn.Module,
    posterior: Samples | None,
    test: tuple[Tensor | Pictures, Tensor],
    ood: Tensor | None = None,
    samples: int = 64,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Metrics on the test set and, with ``ood``, of telling it apart; then the probabilities too.

    Args:
        model: the network; with ``posterior=None`` its weights as they stand are used.
        test: normalised inputs, or pictures that are decoded in batches, and targets.
        ood: inputs of another data set; the score is the largest class probability.
        samples: of the posterior.
    """
    together, targets = test
    if isinstance(together, Pictures):
        together = DataLoader(together, EVAL_BATCH, num_workers=WORKERS)
    elif ood is not None:
        together = torch.cat([together, ood])
    small = isinstance(together, Tensor) and ranks.device().type == "cuda"
    count = samples if posterior else 1
    prediction = predict(
        model,
        posterior,
        together,
        samples=count,
        batch_size=4 * EVAL_BATCH if small else EVAL_BATCH,
        distributed=count >= ranks.world(),
        progress=lambda items: progress(items, -(-count // ranks.world()), "posterior samples"),
    )
    n, found_probs = len(targets), prediction.probs.cpu()
    probs = found_probs[:n]
    if not found_probs.isfinite().all():
        raise Diverged("the training diverged: the model's outputs are not finite. Lower the lr")
    found: dict[str, Any] = {
        "accuracy": metrics.accuracy(probs, targets),
        "nll": metrics.nll(prediction.log_probs[:n].cpu(), targets, log=True),
        "ece": metrics.ece(probs, targets, bins=20),
        "brier": metrics.brier(probs, targets),
    }
    if ood is not None:
        ood_probs = found_probs[n:]
        scores = probs.amax(1), ood_probs.amax(1)
        found["ood_auroc"] = metrics.auroc(*scores)
        found["ood_fpr_at_95"] = metrics.fpr_at_95(*scores)
        found["ood_probs"] = ood_probs
    return found | {"probs": probs}


class _Log:
    """``metrics.jsonl``: a line a step and a line an epoch; cut back to a checkpoint on resume."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def position(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, position: int) -> None:
        """Forget what came after a checkpoint."""
        if not ranks.first():
            return
        with self.path.open("ab") as file:
            file.truncate(position)

    def write(self, *lines: dict[str, float]) -> None:
        """Append lines."""
        if not ranks.first():
            return
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def curve(self) -> dict[str, list[float]]:
        """Per epoch: mean training loss, and test NLL and accuracy at the mean."""
        curve: dict[str, list[float]] = {
            "epoch": [], "train_loss": [], "test_nll": [], "test_accuracy": []
        }  # fmt: skip
        losses = []
        for line in map(json.loads, self.path.read_text().splitlines()):
            if "step" in line:
                losses.append(line["loss"])
                continue
            curve["epoch"].append(line["epoch"])
            curve["train_loss"].append(sum(losses) / len(losses))
            curve["test_nll"].append(line["nll"])
            curve["test_accuracy"].append(line["accuracy"])
            losses = []
        return curve
