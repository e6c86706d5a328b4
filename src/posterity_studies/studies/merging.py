"""Is IVON's Hessian good for merging finetuned models? (section 4.3)

MiniLM is finetuned with IVON on five domains of sentiment, each alone, and on all together; its
table of word vectors stays as it is. The five models are merged by every method; what a method can
choose is chosen by accuracy on held-out sentences, five trials each. The squared gradients are
those of single examples, in a further pass over all the training data. At the paper's scale it is
RoBERTa, in full, on reviews.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from posterity import IVON, Mixture, Posterior, predict
from posterity.merging import merge
from posterity_studies import ranks, runs
from posterity_studies.data import packages
from posterity_studies.finetune import base_posterior, finetune, padded
from posterity_studies.recipes import UserError
from posterity_studies.settings import FinetuneIvon
from posterity_studies.studies.pictures import label, picture
from posterity_studies.subjects import TINY, MiniLM, Pretrained, Rows, Splits, Subject
from posterity_studies.train import Progress

SUBJECTS: dict[str, Subject] = {
    "smoke": TINY,
    "desk": MiniLM(),
    "paper": Pretrained(
        model="FacebookAI/roberta-base",
        domains=("imdb", "yelp", "rotten-tomatoes", "sst2", "amazon"),
        train=25_000,
    ),
}
# λ is above the number of sentences: at λ = n the noise is only small enough to learn with h0 ≥ 10,
# from which h does not move in a hundred steps. With a memory as long as a domain's 188 steps h
# keeps its start, and its ranks hardly agree with the squared gradients'.
SETTINGS = FinetuneIvon(lr=0.03, ess=1e7, memory=20)
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the sum of task vectors
FLOORS = (0.03, 0.1, 0.3, 1.0, 3.0)  # δ0, in mean Hessians: between averaging and their sum
LEAST = 1e-6  # Hessian of a weight, as a share of the largest mean Hessian of a tensor

Score = dict[str, dict[str, float]]  # metric → domain → value


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Accuracy of every method on every domain."""
    subject = SUBJECTS[scale]
    for seed in seeds:  # all of the training first: it takes the longest
        prepared(out / f"seed{seed}", seed, subject, progress)
    found = [merged(out / f"seed{seed}", seed, subject, progress) for seed in seeds]
    rows = []
    for method in found[0]["test"]:
        tests = [f["test"][method] for f in found]
        each = torch.tensor([[t["accuracy"][d] for d in subject.domains] for t in tests])
        shown = torch.cat([each, each.mean(1, keepdim=True)], 1)
        nll = sum(sum(t["nll"].values()) for t in tests) / len(tests) / len(subject.domains)
        rows.append(
            {
                "method": method,
                **dict(zip((*subject.domains, "average"), map(_spread, shown.T), strict=True)),
                "NLL": nll,
                "chosen": " ".join(f["chosen"].get(method, "") for f in found),
                "further seconds": sum(f["further"].get(method, 0.0) for f in found) / len(found),
            }
        )
    draw(out / "merging.png", found)
    read = " ".join(packages.PACKAGES[name].sha256 for name in ("minilm", "sentiment", "airline"))
    told = " ".join(subject.domains) if scale == "paper" else read
    settings = {**asdict(SETTINGS), **asdict(subject)}
    return {"rows": rows, "data": told, "settings": settings, "runs": found}


