"""Finetuning with AdamW and with IVON: accuracy and calibration (section 4.3).

MiniLM in full on each of four domains of sentiment, and SmolLM2-135M by low-rank adapters on film
reviews, as a language model that names the sentiment. Both optimizers have as many trials, judged
by NLL on held-out sentences of the first domain, IVON's averaged over posterior samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from posterity import Posterior, metrics, predict
from posterity.binding import Samples
from posterity_studies import runs
from posterity_studies.data import packages
from posterity_studies.data.cache import DataError
from posterity_studies.finetune import AdamW, Ivon, Logits, Rows, class_logits, finetune, padded
from posterity_studies.studies import merging
from posterity_studies.studies.pictures import label, picture
from posterity_studies.train import Progress

DOMAINS = ("movies", "amazon", "nyt", "tweets")
SAMPLES = 16
MEASURES = ("accuracy", "nll", "ece")
Settings = AdamW | Ivon
Score = dict[str, float]


@dataclass(frozen=True, eq=False)
class Job:
    """A model to finetune, and on what."""

    name: str
    make: Callable[[int], nn.Module]  # by seed; what is to be trained requires gradients
    sentences: Callable[[str, int], tuple[Rows, Rows, Rows]]  # domain, seed → train, choose, test
    domains: tuple[str, ...]
    trials: Mapping[str, Sequence[Settings]]
    logits: Logits = class_logits
    batch: int = 16
    epochs: int = 2


def study(out: Path, seeds: Sequence[int], scale: str, progress: Progress) -> dict[str, Any]:
    """A row for each model, domain and way to predict: means over seeds."""
    smoke = scale == "smoke"
    jobs = [minilm(smoke)] if smoke else [minilm(smoke), smollm2()]
    rows, tried, found = [], {}, {}
    for job in jobs:
        chosen = {}
        for optimizer, settings in job.trials.items():
            best = search(out / job.name / "trials", job, optimizer, settings, smoke, progress)
            chosen[optimizer], tried[f"{job.name}, {optimizer}"] = best
        work = [(o, d, seed) for seed in seeds for d in job.domains for o in chosen]
        for optimizer, domain, seed in progress(work, len(work), job.name):
            folder = out / job.name / f"{optimizer}-{domain}-seed{seed}"
            score = tested(folder, job, chosen[optimizer], domain, seed, smoke)[1]
            for way, each in score.items():
                found.setdefault((job.name, domain, f"{optimizer}, {way}"), []).append(each)
    for (model, domain, method), each in found.items():
        row: dict[str, Any] = {"method": method, "model": model, "domain": domain}
        for measure in MEASURES:
            values = [e[measure] for e in each]
            row[measure] = fmean(values)
            row[f"{measure} s.d."] = stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    draw(out / "finetuning.png", rows)
    read = " ".join(packages.PACKAGES[name].sha256 for name in ("minilm", "smollm2", "sentiment"))
    return {"rows": rows, "data": read, "trials": tried}


def minilm(tiny: bool) -> Job:
    """MiniLM with a head for two classes; its word vectors stay as they are."""
    size = merging.Size(16, 8, 8, 1) if tiny else merging.Size()
    trials: dict[str, list[Settings]] = {
        "adamw": [AdamW(5e-5), AdamW(1e-4), AdamW(2e-4), AdamW(4e-4)],
        "ivon": [Ivon(0.03, 1e7), Ivon(0.03, 1e6), Ivon(0.03, 3e6), Ivon(0.06, 1e7)],
    }
    return Job(
        name="MiniLM",
        make=lambda seed: merging.network(seed, tiny),
        sentences=lambda domain, seed: merging.sentences(domain, seed, size),
        domains=DOMAINS[:1] if tiny else DOMAINS,
        trials={o: t[:1] for o, t in trials.items()} if tiny else trials,
        epochs=size.epochs,
    )


def smollm2() -> Job:
    """SmolLM2-135M with adapters of rank 8 on queries and values."""
    tokenizer = packages.transformers().AutoTokenizer.from_pretrained(
        packages.folder("smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    words = [tokenizer(word)["input_ids"][-1] for word in (" negative", " positive")]

    def make(seed: int) -> nn.Module:
        try:
            import peft  # pyright: ignore
        except ImportError:
            raise DataError("this needs PEFT: pip install 'posterity[frameworks]'") from None
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(packages.smollm2(), config)

    def sentences(domain: str, seed: int) -> tuple[Rows, Rows, Rows]:
        texts, labels = packages.sentiment(domain)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:900]
        asked = [f"{texts[i][:300]}\nSentiment:" for i in order.tolist()]
        rows = list(zip(tokenizer(asked)["input_ids"], (labels[i] for i in order), strict=True))
        return rows[:500], rows[500:600], rows[600:]

    def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        last = inputs["attention_mask"].sum(1) - 1
        found = model(**inputs).logits[torch.arange(len(last)), last]
        return found[:, words]

    return Job(
        name="SmolLM2",
        make=make,
        sentences=sentences,
        domains=("movies",),
        trials={
            "adamw": [AdamW(2e-4, 0.0), AdamW(1e-3, 0.0)],
            "ivon": [Ivon(0.03, 1e7, weight_decay=0.0), Ivon(0.1, 1e7, weight_decay=0.0)],
        },
        logits=logits,
        batch=8,
        epochs=1,
    )


def search(
    out: Path,
    job: Job,
    optimizer: str,
    trials: Sequence[Settings],
    smoke: bool,
    progress: Progress,
) -> tuple[Settings, list[dict[str, Any]]]:
    """The settings of the lowest NLL on held-out sentences, and all that was tried."""
    tried = []
    for k in progress(range(len(trials)), len(trials), f"{job.name}, trials of {optimizer}"):
        folder = out / f"{optimizer}-{k}"
        score = tested(folder, job, trials[k], job.domains[0], 0, smoke)[0]
        tried.append((min(each["nll"] for each in score.values()), k, score))
    tried.sort(key=lambda t: t[:2])
    table = [{"settings": asdict(trials[k]), "scores": score} for _, k, score in tried]
    return trials[tried[0][1]], table


def tested(
    folder: Path, job: Job, settings: Settings, domain: str, seed: int, smoke: bool
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Finetune and score on the sentences to choose by, and on those to test with; kept in a file.

    Each is way to predict → measures: ``the mean`` and, where there is a posterior, ``averaged``.
    """
    kept = folder / "scores.json"
    if kept.exists():
        found = runs.read_json(kept)
        return found["validation"], found["test"]
    train, held, test = job.sentences(domain, seed)
    model = job.make(seed)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    opt = settings.build(list(weights.values()), seed)
    how = {"batch": job.batch, "epochs": job.epochs, "seed": seed, "logits": job.logits}
    finetune(model, opt, train, **how)
    ways: dict[str, Samples | None] = {"the mean": None}
    if hasattr(opt, "posterior"):
        posterior: Posterior = opt.posterior(weights.items())  # pyright: ignore
        ways["averaged"] = posterior
    samples = 2 if smoke else SAMPLES
    scores = [
        {way: scored(model, q, rows, job.logits, samples) for way, q in ways.items()}
        for rows in (held, test)
    ]
    settled = {"settings": asdict(settings), "validation": scores[0], "test": scores[1]}
    runs.write_json(kept, settled)
    return scores[0], scores[1]


