"""One run on several processes: torchrun starts them, DistributedDataParallel joins them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posterity.distributed import alone, rank, total, world

Batch = TypeVar("Batch", Tensor, list[Any])

__all__ = [
    "alone",
    "average",
    "device",
    "first",
    "joined",
    "part",
    "replica",
    "several",
    "together",
    "world",
]


def several() -> bool:
    """Whether torchrun (or Slurm with its variables) started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """The process group of these processes; nothing for one alone."""
    if not several():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Gloo's threads outlive the group, and one that drops its last tensor while the
        # interpreter ends aborts the process (pytorch/pytorch#179291).
        time.sleep(0.5)


def device() -> torch.device:
    """Where this rank computes: its own GPU, where there are any."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def first() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def together() -> None:
    """Wait for all ranks."""
    if not alone():
        dist.barrier()


def part(batch: Batch) -> Batch:
    """This rank's part of a batch; none where there are more ranks than examples."""
    return batch[rank() :: world()]


def replica(model: nn.Module) -> nn.Module:
    """The model as this rank trains it: gradients are averaged over ranks."""
    return model if alone() else nn.parallel.DistributedDataParallel(model)


def average(values: Tensor) -> Tensor:
    """The mean over ranks."""
    return values if alone() else total(values) / world()
