"""Finetuning: the one loop over batches of sentences, and a run of it → a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from posterity import IVON, Posterior, metrics, predict
from posterity.binding import Samples
from posterity_studies import ranks, runs
from posterity_studies.graphs import taken_up
from posterity_studies.recipes import Diverged, UserError, unknown
from posterity_studies.settings import FinetuneAdamw, FinetuneIvon, Settings
from posterity_studies.subjects import MiniLM, Pretrained, Row, Rows, SmolLM2, Subject
from posterity_studies.train import Progress, silent

Inputs = dict[str, Tensor]
Score = dict[str, float]
MEASURES = ("accuracy", "nll", "ece")

OPTIMIZERS: dict[str, Settings] = {"adamw": FinetuneAdamw(), "ivon": FinetuneIvon()}


def subject(model: str, domain: str) -> Subject:
    """``minilm``, ``smollm2``, or a model of the hub or of a folder, for one domain.

    Raises:
        UserError: a name that is nearly one of the first two.
    """
    if model == "minilm":
        return MiniLM()
    if model == "smollm2":
        return SmolLM2()
    own = ("minilm", "smollm2")
    if get_close_matches(model, own, cutoff=0.8) and not Path(model).exists():
        raise UserError(unknown("model", model, own))  # before the hub is asked, again and again
    return Pretrained(model=model, domains=(domain,))


def run(
    subject: Subject,
    domain: str,
    settings: Settings,
    seed: int,
    folder: Path,
    samples: int = 16,
    keep: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Finetune with one seed, and score; a finished run is returned, a killed one goes on.

    Writes ``config.json``, ``checkpoint.pt`` while it runs and, last, ``result.json``: of the
    sentences to choose by and those to test with accuracy, NLL and ECE, at ``the mean`` and, where
    there is a posterior, ``averaged``. With ``keep`` also the trained weights: before
    (``base.safetensors``, for `posterity merge --base`) and after, ``posterior.safetensors``, or
    ``model.safetensors`` of a method that has none. Under torchrun every rank calls this, and
    takes its part of each batch.

    Raises:
        UserError: an unknown domain; the folder holds another run, or another process works there.
        Diverged: the loss is not finite.
        DataError: the model or the sentences cannot be had.
    """
    if domain not in subject.domains:
        known = ", ".join(subject.domains)
        raise UserError(f"{subject.name} has no sentences {domain!r}; there are {known}")
    told = {"settings": {"kind": type(settings).__name__, **asdict(settings)}, "seed": seed}
    told |= {"model": subject.name, "subject": asdict(subject), "domain": domain}
    config = json.loads(json.dumps(told | {"samples": samples}))
    if (folder / "config.json").exists():
        if runs.read_json(folder / "config.json") != config:
            raise UserError(
                f"{folder} holds a run with other settings: choose another, or remove it"
            )
        if (folder / "result.json").exists():
            return runs.read_json(folder / "result.json")
    ranks.together()
    with runs.occupied(folder):
        return _run(subject, domain, settings, seed, folder, samples, keep, config, progress)


