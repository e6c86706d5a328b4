"""Finetuning: the one loop over batches of sentences, for any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from posterity import IVON

Row = tuple[list[int], int]  # tokens, class
Rows = Sequence[Row]
Batch = tuple[dict[str, Tensor], Tensor]
Logits = Callable[[nn.Module, dict[str, Tensor]], Tensor]  # of the classes


@dataclass(frozen=True)
class AdamW:
    """AdamW; vectors decay too, for few of them are trained."""

    lr: float
    weight_decay: float = 0.01

    def build(self, weights: Sequence[nn.Parameter], seed: int) -> torch.optim.Optimizer:
        """The optimizer of some weights."""
        return torch.optim.AdamW(weights, self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Ivon:
    """IVON as the paper finetunes: λ itself, steps clipped and not rescaled."""

    lr: float
    ess: float
    hess_init: float = 1e-3
    beta2: float = 0.995
    weight_decay: float = 1e-6
    clip_radius: float = 1e-3

    def build(self, weights: Sequence[nn.Parameter], seed: int) -> torch.optim.Optimizer:
        """The optimizer of some weights."""
        return IVON(
            weights,
            self.lr,
            ess=self.ess,
            hess_init=self.hess_init,
            betas=(0.9, self.beta2),
            weight_decay=self.weight_decay,
            clip_radius=self.clip_radius,
            rescale_lr=False,
            seed=seed,
        )


def class_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Of a model with a head for classes."""
    return model(**inputs).logits


def finetune(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    rows: Rows,
    *,
    batch: int,
    epochs: int,
    seed: int,
    logits: Logits = class_logits,
) -> None:
    """Train on sentences: a warm-up of 5 % of the steps, linear decay, gradients clipped at 1."""
    steps = epochs * math.ceil(len(rows) / batch)
    rate = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min((t + 1) / (0.05 * steps), 1) * (1 - t / steps)
    )
    weights = [p for group in opt.param_groups for p in group["params"]]
    sampled_params: Any = getattr(opt, "sampled_params", lambda train: nullcontext())
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches(rows, batch, generator):
            with sampled_params(train=True):
                opt.zero_grad()
                cross_entropy(logits(model, inputs), targets).backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
            opt.step()
            rate.step()
    opt.zero_grad()


def padded(rows: Rows) -> Batch:
    """Sentences as one batch."""
    tokens = [torch.tensor(row) for row, _ in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([y for _, y in rows])


def batches(rows: Rows, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """An epoch in batches of like length, in random order."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    made = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size], key=lambda i: len(rows[i][0]))
        made += [pool[i : i + size] for i in range(0, len(pool), size)]
    for i in torch.randperm(len(made), generator=generator).tolist():
        yield padded([rows[j] for j in made[i]])
