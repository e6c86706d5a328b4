"""Is IVON's Hessian good for merging finetuned models? (section 4.3)

MiniLM is finetuned with IVON on four domains of sentiment, each alone, and on all together. The
four models are merged by every method; what a method can choose is chosen on held-out sentences,
five trials each. The squared gradients are those of a further pass over the training data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from posterity import IVON, Mixture, Posterior, predict
from posterity.merging import merge
from posterity_studies import runs
from posterity_studies.data import packages
from posterity_studies.studies.pictures import label, picture
from posterity_studies.train import Progress

DOMAINS = ("movies", "amazon", "nyt", "tweets")
SETTINGS: dict[str, Any] = {"lr": 3e-2, "ess": 1e7, "hess_init": 1e-3, "betas": (0.9, 0.995)}
SETTINGS |= {"weight_decay": 1e-6, "clip_radius": 1e-3, "rescale_lr": False}
PRIOR = SETTINGS["ess"] * SETTINGS["weight_decay"]
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the sum of task vectors
FLOORS = (0.03, 0.1, 0.3, 1.0, 3.0)  # δ0, in mean Hessians: between averaging and their sum

Row = tuple[list[int], int]  # tokens, class
Rows = Sequence[Row]
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """How many sentences of each domain, how often, and the gradients that are squared."""

    train: int = 1200
    validation: int = 200
    test: int = 600
    epochs: int = 2
    squares: int = 400


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """Accuracy of every method on every domain."""
    size = Size() if scale == "desk" else Size(32, 16, 16, 1, 4)
    found = [merged(out / f"seed{seed}", seed, size, scale == "smoke", progress) for seed in seeds]
    rows = []
    for method in found[0]["test"]:
        each = torch.tensor([[f["test"][method]["accuracy"][d] for d in DOMAINS] for f in found])
        averages = each.mean(1)
        nll = sum(sum(f["test"][method]["nll"].values()) / 4 for f in found) / len(found)
        spread = averages.std().item() if len(seeds) > 1 else math.nan
        rows.append(
            {
                "method": method,
                **{d: f"{a:.2%}" for d, a in zip(DOMAINS, each.mean(0).tolist(), strict=True)},
                "average": f"{averages.mean().item():.2%}",
                "± s.d.": "" if math.isnan(spread) else f"{spread:.2%}",
                "NLL": nll,
                "chosen": " ".join(f"{f['chosen'].get(method, '')}" for f in found),
                "further seconds": sum(f["further"].get(method, 0.0) for f in found) / len(found),
            }
        )
    draw(out / "merging.png", found)
    return {"rows": rows, "data": packages.PACKAGES["sentiment"].sha256, "runs": found}


def merged(folder: Path, seed: int, size: Size, tiny: bool, progress: Progress) -> dict[str, Any]:
    """Finetune, merge by every method, and test."""
    done = folder / "result.json"
    if done.exists():
        return runs.read_json(done)
    splits = {domain: sentences(domain, seed, size) for domain in DOMAINS}
    base = network(seed, tiny)
    start = Posterior(
        dict(base.named_parameters()),
        {name: torch.full_like(p, PRIOR) for name, p in base.named_parameters()},
        prior_precision=PRIOR,
    )
    tuned, squared, seconds = {}, {}, 0.0
    for domain in progress(DOMAINS, len(DOMAINS), f"finetuning, seed {seed}"):
        train = splits[domain][0]
        tuned[domain] = finetuned(folder / f"{domain}.safetensors", base, start, train, size, seed)
        clock = time.perf_counter()
        path = folder / f"{domain}-squares.safetensors"
        squared[domain] = squares(path, base, tuned[domain], train[: size.squares], len(train))
        seconds += time.perf_counter() - clock
    together = [row for domain in DOMAINS for row in splits[domain][0]]
    path = folder / "multitask.safetensors"
    multitask = finetuned(path, base, start, together, size, seed)
    held = {domain: splits[domain][1] for domain in DOMAINS}
    test = {domain: splits[domain][2] for domain in DOMAINS}
    models, fishers = list(tuned.values()), list(squared.values())
    vectors = {
        "task arithmetic": {"method": "task_arithmetic"},
        "TIES": {"method": "ties", "density": 0.5},  # an average of the vectors, not their sum
        "DARE": {"method": "dare_linear", "density": 0.5},
    }
    trials = {
        "Hessian of IVON": matched(models, start),
        "squared gradients": matched(fishers, start),
        **{
            name: {
                f"α {a}": partial(merge, models, base=start, alpha=scale * a, **how) for a in ALPHAS
            }
            for name, how in vectors.items()
            for scale in (4.0 if name == "TIES" else 1.0,)
        },
        "Fisher average, Hessian of IVON": {"": partial(merge, models, method="fisher")},
        "Fisher average, squared gradients": {"": partial(merge, fishers, method="fisher")},
        "product of posteriors": {"": partial(merge, models, base=prior(start), method="product")},
        "simple average": {"": partial(merge, models, method="average")},
    }
    found: dict[str, Any] = {"test": {}, "validation": {}, "chosen": {}, "further": {}}
    for method, candidates in progress(trials.items(), len(trials), "merging"):
        scores = {name: evaluated(base, make(), held) for name, make in candidates.items()}
        best = min(scores, key=lambda name: sum(scores[name]["nll"].values()))
        found["validation"][method], found["chosen"][method] = scores, best
        found["test"][method] = evaluated(base, candidates[best](), test)
        if "squared" in method:
            found["further"][method] = seconds
    found["test"]["multitask"] = evaluated(base, multitask, test)
    found["test"]["mixture of the four"] = evaluated(base, Mixture(models), test)
    each = {d: evaluated(base, tuned[d], {d: test[d]}) for d in DOMAINS}
    found["test"]["each domain's own"] = {
        key: {d: each[d][key][d] for d in DOMAINS} for key in ("accuracy", "nll")
    }
    runs.write_json(done, found)
    return found


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
    return Posterior(zero, start.precision, prior_precision=PRIOR)


def network(seed: int, tiny: bool = False) -> nn.Module:
    """MiniLM with a new head; for smoke a BERT without training that has its vocabulary."""
    transformers = packages.transformers()
    torch.manual_seed(seed)
    quiet = {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    kind = transformers.AutoModelForSequenceClassification
    if not tiny:
        return kind.from_pretrained(packages.folder("minilm"), **quiet)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = transformers.AutoConfig.from_pretrained(packages.folder("minilm"), **small, **quiet)
    config.num_hidden_layers = 1
    return kind.from_config(config)


def sentences(domain: str, seed: int, size: Size) -> tuple[list[Row], list[Row], list[Row]]:
    """Sentences to train on, to choose by and to test with."""
    tokenizer = packages.transformers().AutoTokenizer.from_pretrained(packages.folder("minilm"))
    texts, labels = packages.sentiment(domain)
    wanted = size.train + size.validation + size.test
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:wanted]
    tokens = tokenizer([texts[i] for i in order], truncation=True, max_length=64)["input_ids"]
    rows = list(zip(tokens, (labels[i] for i in order), strict=True))
    first, second = size.train, size.train + size.validation
    return rows[:first], rows[first:second], rows[second:]


def padded(rows: Rows) -> Batch:
    """Sentences as one batch."""
    tokens = [torch.tensor(row) for row, _ in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([y for _, y in rows])


def batches(rows: Rows, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """An epoch in batches of like length, in random order."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    made = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size], key=lambda i: len(rows[i][0]))
        made += [pool[i : i + size] for i in range(0, len(pool), size)]
    for i in torch.randperm(len(made), generator=generator).tolist():
        yield padded([rows[j] for j in made[i]])