def _run(
    subject: Subject,
    domain: str,
    settings: Settings,
    seed: int,
    folder: Path,
    samples: int,
    keep: bool,
    config: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    code = runs.git_hash()
    train, held, test = subject.sentences(domain, seed)
    model = subject.make(seed, domain).to(ranks.device())
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    opt = settings.build(model, len(train), subject.steps(len(train)), seed)
    posterior_of = getattr(opt, "posterior", None)
    ranks.together()
    if ranks.first():
        runs.write_json(folder / "config.json", config)
        if keep and isinstance(settings, FinetuneIvon):
            base_posterior(weights, settings).save(folder / "base.safetensors")
    finetune(model, opt, train, subject, seed, folder / "checkpoint.pt", progress)
    posterior: Posterior | None = None
    if posterior_of is not None:  # of whole models: every rank takes part
        posterior = posterior_of(weights.items())
    ways: dict[str, Samples | None] = {"the mean": None}
    ways |= {"averaged": posterior} if posterior else {}
    scores = {
        part: {way: scored(model, q, rows, subject, samples) for way, q in ways.items()}
        for part, rows in (("validation", held), ("test", test))
    }
    if ranks.first():
        if keep and posterior:
            posterior.save(folder / "posterior.safetensors")
        elif keep:
            runs.write_tensors(folder / "model.safetensors", weights)
        provenance = runs.provenance(seed, domain, code)
        runs.write_json(folder / "result.json", {**config, **scores, "provenance": provenance})
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    ranks.together()
    return runs.read_json(folder / "result.json")


def base_posterior(weights: Mapping[str, Tensor], settings: FinetuneIvon) -> Posterior:
    """What IVON starts from: λ(h0 + δ) around a copy of the weights."""
    mean = {name: p.detach().clone() for name, p in weights.items()}
    start = settings.ess * (settings.hess_init + settings.weight_decay)
    precision = {name: torch.full_like(p, start) for name, p in mean.items()}
    prior = settings.ess * settings.weight_decay
    return Posterior(mean, precision, prior_precision=prior, ess=settings.ess)


def finetune(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    rows: Rows,
    subject: Subject,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Train on sentences: a warm-up of 5 % of the steps, linear decay, gradients clipped at 1.

    IVON's are not: it bounds its steps itself, and clipped gradients would hide from h how much a
    task's loss still varies, which merging needs. With ``checkpoint`` the state is kept there after
    each epoch, and taken up from there.

    Raises:
        Diverged: the loss is not finite.
    """
    steps = subject.steps(len(rows))
    rate = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min((t + 1) / (0.05 * steps), 1) * (1 - t / steps)
    )
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = runs.read_checkpoint(checkpoint)
        model.load_state_dict(saved["weights"], strict=False)
        taken_up(opt, rate, (saved["optimizer"], saved["rate"]))
        done = saved["epoch"]
    replica = ranks.replica(model)
    sampled_params: Any = getattr(opt, "sampled_params", lambda train: nullcontext())
    for epoch in range(done, subject.epochs):
        replica.train()
        torch.manual_seed(1_000_003 * seed + epoch)  # a resumed run repeats what is random
        order = list(batches(rows, subject.batch, seed, epoch))
        losses = []
        for chosen in progress(order, len(order), f"epoch {epoch + 1}"):
            mine = ranks.part(chosen)
            inputs, targets = padded(mine or chosen[:1])  # each rank makes a pass, if of nothing
            share = ranks.world() / len(chosen) if mine else 0.0
            with sampled_params(train=True):
                opt.zero_grad()
                loss = (
                    cross_entropy(subject.logits(replica, inputs), targets, reduction="sum") * share
                )
                loss.backward()
                if not isinstance(opt, IVON):
                    nn.utils.clip_grad_norm_(weights.values(), 1.0)
            opt.step()
            rate.step()
            losses.append(loss.detach())
        if not torch.stack(losses).isfinite().all():
            raise Diverged("the training diverged: the loss is not finite. Lower the lr")
        if checkpoint is not None and ranks.first():
            states = {"optimizer": opt.state_dict(), "rate": rate.state_dict(), "epoch": epoch + 1}
            kept = {name: p.detach() for name, p in weights.items()}
            runs.write_checkpoint(checkpoint, {"weights": kept, **states})
    opt.zero_grad()


def padded(rows: Rows) -> tuple[Inputs, Tensor]:
    """Sentences as one batch, and their classes, where this rank computes."""
    tokens = [torch.tensor(row) for row, _ in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    targets = torch.tensor([y for _, y in rows])
    where = ranks.device()
    return {"input_ids": ids.to(where), "attention_mask": mask.to(where)}, targets.to(where)


def batches(rows: Rows, size: int, seed: int, epoch: int) -> Iterator[list[Row]]:
    """An epoch in batches of like length, in random order."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    made = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size], key=lambda i: len(rows[i][0]))
        made += [pool[i : i + size] for i in range(0, len(pool), size)]
    for i in torch.randperm(len(made), generator=generator).tolist():
        yield [rows[j] for j in made[i]]


class _Classes(nn.Module):
    """A model as what gives the logits of its classes, with the model's own names."""

    def __init__(self, model: nn.Module, subject: Subject):
        super().__init__()
        self.module, self.subject = model, subject  # a name that posteriors see through

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (sentences, classes)."""
        return self.subject.logits(self.module, inputs)


def scored(
    model: nn.Module, posterior: Samples | None, rows: Rows, subject: Subject, samples: int
) -> Score:
    """Accuracy, NLL and ECE of a model on sentences; ranks divide the samples among them."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    groups = [padded(ordered[i : i + 50]) for i in range(0, len(ordered), 50)]
    asked = _Classes(model, subject)
    shared = samples >= ranks.world()
    found = [predict(asked, posterior, [x], samples, distributed=shared) for x, _ in groups]
    probs = torch.cat([each.probs.cpu() for each in found])
    log_probs = torch.cat([each.log_probs.cpu() for each in found])
    targets = torch.cat([y.cpu() for _, y in groups])
    return {
        "accuracy": metrics.accuracy(probs, targets),
        "nll": metrics.nll(log_probs, targets, log=True),
        "ece": metrics.ece(probs, targets, 20),
    }