def _spread(values: Tensor) -> str:
    """Mean ± standard deviation, in percent."""
    mean = f"{100 * values.mean().item():.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * values.std().item():.2f}"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What there is to merge."""

    base: nn.Module
    start: Posterior  # the base's weights
    splits: Mapping[str, Splits]
    tuned: dict[str, Posterior]
    squared: dict[str, Posterior]
    multitask: Posterior


def prepared(folder: Path, seed: int, subject: Subject, progress: Progress) -> Prepared:
    """Finetune on each domain and on all, and square gradients; what is done is read."""
    domains = subject.domains
    base = subject.make(seed, domains[0]).to(ranks.device())
    start = base_posterior(trained(base), SETTINGS)
    splits = {domain: subject.sentences(domain, seed) for domain in domains}
    together = [row for domain in domains for row in splits[domain][0]]
    sets = {**{domain: splits[domain][0] for domain in domains}, "multitask": together}
    tuned, squared = {}, {}
    for name in progress(sets, len(sets), f"finetuning, seed {seed}"):
        path = folder / f"{name}.safetensors"
        tuned[name] = finetuned(path, base, start, sets[name], subject, seed)
    for domain in progress(domains, len(domains), f"squared gradients, seed {seed}"):
        path = folder / f"{domain}-squares.safetensors"
        squared[domain] = squares(path, base, tuned[domain], sets[domain])
    return Prepared(base, start, splits, tuned, squared, tuned.pop("multitask"))


def merged(folder: Path, seed: int, subject: Subject, progress: Progress) -> dict[str, Any]:
    """Merge by every method, and test."""
    done = folder / "result.json"
    if done.exists():
        return runs.read_json(done)
    ready = prepared(folder, seed, subject, progress)
    domains, base, start = subject.domains, ready.base, ready.start
    held, test = ({d: ready.splits[d][k] for d in domains} for k in (1, 2))
    models, fishers = [raised(q) for q in ready.tuned.values()], list(ready.squared.values())
    vectors = {
        "task arithmetic": {"method": "task_arithmetic"},
        "TIES": {"method": "ties", "density": 0.5},
        "DARE": {"method": "dare_linear", "density": 0.5},
    }
    reach = {"TIES": len(domains)}  # an average of the vectors, not their sum
    trials: dict[str, dict[str, Callable[[], Posterior]]] = {
        "Hessian of IVON": matched(models, start),
        "squared gradients": matched(fishers, start),
        **{
            name: {
                f"α {a:g}": partial(merge, models, base=start, alpha=a, **how)
                for a in (reach.get(name, 1) * a for a in ALPHAS)
            }
            for name, how in vectors.items()
        },
        "Fisher average, Hessian of IVON": {"": partial(merge, models, method="fisher")},
        "Fisher average, squared gradients": {"": partial(merge, fishers, method="fisher")},
        "product of posteriors": {"": partial(merge, models, base=prior(start), method="product")},
        "simple average": {"": partial(merge, models, method="average")},
    }
    found: dict[str, Any] = {"seed": seed, "test": {}, "validation": {}, "chosen": {}}
    pass_over = sum(q.settings["seconds"] for q in fishers)
    found["further"] = {method: pass_over for method in trials if "squared" in method}
    for method, candidates in progress(trials.items(), len(trials), f"merging, seed {seed}"):
        scores, best = {}, None
        for name, make in candidates.items():
            candidate = make()
            scores[name] = evaluated(base, candidate, held)
            if best is None or _better(scores[name], scores[best[0]]):
                best = name, candidate
        assert best is not None
        found["validation"][method], found["chosen"][method] = scores, best[0]
        found["test"][method] = evaluated(base, best[1], test)
    found["test"]["multitask"] = evaluated(base, ready.multitask, test)
    found["test"]["mixture of the five"] = evaluated(base, Mixture(models), test)
    each = {d: evaluated(base, ready.tuned[d], {d: test[d]}) for d in domains}
    found["test"]["each domain's own"] = {
        key: {d: each[d][key][d] for d in domains} for key in ("accuracy", "nll")
    }
    runs.write_json(done, found)
    return found


def _better(new: Score, old: Score) -> bool:
    """Of higher accuracy over the domains; where it is equal, of lower NLL."""

    def key(score: Score) -> tuple[float, float]:
        return round(sum(score["accuracy"].values()), 9), -sum(score["nll"].values())

    return key(new) > key(old)


def matched(models: Sequence[Posterior], start: Posterior) -> dict[str, Callable[[], Posterior]]:
    """Merged by gradient matching, with several δ0."""
    hessians = [h for q in models for h in q.hessian().values()]
    mean = sum(h.sum().item() for h in hessians) / sum(h.numel() for h in hessians)
    trials = {}
    for floor in FLOORS:
        at = {name: torch.full_like(m, floor * mean) for name, m in start.mean.items()}
        base = Posterior(start.mean, at, prior_precision=at)
        trials[f"δ0 {floor}"] = partial(merge, models, base=base)
    return trials


def prior(start: Posterior) -> Posterior:
    """What the finetuned posteriors share: the weights' prior, around 0."""
    zero = {name: torch.zeros_like(m) for name, m in start.mean.items()}
    width = SETTINGS.ess * SETTINGS.weight_decay
    precision = {name: torch.full_like(m, width) for name, m in zero.items()}
    return Posterior(zero, precision, prior_precision=width)


