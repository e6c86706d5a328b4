"""What is measured: optimizers alone, their memory, whole training steps, samples, sizes."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers import BASE, PEERS, nothing, ours, parameters
from benchmarks.ranks import NUMEL, WAYS
from benchmarks.timing import ratio
from posterity import Posterior
from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.models.resnet import resnet20, resnet50

Rows = Iterator[tuple[str, str, dict[str, float] | None]]  # case, peer, what was found


def shapes_of(make: Callable[[], nn.Module]) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in make().parameters()]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "50 x 500k": lambda: [(500_000,)] * 50,
    "ResNet-50": lambda: shapes_of(resnet50),
    "GPT-2 124M": lambda: shapes_of(lambda: GPT(GPTConfig())),
    "10k MLP": lambda: [(64, 100), (100,), (100, 30), (30,)],
}


def optimizers(device: str, threads: int, rounds: int) -> Rows:
    """Steps on given gradients: the optimizer's own cost.

    All step the same parameters, each with a state of its own; one stands in memory beside AdamW.
    """
    torch.set_num_threads(threads)
    on = device if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    for case, shapes in SHAPES.items():
        params = parameters(shapes(), device)
        numel = sum(p.numel() for p in params)
        large = numel > 1_000_000
        base = PEERS[BASE].build(params)
        for name, peer in PEERS.items():
            if name == BASE or (peer.slow and threads == 1):
                continue
            opt = peer.build(params)
            found = ratio(
                lambda: peer.step(opt, nothing),
                base.step,
                rounds=3 if peer.slow and large else rounds,
                device=device,
                numel=numel,
                repeats=1 if large and (device == "cpu" or peer.slow) else 50,
            )
            yield f"{case}, {on}", name, found
        if device == "cuda":
            base = torch.optim.AdamW(params, 1e-5, fused=True, capturable=True)
            whole = replayed(base.step)
            for name, settings in (("IVON", {}), ("IVON, no mean", {"store_mean": False})):
                opt = ours(capturable=True, **settings)(params)
                mine = replayed(partial(PEERS[name].step, opt, nothing))
                found = ratio(mine, whole, rounds=rounds, device=device, numel=numel, repeats=50)
                yield f"{case}, CUDA graphs of whole steps", name, found


def replayed(step: Callable[[], object]) -> Callable[[], None]:
    """A step as a CUDA graph, for which the host does nothing but start it.

    The graph knows the optimizer's memory by address: keep the optimizer.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def memory(numel: int, device: str) -> Rows:
    """Peak memory in parameter sizes, parameters and gradients included, each in a new process."""
    for name in PEERS:
        command = [sys.executable, "-m", "benchmarks", "--device", device]
        command += ["--peak", name, "--numel", str(numel)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield f"peak memory at {numel / 1e6:g}M", name, {"sizes": float(done.stdout)}


def ranks() -> Rows:
    """What each of two ranks sends in a step, and its peak memory, in new processes."""
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # glibc keeps none
    for way in WAYS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "benchmarks.ranks", way]
        environment = {**os.environ, **exact}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        yield f"a rank of two, {NUMEL / 1e6:.0f}M parameters", way, json.loads(done.stdout)


Network = tuple[str, nn.Module, Callable[[nn.Module], Tensor]]  # with the loss of a batch


def networks(device: str) -> Iterator[Network]:
    """Networks to train."""
    if device == "cuda":
        model = torch.compile(GPT(GPTConfig()).to(device))
        tokens = torch.randint(50257, (8, 1025), device=device)

        def loss(m: nn.Module) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                logits = m(tokens[:, :-1]).flatten(0, 1)
                return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

        yield "GPT-2 124M, batch 8", model, loss
        return
    for batch in (1, 4, 16):
        tokens = torch.randint(512, (batch, 257))
        model = GPT(GPTConfig(6, 6, 384, 256, 512))
        yield f"GPT 10.9M, batch {batch}", model, lambda m: m.loss(tokens)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    yield (
        "ResNet-20, batch 128",
        resnet20(),
        lambda m: nn.functional.cross_entropy(m(images), labels),
    )


def training(device: str, rounds: int) -> Rows:
    """Whole steps: forward and backward pass and optimizer; on a GPU their peak memory too."""
    torch.set_num_threads(2)
    for case, model, loss in networks(device):
        params = list(model.parameters())

        def closure():
            model.zero_grad()
            loss(model).backward()

        def peak(name: str) -> int:
            """Bytes, with no other optimizer in memory."""
            opt, peer = PEERS[name].build(params), PEERS[name]
            for _ in range(2):
                peer.step(opt, closure)
            gc.collect()  # the last one
            torch.cuda.reset_peak_memory_stats()
            peer.step(opt, closure)
            return torch.cuda.max_memory_allocated()

        names = ("IVON", "IVON, no mean", "IVON, context", "ivon-opt")
        peaks = {name: peak(name) for name in (BASE, *names)} if device == "cuda" else {}
        base = PEERS[BASE].build(params)

        def least():
            closure()
            base.step()

        for name in names:
            opt, peer = PEERS[name].build(params), PEERS[name]
            few = max(rounds // 2, 3) if peer.slow else rounds
            times = 20 if device == "cuda" else 1
            step = partial(peer.step, opt, closure)
            found = ratio(step, least, rounds=few, device=device, repeats=times)
            if found and peaks:
                found["memory ratio"] = peaks[name] / peaks[BASE]
                found["gigabytes"] = peaks[name] / 1e9
            yield case, name, found


def drawing(numel: int, rounds: int) -> Rows:
    """A posterior sample written into a model, beside torch.randn of as many numbers."""
    torch.set_num_threads(2)
    model = nn.ParameterList(torch.empty(numel // 50) for _ in range(50))
    mean = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    posterior = Posterior(mean, {name: torch.rand_like(m) + 1 for name, m in mean.items()})
    out, noise = dict(model.named_parameters()), torch.empty(numel)
    draw, base = lambda: posterior.sample(0, 1, out), lambda: torch.randn(numel, out=noise)
    yield f"a sample of {numel / 1e6:g}M", "ratio to torch.randn", ratio(draw, base, rounds=rounds)


def sizes(device: str, rounds: int) -> Rows:
    """Cost against the number of parameters."""
    torch.set_num_threads(2)
    for exponent in (4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, math.log10(3e8)):
        numel, whole = round(10**exponent), 500_000
        shapes = [(whole,)] * (numel // whole) + [(numel % whole,)] * (numel % whole > 0)
        params = parameters(shapes, device)
        base = PEERS[BASE].build(params)
        for name in ("IVON", "IVON, no mean", "ivon-opt"):
            peer = PEERS[name]
            if peer.slow and numel > 3e7:
                continue
            opt = peer.build(params)
            found = ratio(
                lambda: peer.step(opt, nothing),
                base.step,
                rounds=rounds,
                device=device,
                numel=numel,
                repeats=10 if device == "cuda" else 1,
            )
            yield f"{numel:,} parameters", name, found and found | {"numel": numel}
