"""Does the network notice what it was not trained on? (section 4.2.2)

Fashion-MNIST against MNIST, and CIFAR-10 against emoji and MNIST, by the largest class probability
and by the entropy, for AdamW, SGD, and IVON at its mean and averaged over samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterity import Prediction, metrics, predict
from posterity.binding import Samples
from posterity_studies import compare, data, runs
from posterity_studies.recipes import Recipe, recipe
from posterity_studies.studies.pictures import label, picture
from posterity_studies.tasks import load_task
from posterity_studies.train import EVAL_BATCH, Progress, train

SCORES = {  # higher is more familiar
    "probability": lambda p: p.probs.amax(-1),
    "entropy": lambda p: -p.entropy,
    "mutual information": lambda p: -p.mutual_information,
}
METRICS = {
    "AUROC": metrics.auroc,
    "AUPR in": metrics.aupr,
    "AUPR out": lambda known, unknown: metrics.aupr(known, unknown, positive="out"),
    "FPR@95": metrics.fpr_at_95,
    "detection error": metrics.detection_error,
}
SAMPLES = 16
PAIRS = {  # known → unknown
    "fashion-mnist": ("mnist",),
    "cifar10": ("emoji", "mnist"),
    "cifar10-resnet20-frn": ("svhn", "flowers102"),  # the paper's
}
NAMES = {"desk": ("fashion-mnist", "cifar10"), "paper": ("cifar10-resnet20-frn",)}


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Every measure of telling known from unknown; means over seeds."""
    if scale != "smoke":
        samples = 64 if scale == "paper" else SAMPLES
        chosen = {name: replace(recipe(name), samples=samples) for name in NAMES[scale]}
    else:
        chosen = {"fashion-mnist": replace(recipe("smoke"), name="fashion-mnist", samples=3)}
    rows, digests = [], []
    for name, base in chosen.items():
        task = load_task(base)
        digests.append(task.digest)
        found = [judged(base, seed, out / name, progress) for seed in seeds]
        for unknown in PAIRS[name]:
            for method in found[0][unknown]:
                for score in SCORES:
                    each = [f[unknown][method].get(score) for f in found]
                    if each[0] is None:
                        continue
                    mean = {k: sum(e[k] for e in each) / len(each) for k in METRICS}
                    told = {"method": method, "known": name, "unknown": unknown, "score": score}
                    rows.append({**told, **mean, "accuracy": _mean(found, "accuracy", method)})
    draw(out / "ood.png", out, seeds[0], list(chosen))
    return {"rows": rows, "data": " ".join(digests)}


def _mean(found: Sequence[dict[str, Any]], what: str, method: str) -> float:
    return sum(f[what][method] for f in found) / len(found)


def judged(base: Recipe, seed: int, out: Path, progress: Progress) -> dict[str, Any]:
    """Train the optimizers with one seed and judge each by every unknown data set."""
    path = out / f"judged-seed{seed}.json"
    if path.exists():
        return runs.read_json(path)
    task, known = load_task(base), data.known(base.data)
    unknown = {
        name: known.normalise(known.as_seen(data.load(name).test.inputs))
        for name in PAIRS[base.name]
    }
    inputs = torch.cat([task.test[0], *unknown.values()])
    sizes = [len(task.test[0]), *map(len, unknown.values())]
    found: dict[str, Any] = {"accuracy": {}, **{name: {} for name in unknown}}
    entropies: dict[str, Tensor] = {}
    for optimizer in base.optimizers:
        folder = compare.run_folder(out, optimizer, seed)
        train(base, optimizer, seed, folder, progress)
        _, model, posterior = runs.load(folder)
        title = compare.LABELS[optimizer]
        methods: dict[str, Samples | None] = {title: None}
        if posterior is not None:
            methods = {f"{title} at the mean": None}
            methods[f"{title}, {base.samples} samples"] = posterior
        for method, q in methods.items():
            prediction = predict(model, q, inputs, base.samples, batch_size=EVAL_BATCH)
            entropies[method] = prediction.entropy
            probs = prediction.probs[: sizes[0]]
            found["accuracy"][method] = metrics.accuracy(probs, task.test[1])
            for name in unknown:
                found[name][method] = measures(prediction, sizes, list(unknown).index(name), q)
    runs.write_tensors(out / f"entropies-seed{seed}.safetensors", entropies)
    found["sizes"] = sizes
    runs.write_json(path, found)
    return found


def measures(
    prediction: Prediction, sizes: Sequence[int], which: int, sampled: object
) -> dict[str, dict[str, float]]:
    """Each measure of each score; at the mean there is no mutual information."""
    found = {}
    for score, of in SCORES.items():
        if score == "mutual information" and sampled is None:
            continue
        known, *others = of(prediction).split(list(sizes))
        found[score] = {name: f(known, others[which]) for name, f in METRICS.items()}
    return found


def draw(path: Path, out: Path, seed: int, names: Sequence[str]) -> None:
    """Histograms of the entropy: known filled, unknown as a line."""
    stored = [runs.read_tensors(out / n / f"entropies-seed{seed}.safetensors") for n in names]
    with picture(path, len(names) * 2) as panels:
        for k, (name, entropies) in enumerate(zip(names, stored, strict=True)):
            told = runs.read_json(out / name / f"judged-seed{seed}.json")
            methods, sizes = list(told["accuracy"]), told["sizes"]  # a file's order is the names'
            for panel, method in zip(panels[2 * k :], (methods[0], methods[-1]), strict=False):
                known, *others = entropies[method].split(sizes)
                bins = torch.linspace(0, math.log(10), 31).tolist()
                panel.hist(known.tolist(), bins, density=True, alpha=0.4, label=name)
                for unknown, values in zip(PAIRS[name], others, strict=True):
                    panel.hist(values.tolist(), bins, density=True, histtype="step", label=unknown)
                label(panel, method, "entropy, nats", "density")
                panel.set(yscale="log")
                panel.legend(fontsize=8)
