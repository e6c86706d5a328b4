"""Peak memory of a process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.peers import PEERS, nothing, parameters


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage's peak is the parent's, across exec
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024


def peak(name: str, numel: int, device: str) -> float:
    """Peak memory of this process for five steps, less what it had before, in parameter sizes."""
    peer = PEERS[name]
    warm = peer.build(parameters([(8,)], device))  # what any use of the library takes
    peer.step(warm, nothing)
    before = peak_bytes(device)
    params = parameters([(numel // 50,)] * 50, device)
    opt = peer.build(params)
    for _ in range(5):
        peer.step(opt, nothing)
    return (peak_bytes(device) - before) / (4 * numel)
