"""What ranks of a process group must share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def alone() -> bool:
    """Whether there are no other ranks to agree with."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def broadcast(words: list[int], device: torch.device) -> list[int]:
    """Rank 0's integers on every rank."""
    message = torch.tensor(words, dtype=torch.int64, device=device)
    dist.broadcast(message, src=0)
    return message.tolist()


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor (told by its face: importing the class takes seconds)."""
    return hasattr(p, "device_mesh")
