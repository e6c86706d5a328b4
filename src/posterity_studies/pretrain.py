"""Language models from scratch: tokens, a GPT, an optimizer, a seed → a run folder.

Beside :mod:`posterity_studies.train`, for text has no epochs: windows are drawn anywhere in it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from posterity import Posterior
from posterity.binding import Samples
from posterity.language import perplexity
from posterity_studies import ranks, runs
from posterity_studies.graphs import replayed, taken_up
from posterity_studies.models.gpt import GPT, GPT2, GPTConfig
from posterity_studies.recipes import Diverged, UserError
from posterity_studies.settings import LanguageAdamw, LanguageIvon, Settings
from posterity_studies.train import Progress, silent, warmup_cosine


@dataclass(frozen=True)
class Pretraining:
    """One experiment but for its optimizer: a network, and how long it learns."""

    shape: GPTConfig
    steps: int
    batch: int = 24  # sequences a step, of all ranks together
    micro: int = 24  # sequences at once, of one rank
    warmup: int = 100  # steps; cosine decay to zero after
    clip: float = 1.0  # of the gradient's norm, per micro-batch
    bf16: bool = False  # autocast
    compiled: bool = False  # the network; on a GPU steps of one micro-batch become a CUDA graph
    every: int = 100  # steps between looks at the held-out text, and checkpoints
    held: int = 96  # held-out sequences at each look

    def __post_init__(self):
        if min(self.steps, self.batch, self.micro, self.every, self.held) < 1:
            raise UserError("steps, batch, micro, every and held must be at least 1")


# GPT-2 on OpenWebText: half a million tokens a step, 100,000 steps (the paper's appendix).
LARGE = {"steps": 100_000, "batch": 480, "warmup": 2000, "bf16": True, "every": 1000, "held": 480}
RECIPES: dict[str, tuple[Pretraining, dict[str, Settings]]] = {
    name: (
        Pretraining(GPT2[name], micro=micro, **LARGE),
        {"adamw": LanguageAdamw(lr=adamw), "ivon": LanguageIvon(lr=ivon)},
    )
    for name, micro, adamw, ivon in (
        ("gpt2", 12, 6e-4, 300.0),
        ("gpt2-medium", 6, 3e-4, 200.0),
        ("gpt2-large", 4, 2e-4, 150.0),
    )
}


def pretrain(
    what: Pretraining,
    settings: Settings,
    seed: int,
    folder: Path,
    train: Tensor,
    held: Tensor,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on one text; a finished run is returned, a killed one goes on.

    Writes ``config.json``, ``checkpoint.pt`` while it runs, ``model.safetensors``,
    ``posterior.safetensors`` of a method that has one, and, last, ``result.json`` with the curve:
    ``train`` (mean over the steps since the last look) and ``held`` (at the mean), nats a token.
    Under torchrun every rank calls this, and takes its part of each batch.

    Args:
        what: the experiment.
        settings: the optimizer's.
        seed: of the weights, the windows and the posterior samples.
        folder: of the run.
        train: tokens (n,) of any integer dtype; memory-mapped ones are read window by window.
        held: tokens that are only looked at.
        progress: of the steps.

    Raises:
        UserError: the folder holds another run or another process works there, the text is too
            short, or the batch cannot be divided into equal parts.
        Diverged: the loss is not finite.
    """
    config = {**asdict(what), "settings": {"kind": type(settings).__name__, **asdict(settings)}}
    config = json.loads(json.dumps(config | {"seed": seed, "tokens": len(train)}))
    if not what.compiled:  # as it was before there was any
        del config["compiled"]
    if (folder / "config.json").exists():
        if runs.read_json(folder / "config.json") != config:
            raise UserError(f"{folder} holds a run with other settings: remove it")
        if (folder / "result.json").exists():
            return runs.read_json(folder / "result.json")
    context, share = what.shape.context, what.batch // ranks.world()
    if min(len(train), len(held)) <= context:
        raise UserError(f"a text must be longer than a window of {context} tokens")
    if what.batch % ranks.world() or (share > what.micro and share % what.micro):
        raise UserError(
            f"a batch of {what.batch} sequences on {ranks.world()} processors cannot be divided "
            f"into equal parts of {what.micro}: change --batch or --micro"
        )
    ranks.together()
    with runs.occupied(folder):
        return _pretrain(what, settings, seed, folder, train, held, config, progress)


