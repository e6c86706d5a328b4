"""Two data-parallel ranks on CPU (gloo); prints what they found as JSON. Run by test_ivon.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from posterity import IVON
from ways import LR, WAYS, X, Y, bits, network

SETTINGS = {
    "price": {},
    "gradsq": {"hess_approx": "gradsq", "gradsq_scale": 24.0},
    "capturable": {"capturable": True},
}


PAIRS = {"mc_samples": 2, "antithetic": True, "hess_every": 2}


class Half(nn.Module):
    """A rank's half of every batch, so that the ranks' gradients differ."""

    def __init__(self, rank: int):
        super().__init__()
        self.layers, self.rows = network(), slice(rank * 12, rank * 12 + 12)

    def forward(self) -> torch.Tensor:
        return ((self.layers(X[self.rows]) - Y[self.rows]) ** 2).mean()


def data_parallel(rank: int, way: str, **settings) -> dict[str, list]:
    """Training with a seed of its own on each rank, and an evaluation on one rank only."""
    model = Half(rank)
    wrapped = DistributedDataParallel(model)
    opt = IVON(wrapped.parameters(), **{**LR, **settings, "seed": LR["seed"] + rank})

    def grads():
        value = wrapped()
        value.backward()
        return value

    for _ in range(3):
        WAYS[way](opt, grads)
        if rank == 0:
            with opt.sampled_params():
                model()
    posterior = opt.posterior(wrapped)
    assert posterior.names[0] == "layers.0.weight", posterior.names
    return {name: value.double().tolist() for name, value in bits(model.layers, opt).items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found: dict[str, object] = {
        f"{name} {way}": data_parallel(rank, way, **settings)
        for name, settings in SETTINGS.items()
        for way in WAYS
    }
    found["pairs closure"] = data_parallel(rank, "closure", **PAIRS)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
