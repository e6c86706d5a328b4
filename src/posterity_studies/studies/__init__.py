"""What the posterior is for, tried on real data. One module a study, named in ``STUDIES``.

A module holds ``study(out, seeds, scale, progress)``: it trains what it needs under the folder
``out`` (what is finished there is used again), draws its pictures into it, and returns plain
values: ``rows`` is the table (flat dictionaries), ``data`` a digest of what was read, the rest is
its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from posterity_studies import runs
from posterity_studies.recipes import UserError, unknown
from posterity_studies.train import Progress, silent

# smoke: seconds, for tests, its numbers mean nothing; gpu: minutes on one; paper: the
# published size, on several
Scale = Literal["smoke", "desk", "gpu", "paper"]
GPU = ("pretraining", "classification")  # studies that have that scale
PAPER = (
    "pretraining",
    "classification",
    "in-domain",
    "mc-samples",
    "ood",
    "finetuning",
    "merging",
)

STUDIES: dict[str, str] = {  # name → what it asks, in a line
    "pretraining": "Does IVON train a language model from scratch as well as AdamW?",
    "classification": "Is a residual network as accurate with IVON, and better calibrated?",
    "defaults": "Is IVON untouched as good as AdamW, tuned on each task?",
    "rates": "Does AdamW's rate carry over to IVON, for finetuning?",
    "leave-one-out": "Does the estimate from training data alone follow the test loss?",
    "in-domain": "How sure should one run be, beside eleven other ways and ensembles?",
    "mc-samples": "How many samples does it take, in training and at test time?",
    "agreement": "How near is each method to the exact posterior of a small network?",
    "ood": "Does the network notice what it was not trained on?",
    "selective": "Does abstention keep its promise, what can be pruned, and how warm should it be?",
    "finetuning": "Is a finetuned language model as accurate with IVON, and better calibrated?",
    "merging": "Is IVON's Hessian good for merging finetuned models?",
    "cost": "What does each use of a posterior cost, from 10,000 weights to 135 million?",
    "label-noise": "Does sensitivity find wrong labels, and better than the loss?",
    "tabular": "How good are predictive distributions of tables' numbers?",
    "gap": "Does the variance grow between the data?",
    "language": "Does averaging over posterior samples improve perplexity?",
}


def study(
    name: str, out: Path, seeds: Sequence[int], scale: Scale = "desk", progress: Progress = silent
) -> dict[str, Any]:
    """Run a study, or return what it found before; ``out/result.json`` holds it with provenance.

    Raises:
        UserError: an unknown study, no seeds, or the folder holds a result of other seeds or scale.
    """
    if name not in STUDIES:
        raise UserError(unknown("study", name, STUDIES))
    having = {"gpu": GPU, "paper": PAPER}.get(scale)
    if having is not None and name not in having:
        raise UserError(f"{name} has no scale {scale!r}; {', '.join(having)} have")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds needs one number or more, each once")
    asked = {"study": name, "scale": scale, "seeds": list(seeds)}
    if (out / "result.json").exists():
        found = runs.read_json(out / "result.json")
        if {key: found.get(key) for key in asked} != asked:
            raise UserError(f"{out} holds another result: choose another --out, or remove it")
        return found
    code = runs.git_hash()  # of what runs, not of what lies there when it has run
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found = module.study(out, seeds, scale, progress)
    seed = " ".join(map(str, seeds))
    provenance = {**runs.provenance(seed, found["data"]), "git": code}
    result = {**asked, **found, "provenance": provenance}
    runs.write_json(out / "result.json", result)
    return result