def raised(posterior: Posterior) -> Posterior:
    """With λh above 0 where noise took it below, down to −λδ, for ``fisher``, which divides by it.

    One posterior for every rule: beside a base the difference is nothing.
    """
    hessian = posterior.hessian()
    least = LEAST * max(h.mean().item() for h in hessian.values())
    precision = {n: posterior.precision[n] + (least - h).clamp(min=0) for n, h in hessian.items()}
    prior = posterior.prior_precision
    return Posterior(posterior.mean, precision, prior_precision=prior, ess=posterior.ess)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are finetuned."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def finetuned(
    path: Path, model: nn.Module, start: Posterior, rows: Rows, subject: Subject, seed: int
) -> Posterior:
    """The posterior after finetuning from the base; a file where it was done before.

    Raises:
        UserError: the file is of other settings.
    """
    made = {**asdict(SETTINGS), **asdict(subject), "seed": seed, "n": len(rows)}
    made = json.loads(json.dumps(made))
    if path.exists():
        found = Posterior.load(path)
        if {key: found.settings.get(key) for key in made} != made:
            raise UserError(f"{path} is of other settings: choose another --out, or remove it")
        return found
    weights = trained(model)
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(start.mean[name])
    opt = SETTINGS.build(model, len(rows), subject.steps(len(rows)), seed)
    assert isinstance(opt, IVON)
    clock = time.perf_counter()
    finetune(model, opt, rows, subject, seed)
    posterior = opt.posterior(weights.items())
    posterior.settings |= {**made, "seconds": time.perf_counter() - clock}
    path.parent.mkdir(parents=True, exist_ok=True)
    posterior.save(path)
    return posterior


def squares(path: Path, model: nn.Module, at: Posterior, rows: Rows) -> Posterior:
    """The mean with the sum of single examples' squared gradients as its Hessian."""
    if path.exists():
        return Posterior.load(path)
    clock = time.perf_counter()
    weights = trained(model)
    total = {name: torch.zeros_like(m) for name, m in at.mean.items()}
    model.eval()
    with at.at_mean(model):
        for row in rows:
            inputs, targets = padded([row])
            model.zero_grad()
            cross_entropy(model(**inputs).logits, targets).backward()
            for name, p in weights.items():
                if p.grad is not None:
                    total[name].addcmul_(p.grad, p.grad)
    model.zero_grad()
    floor = LEAST * max(t.mean().item() for t in total.values())  # where a gradient was always 0
    precision = {name: t + 2 * floor for name, t in total.items()}
    taken = {"seconds": time.perf_counter() - clock}
    posterior = Posterior(at.mean, precision, prior_precision=floor, settings=taken)
    posterior.save(path)
    return posterior


def evaluated(model: nn.Module, posterior: Posterior | Mixture, data: Mapping[str, Rows]) -> Score:
    """Accuracy and NLL on each domain, at the mean; of a mixture, its means' predictions."""
    parts = posterior.components if isinstance(posterior, Mixture) else (posterior,)
    found: Score = {"accuracy": {}, "nll": {}}
    for domain, rows in data.items():
        ordered = sorted(rows, key=lambda row: len(row[0]))
        groups = [padded(ordered[i : i + 100]) for i in range(0, len(ordered), 100)]
        targets = torch.cat([y.cpu() for _, y in groups])
        probs = torch.zeros(len(targets), 2)
        for part in parts:
            with part.at_mean(model):
                each = [predict(model, None, [x]).probs.cpu() for x, _ in groups]
            probs += torch.cat(each) / len(parts)
        found["accuracy"][domain] = (probs.argmax(1) == targets).double().mean().item()
        found["nll"][domain] = -probs.gather(1, targets[:, None]).log().double().mean().item()
    return found


def draw(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """A line of dots for each method, a colour for each domain."""
    methods = list(found[0]["test"])[::-1]
    domains = list(found[0]["test"][methods[0]]["accuracy"])
    each = {
        m: [sum(f["test"][m]["accuracy"][d] for f in found) / len(found) for d in domains]
        for m in methods
    }
    with picture(path, 1, (7.5, 4.6)) as (panel,):
        for k, domain in enumerate(domains):
            panel.plot([100 * each[m][k] for m in methods], methods, "os^Dv"[k], label=domain)
        averages = [100 * sum(each[m]) / len(domains) for m in methods]
        panel.plot(averages, methods, "|", color="black", ms=16, mew=2, label="average")
        panel.axhline(2.5, color="#8a8a8a", lw=0.8)  # below it: what merging is held against
        label(panel, "One model out of five", "accuracy on the domain's test sentences, %", "")
        panel.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.35, -0.14))
