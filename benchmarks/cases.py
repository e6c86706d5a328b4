"""What is measured: optimizers alone, their memory, whole training steps, samples, sizes."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import BASE, PEERS, nothing, parameters
from benchmarks.timing import ratio, seconds
from posterity import Posterior
from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.models.resnet import resnet20, resnet50_shapes

Rows = Iterator[tuple[str, str, dict[str, float] | None]]  # case, peer, what was found


def gpt2_shapes() -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in GPT(GPTConfig()).parameters()]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "50 x 500k": lambda: [(500_000,)] * 50,
    "ResNet-50": resnet50_shapes,
    "GPT-2 124M": gpt2_shapes,
    "10k MLP": lambda: [(64, 100), (100,), (100, 30), (30,)],
}


def optimizers(device: str, threads: int, rounds: int) -> Rows:
    """Steps on given gradients: the optimizer's own cost."""
    torch.set_num_threads(threads)
    for case, shapes in SHAPES.items():
        params = parameters(shapes(), device)
        numel = sum(p.numel() for p in params)
        repeats = 1 if numel > 1e6 else 50  # of a step too short for the clock
        base = PEERS[BASE].build(params)
        for name, peer in PEERS.items():
            if name == BASE or (peer.slow and threads == 1):
                continue
            opt = peer.build(params)

            def work(opt=opt, peer=peer):
                for _ in range(repeats):
                    peer.step(opt, nothing)

            def least():
                for _ in range(repeats):
                    base.step()

            few = 3 if peer.slow and numel > 1e6 else rounds
            found = ratio(work, least, rounds=few, device=device, numel=numel)
            yield f"{case}, {threads} thread{'s' * (threads > 1)}", name, found


def memory(numel: int) -> Rows:
    """Peak memory in parameter sizes, parameters and gradients included, each in a new process."""
    for name in PEERS:
        command = [sys.executable, "-m", "benchmarks", "--peak", name, "--numel", str(numel)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield f"peak memory at {numel / 1e6:g}M", name, {"sizes": float(done.stdout)}


def peak(name: str, numel: int) -> float:
    """Peak memory of this process for five steps, less what it had before, in parameter sizes."""
    shapes = [(numel // 50,)] * 50
    warm = PEERS[name].build(parameters([(8,)]))  # what any use of the library takes
    PEERS[name].step(warm, nothing)
    before = resident()
    params = parameters(shapes)
    opt = PEERS[name].build(params)
    for _ in range(5):
        PEERS[name].step(opt, nothing)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / (4 * numel)


def resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def networks() -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], Tensor]]]:
    """Networks to train, with the loss of a batch."""
    for batch in (1, 4, 16):
        tokens = torch.randint(512, (batch, 257))
        yield (
            f"GPT 10.9M, batch {batch}",
            GPT(GPTConfig(6, 6, 384, 256, 512)),
            lambda m: m.loss(tokens),
        )
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    yield (
        "ResNet-20, batch 128",
        resnet20(),
        lambda m: nn.functional.cross_entropy(m(images), labels),
    )


def training(rounds: int) -> Rows:
    """Whole steps: forward and backward pass and optimizer."""
    torch.set_num_threads(2)
    for case, model, loss in networks():
        params = list(model.parameters())
        base = PEERS[BASE].build(params)

        def closure(model=model, loss=loss):
            model.zero_grad()
            loss(model).backward()

        def least():
            closure()
            base.step()

        for name in ("IVON", "IVON, no mean", "IVON, context", "ivon-opt"):
            opt, peer = PEERS[name].build(params), PEERS[name]

            def work(opt=opt, peer=peer):
                peer.step(opt, closure)

            yield case, name, ratio(work, least, rounds=3 if peer.slow else rounds)


def drawing(numel: int, rounds: int) -> Rows:
    """A posterior sample written into a model's tensors, beside torch.randn of the same number."""
    torch.set_num_threads(2)
    shapes = {str(i): (numel // 50,) for i in range(50)}
    mean = {name: torch.randn(shape) for name, shape in shapes.items()}
    posterior = Posterior(mean, {name: torch.rand(shape) + 1 for name, shape in shapes.items()})
    model = {name: torch.empty(shape) for name, shape in shapes.items()}
    noise = torch.empty(numel)
    found = ratio(
        lambda: posterior.sample(0, 1, out=model),
        lambda: torch.randn(numel, out=noise),
        rounds=rounds,
    )
    yield f"a sample of {numel / 1e6:g}M", "beside torch.randn", found


def sizes(device: str, rounds: int) -> Rows:
    """Cost against the number of parameters."""
    torch.set_num_threads(2)
    for exponent in (4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, math.log10(3e8)):
        numel = round(10**exponent)
        whole = 500_000
        shapes = [(whole,)] * (numel // whole) + [(numel % whole,)] * (numel % whole > 0)
        params = parameters(shapes, device)
        for name in (BASE, "IVON", "IVON, no mean", "ivon-opt"):
            peer = PEERS[name]
            if peer.slow and numel > 3e7:
                continue
            opt: Any = peer.build(params)
            for _ in range(2):
                peer.step(opt, nothing)
            took = [seconds(lambda: peer.step(opt, nothing), device) for _ in range(rounds)]
            yield "cost against size", name, {"numel": numel, "seconds": sorted(took)[rounds // 2]}