class _Classes(nn.Module):
    """A model as what gives the logits of its classes, with the model's own names."""

    def __init__(self, model: nn.Module, logits: Logits):
        super().__init__()
        self.module, self.classes = model, logits  # a name that posteriors see through

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (sentences, classes)."""
        return self.classes(self.module, inputs)


def scored(
    model: nn.Module, posterior: Samples | None, rows: Rows, logits: Logits, samples: int
) -> Score:
    """Accuracy, NLL and ECE of a model on sentences."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    groups = [padded(ordered[i : i + 50]) for i in range(0, len(ordered), 50)]
    asked = _Classes(model, logits)
    probs = torch.cat([predict(asked, posterior, [x], samples).probs for x, _ in groups])
    targets = torch.cat([y for _, y in groups])
    return {
        "accuracy": metrics.accuracy(probs, targets),
        "nll": metrics.nll(probs, targets),
        "ece": metrics.ece(probs, targets, 20),
    }


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A measure a panel, a dot for each way to predict."""
    places = list(dict.fromkeys(f"{row['model']}, {row['domain']}" for row in rows))[::-1]
    with picture(path, len(MEASURES), (3.8, 3.2)) as panels:
        for panel, measure in zip(panels, MEASURES, strict=True):
            for k, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
                mine = [row for row in rows if row["method"] == method]
                at = [places.index(f"{row['model']}, {row['domain']}") for row in mine]
                panel.plot([row[measure] for row in mine], at, "osD"[k], label=method)
            panel.set_yticks(range(len(places)), places if panel is panels[0] else [])
            label(panel, measure.upper() if measure != "accuracy" else measure, measure, "")
        panels[0].legend(fontsize=8)
