"""What each use of a posterior costs, from 10,000 weights to 135 million.

Every use is timed as a user would call it, after one call that is not counted where it is short;
memory is the peak above what the model and its posterior hold already, in sizes of the weights.
Inputs are random where only the cost matters; MiniLM's are real sentences.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posterity import Posterior, predict, sensitivity
from posterity.merging import merge
from posterity_studies.data import packages
from posterity_studies.models import lenet5
from posterity_studies.models.gpt import GPT, GPTConfig
from posterity_studies.models.resnet import resnet20
from posterity_studies.train import Progress, forget_peak_memory, peak_memory

EXAMPLES = 32


@dataclass(frozen=True, eq=False)
class Case:
    """A model and data for it; ``vectorize``: whether its control flow allows it."""

    name: str
    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    vectorize: bool = True


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Seconds and memory of each use, a row for each model."""
    torch.manual_seed(seeds[0])
    makers = [mlp, lenet, resnet, gpt, minilm, smollm2][: 2 if scale == "smoke" else None]
    rows = []
    for make in progress(makers, len(makers), "models"):
        rows += measured(make(), out)
        gc.collect()
    if scale == "desk":
        rows += [whole(5000, variance) for variance in ("jacobian", "samples")]
    read = " ".join(packages.PACKAGES[name].sha256 for name in ("minilm", "sentiment", "smollm2"))
    return {"rows": rows, "data": "random" if scale == "smoke" else read}


def measured(case: Case, out: Path) -> list[dict[str, Any]]:
    """Each use, on one model."""
    model = case.model.eval()
    mean = dict(model.named_parameters())
    size = sum(p.numel() for p in mean.values())
    precision = {name: torch.full_like(p, 1e6) for name, p in mean.items()}
    posterior = Posterior(mean, precision, prior_precision=1.0, ess=1000)
    path = out / "posterior.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    inputs = [x for x, _ in case.batches]
    n = sum(len(y) for _, y in case.batches)
    by = {"data": case.batches, "vectorize": case.vectorize}
    uses: dict[str, tuple[Callable[[], Any], float]] = {
        "save": (lambda: posterior.save(path), 1),
        "load": (lambda: Posterior.load(path), 1),
        "sample": (lambda: posterior.sample(0, 0), 1),
        "prune": (lambda: posterior.prune(1.0), 1),
        "merge two": (lambda: merge([posterior, posterior], base=posterior), 1),
        "predict, a sample, 100 examples": (
            lambda: predict(model, posterior, inputs, samples=2), 200 / n
        ),
        "sensitivity by Jacobians, 100 examples": (
            lambda: sensitivity(model, posterior, **by), 100 / n
        ),
        "sensitivity by 16 samples, 100 examples": (
            lambda: sensitivity(model, posterior, **by, variance="samples", samples=16), 100 / n
        ),
    }  # fmt: skip
    rows = []
    for use, (call, factor) in uses.items():
        seconds, peak = timed(call)
        row = {"method": case.name, "weights": size, "use": use, "seconds": seconds * factor}
        rows.append({**row, "MiB": peak, "sizes": peak * 2**20 / (4 * size)})
    path.unlink(missing_ok=True)
    return rows


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and peak memory in MiB; the best of three where a call is short."""
    gc.collect()
    forget_peak_memory()
    before = peak_memory()
    start = time.perf_counter()
    call()
    best = time.perf_counter() - start
    peak = max(peak_memory() - before, 0.0)
    if best < 30:  # the very first derivative also loads the tables of them
        for _ in range(3 if best < 2 else 1):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return best, peak


def images(model: nn.Module, name: str, shape: tuple[int, ...]) -> Case:
    """A network for images."""
    return Case(name, model, [(torch.randn(EXAMPLES, *shape), torch.randint(10, (EXAMPLES,)))])


def mlp() -> Case:
    """Two dense layers."""
    layers = nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10)
    return images(nn.Sequential(*layers), "MLP", (1, 28, 28))


def lenet() -> Case:
    """A small convolutional network."""
    return images(lenet5(), "LeNet-5", (1, 28, 28))


def resnet() -> Case:
    """A residual network."""
    return images(resnet20(), "ResNet-20", (3, 32, 32))


def gpt() -> Case:
    """A small GPT on sequences of 64 tokens."""
    shape = GPTConfig(layers=6, heads=6, width=384, context=128, vocabulary=512)
    tokens = torch.randint(512, (8, 65))
    return Case("GPT", GPT(shape), [(tokens[:, :-1], tokens[:, 1:])])


def minilm() -> Case:
    """MiniLM with a head for two classes, on sentences."""
    model, batches = _sentences(EXAMPLES)
    return Case("MiniLM-L6", model, list(batches), vectorize=False)


def smollm2() -> Case:
    """SmolLM2-135M on sequences of 32 tokens."""
    model = packages.smollm2()
    tokens = torch.randint(1000, (2, 33))
    return Case("SmolLM2", model, [(tokens[:, :-1], tokens[:, 1:])], vectorize=False)


def whole(n: int, variance: Literal["jacobian", "samples"]) -> dict[str, Any]:
    """Sensitivity of MiniLM to n sentences."""
    model, batches = _sentences(n)
    mean = dict(model.named_parameters())
    posterior = Posterior(mean, {k: torch.full_like(p, 1e6) for k, p in mean.items()}, ess=n)
    how: dict[str, Any] = {"vectorize": False} if variance == "jacobian" else {"samples": 16}
    start = time.perf_counter()
    scores = sensitivity(model.eval(), posterior, batches, variance=variance, **how)
    seconds = time.perf_counter() - start
    size = sum(p.numel() for p in mean.values())
    by = "Jacobians" if variance == "jacobian" else "16 samples"
    use = f"sensitivity by {by}, {len(scores)} sentences"
    return {"method": "MiniLM-L6", "weights": size, "use": use, "seconds": seconds}


def _sentences(n: int) -> tuple[nn.Module, Iterator[tuple[Any, Tensor]]]:
    """MiniLM, and sentences in batches of like length."""
    tokenizer = packages.transformers().AutoTokenizer.from_pretrained(packages.folder("minilm"))
    model = packages.minilm()
    texts, labels = packages.sentiment("movies")
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:n].tolist()
    order = sorted(chosen, key=lambda i: len(texts[i]))

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for start in range(0, n, EXAMPLES):
            rows = order[start : start + EXAMPLES]
            told = {"padding": True, "truncation": True, "max_length": 64}
            x = tokenizer([texts[i] for i in rows], return_tensors="pt", **told)
            yield dict(x), torch.tensor([labels[i] for i in rows])

    return model, batches()
