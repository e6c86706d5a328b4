"""Ratios to fused AdamW, of rounds that alternate with its own in the same minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

SLOWED = 2e-9  # seconds a parameter and thread: above it the machine is busy with other things


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(
    work: Callable[[], object],
    base: Callable[[], object],
    *,
    rounds: int,
    device: str = "cpu",
    numel: int = 0,
    repeats: int = 1,
) -> dict[str, float] | None:
    """Median seconds of both and their ratio; None where the machine was too busy.

    Args:
        work: one step of the optimizer in question.
        base: one step of fused AdamW.
        rounds: of both, in turns, after two to warm up.
        device: that both run on.
        numel: number of parameters, where ``base`` is the optimizer alone: rounds in which it
            takes more than 1 ms per million on two threads are thrown away.
        repeats: steps of a round, where one is too short for the clock; on a GPU they are issued
            one after another, as a training loop does.
    """

    def several(step: Callable[[], object]) -> float:
        def steps() -> None:
            for _ in range(repeats):
                step()

        return seconds(steps, device) / repeats

    kept = []
    for i in range(rounds + 2):
        pair = [several(step) for step in ((base, work) if i % 2 else (work, base))]
        least, mine = pair if i % 2 else pair[::-1]
        if i >= 2 and (numel < 1_000_000 or least * torch.get_num_threads() < SLOWED * numel):
            kept.append((least, mine))
    if 2 * len(kept) < rounds:
        return None
    least, mine = (median(column) for column in zip(*kept, strict=True))
    return {"ratio": mine / least, "seconds": mine, "base": least, "rounds": len(kept)}
