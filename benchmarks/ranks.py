"""What one of two ranks sends and holds: run by torchrun, once for each way of training.

The words on the wire are the loopback device's, so they are what gloo really sent, headers too.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from posterity import IVON, reduce_per_rank

LAYERS, WIDTH, STEPS = 20, 1024, 5
NUMEL = LAYERS * WIDTH * WIDTH


def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 1e-5, fused=True)


def ivon(params: list[Tensor], **settings) -> IVON:
    return IVON(params, 1e-3, ess=1e6, seed=0, fused=True, **settings)


WAYS = ("DDP, AdamW", "DDP, IVON", "DDP, IVON, per_rank", "FSDP2, AdamW", "FSDP2, IVON")


def sent() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def measured(way: str) -> dict[str, float]:
    """Words a parameter and step that a rank sends; peak memory of a rank in sizes of the weights.

    Of the peak, what the process took before it had a model is left out.
    """
    before = peak_bytes("cpu")
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if way.startswith("FSDP2"):
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    params = list(model.parameters())
    if way.endswith("AdamW"):
        opt = adamw(params)
    else:
        opt = ivon(params, samples="per_rank" if way.endswith("per_rank") else "shared")
    if way.endswith("per_rank"):
        model.register_comm_hook(opt, reduce_per_rank)
    x, start = torch.randn(4, WIDTH), 0
    for step in range(2 + STEPS):
        if step == 2:
            dist.barrier()
            start = sent()
        with opt.sampled_params(train=True) if isinstance(opt, IVON) else nullcontext():
            opt.zero_grad()
            model(x).square().mean().backward()
        opt.step()
    dist.barrier()
    words = (sent() - start) / (4 * NUMEL * STEPS * dist.get_world_size())
    return {"words": words, "sizes": (peak_bytes("cpu") - before) / (4 * NUMEL)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measured(sys.argv[1])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