def finetuned(
    path: Path, model: nn.Module, start: Posterior, rows: Rows, size: Size, seed: int
) -> Posterior:
    """The posterior after finetuning from the base; a file where it was done before."""
    if path.exists():
        return Posterior.load(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start.mean[name])
    model.train()
    opt = IVON(model.parameters(), **SETTINGS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    steps = size.epochs * math.ceil(len(rows) / 16)
    rate = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min((t + 1) / (0.1 * steps), 1) * (1 - t / steps)
    )
    for _ in range(size.epochs):
        for inputs, targets in batches(rows, 16, generator):
            with opt.sampled_params(train=True):
                opt.zero_grad()
                cross_entropy(model(**inputs).logits, targets).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            rate.step()
    posterior = opt.posterior((name, p) for name, p in model.named_parameters())
    path.parent.mkdir(parents=True, exist_ok=True)
    posterior.save(path)
    return posterior


def squares(path: Path, model: nn.Module, at: Posterior, rows: Rows, n: int) -> Posterior:
    """The mean with n times the mean squared gradient of single examples as its Hessian."""
    if path.exists():
        return Posterior.load(path)
    total = {name: torch.zeros_like(m) for name, m in at.mean.items()}
    model.eval()
    with at.at_mean(model):
        for row in rows:
            inputs, targets = padded([row])
            model.zero_grad()
            cross_entropy(model(**inputs).logits, targets).backward()
            for name, p in model.named_parameters():
                total[name].addcmul_(p.grad, p.grad) if p.grad is not None else None
    model.zero_grad()
    floor = 1e-6 * n * max(t.mean().item() for t in total.values()) / len(rows)
    precision = {name: t * (n / len(rows)) + 2 * floor for name, t in total.items()}
    posterior = Posterior(at.mean, precision, prior_precision=floor)
    posterior.save(path)
    return posterior


def evaluated(
    model: nn.Module, posterior: Posterior | Mixture, data: Mapping[str, Rows]
) -> dict[str, dict[str, float]]:
    """Accuracy and NLL on each domain, at the mean; of a mixture, its means' predictions."""
    parts = posterior.components if isinstance(posterior, Mixture) else (posterior,)
    found: dict[str, dict[str, float]] = {"accuracy": {}, "nll": {}}
    for domain, rows in data.items():
        ordered = sorted(rows, key=lambda row: len(row[0]))
        groups = [padded(ordered[i : i + 100]) for i in range(0, len(ordered), 100)]
        targets = torch.cat([y for _, y in groups])
        probs = torch.zeros(len(targets), 2)
        for part in parts:
            with part.at_mean(model):
                each = [predict(model, None, [x]).probs for x, _ in groups]
            probs += torch.cat(each) / len(parts)
        found["accuracy"][domain] = (probs.argmax(1) == targets).double().mean().item()
        found["nll"][domain] = -probs.gather(1, targets[:, None]).log().double().mean().item()
    return found


def draw(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """A line of dots for each method, a colour for each domain."""
    methods = list(found[0]["test"])[::-1]
    with picture(path, 1, (7.5, 4.6)) as (panel,):
        for k, domain in enumerate(DOMAINS):
            means = [
                sum(f["test"][m]["accuracy"][domain] for f in found) / len(found) for m in methods
            ]
            panel.plot(means, range(len(methods)), "o", color=f"C{k}", label=domain)
        averages = [
            sum(sum(f["test"][m]["accuracy"].values()) / 4 for f in found) / len(found)
            for m in methods
        ]
        panel.plot(averages, range(len(methods)), "|", color="black", ms=16, label="average")
        label(panel, "One model out of four", "accuracy on the domain's test sentences", "")
        panel.set_yticks(range(len(methods)), methods)
        panel.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.4, -0.14))