def _pretrain(
    what: Pretraining,
    settings: Settings,
    seed: int,
    folder: Path,
    train: Tensor,
    held: Tensor,
    config: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    code, context = runs.git_hash(), what.shape.context
    torch.manual_seed(seed)
    model = GPT(what.shape).to(ranks.device())
    opt = settings.build(model, len(train), what.steps, seed)
    if ranks.first():
        runs.write_json(folder / "config.json", config)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, warmup_cosine(what.warmup, what.steps))
    curve: dict[str, list[float]] = {"step": [], "train": [], "held": []}
    times: list[float] = []
    done, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = runs.read_checkpoint(path)
        model.load_state_dict(saved["model"])
        taken_up(opt, schedule, (saved["optimizer"], saved["schedule"]))
        done, curve, times = saved["step"], saved["curve"], saved["times"]
    replica = ranks.replica(model)
    if what.compiled:
        replica = cast(nn.Module, torch.compile(replica))
    step_on = partial(_step, what, replica, opt)
    if what.compiled and ranks.alone() and what.micro >= what.batch:
        step_on = replayed(step_on, opt)
    losses: list[Tensor] = []
    left = range(done + 1, what.steps + 1)
    start, written, cost = time.perf_counter(), -math.inf, 0.0
    for step in progress(left, len(left), f"{type(settings).__name__}, seed {seed}"):
        mine = ranks.part(windows(train, what.batch, context, seed, step))
        losses.append(step_on(mine.to(ranks.device())))
        schedule.step()
        if step % what.every and step < what.steps:
            continue
        curve["step"].append(step)
        loss = ranks.average(torch.stack(losses).mean()).item()  # a GPU is waited for
        curve["train"].append(loss)
        times.append((time.perf_counter() - start) / len(losses))
        curve["held"].append(scored(model, held_rows(held, what), None, batch=what.micro)["mean"])
        losses.clear()
        if not math.isfinite(curve["train"][-1] + curve["held"][-1]):
            raise Diverged(f"the training diverged at step {step}: lower the lr")
        if ranks.first() and time.perf_counter() - written > 10 * cost:  # a tenth of all
            began = time.perf_counter()
            checkpoint = {"model": model.state_dict(), "optimizer": opt.state_dict()}
            checkpoint |= {"schedule": schedule.state_dict(), "step": step}
            runs.write_checkpoint(path, {**checkpoint, "curve": curve, "times": times})
            written = time.perf_counter()
            cost = written - began
        start = time.perf_counter()
    result = {
        **config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": median(times[1:] or times),
        "curve": curve,
        "provenance": runs.provenance(seed, "the caller's", code),
    }
    posterior = getattr(opt, "posterior", None)
    if ranks.first():
        runs.write_tensors(folder / "model.safetensors", model.state_dict())
        if posterior is not None:
            posterior(model).save(folder / "posterior.safetensors")
        runs.write_json(folder / "result.json", result)
        path.unlink(missing_ok=True)
    ranks.together()
    return result


def load(folder: Path) -> tuple[GPT, Posterior | None]:
    """The network of a finished run at its mean, and its posterior if there is one."""
    config = runs.read_json(folder / "config.json")
    model = GPT(GPTConfig(**config["shape"])).to(ranks.device())
    model.load_state_dict(runs.read_tensors(folder / "model.safetensors"))
    path = folder / "posterior.safetensors"
    return model, Posterior.load(path).to(ranks.device()) if path.exists() else None


def windows(tokens: Tensor, batch: int, context: int, seed: int, step: int) -> Tensor:
    """Sequences (batch, context + 1) from anywhere: a pure function of seed and step."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(context + 1)].long()


def _step(what: Pretraining, model: nn.Module, opt: torch.optim.Optimizer, rows: Tensor) -> Tensor:
    """One step on this rank's sequences, and its loss; each micro-batch has samples of its own.

    IVON averages the samples' gradients; without samples they are added up.
    """
    model.train()
    parts = rows.split(what.micro)
    sampled_params = getattr(opt, "sampled_params", None)
    samples = getattr(opt, "samples_due", 1)
    opt.zero_grad()
    losses = []
    for part in (part for part in parts for _ in range(samples)):
        with sampled_params(train=True) if sampled_params else nullcontext():
            if sampled_params:
                opt.zero_grad()
            with torch.autocast(part.device.type, torch.bfloat16, enabled=what.bf16):
                logits = model(part[:, :-1])
            loss = cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            (loss if sampled_params else loss / len(parts)).backward()
            losses.append(loss.detach())
            if sampled_params:
                nn.utils.clip_grad_norm_(model.parameters(), what.clip)
    if not sampled_params:
        nn.utils.clip_grad_norm_(model.parameters(), what.clip)
    opt.step()
    return torch.stack(losses).mean()


def held_rows(tokens: Tensor, what: Pretraining) -> Tensor:
    """Sequences (held, context), evenly spread over a text."""
    context = what.shape.context
    rows = tokens[: len(tokens) // context * context].view(-1, context)
    return rows[torch.linspace(0, len(rows) - 1, min(what.held, len(rows))).long()].long()


def scored(
    model: nn.Module,
    rows: Tensor,
    posterior: Samples | None,
    counts: tuple[int, ...] = (),
    progress: Progress = silent,
    batch: int = 16,
) -> Mapping[str, float]:
    """Nats a token: ``mean``, and by the number of posterior samples averaged, ``"8"`` …

    Fewer samples than the most are groups of these, whose mean is reported.
    """
    rows = rows.to(ranks.device())
    found = {"mean": perplexity(model, None, rows, batch_size=batch).nll}
    if posterior is None:
        return found
    each = []
    for index in progress(range(max(counts)), max(counts), "posterior samples"):
        with posterior.sampled(model, 0, index):
            log_probs = perplexity(model, None, rows, batch_size=batch).per_token
            each.append(log_probs[:, 1:].double())
    for count in counts:
        groups = torch.stack(each).unflatten(0, (-1, count))
        nll = -(groups.logsumexp(1) - math.log(count)).mean((1, 2))
        found[str(count)] = nll.mean().item()
        found[f"{count} spread"] = nll.std().item() if len(nll) > 1 else 0.0
    return found
