"""The paper's claims, each with what the committed results say of it.

To add one, add it to ``CLAIMS``: a judge gets what the result file holds, and returns whether the
claim holds there and our figures, which it must calculate from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from posterity_studies import runs

Verdict = tuple[bool, str]  # whether it holds, and our figures
Judge = Callable[[Any], Verdict]
Metrics = Mapping[str, float]
OPTIMIZERS = ("IVON", "SGD", "AdamW")
Status = Literal["holds", "does not hold", "not yet run"]
SCALES = {"desk": "", "paper": "paper/"}  # and their folders


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, its figures, and what judges ours.

    ``result`` is a file, or a pattern of files, under the folder of results.
    """

    where: str
    text: str
    paper: str
    setting: str  # what ours is at desk scale
    command: str
    result: str
    judge: Judge | None = None  # where no study asks it yet


@dataclass(frozen=True)
class Judged:
    """A claim at one scale."""

    claim: Claim
    scale: str
    status: Status
    ours: str = ""


def judged(results: Path) -> list[Judged]:
    """Every claim at every scale, in the paper's order.

    Raises:
        UserError: a result file is damaged, or is none of its study.
    """
    found = []
    for claim in CLAIMS:
        for scale, folder in SCALES.items():
            files = sorted((results / folder).glob(claim.result))
            if not files or claim.judge is None:
                found.append(Judged(claim, scale, "not yet run"))
                continue
            read = [runs.read_json(path) for path in files]
            content = read if "*" in claim.result else read[0]
            holds, ours = runs.read(files[0], lambda _, c=content, j=claim.judge: j(c))
            found.append(Judged(claim, scale, "holds" if holds else "does not hold", ours))
    return found


def _rows(result: Any) -> dict[str, Any]:
    return {row["method"]: row for row in result["rows"]}


def _means(results: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Over seeds, by optimizer and evaluation: ``ivon.samples`` …"""
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for key, found in result["evaluations"].items():
            method = values.setdefault(f"{result['settings']['optimizer']}.{key}", {})
            for metric, value in found.items():
                method.setdefault(metric, []).append(value)
    return {m: {k: fmean(v) for k, v in found.items()} for m, found in values.items()}


def _each(result: Any, metric: str) -> dict[str, float]:
    return {m: fmean(e[metric] for e in each) for m, each in result["each"].items()}


def _told(values: Mapping[str, float], form: str = "{:.4f}") -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())


def speed(bench: Any) -> Verdict:
    """A whole step beside AdamW's."""
    found = bench["found"]
    gpt = found["GPT 10.9M, batch 16"]["IVON"]["ratio"]
    images = found["ResNet-20, batch 128"]["IVON"]["ratio"]
    ours = f"a step takes {gpt:.2f} times AdamW's (GPT, batch 16), {images:.2f} times (ResNet-20)"
    return gpt <= 1.2 and images <= 1.05, ours


def averaging(result: Any) -> Verdict:
    """Perplexity of the mean and of averages over samples."""
    values = {m: row["perplexity"] for m, row in _rows(result).items()}
    many = {m: v for m, v in values.items() if m.split()[0].isdigit() and int(m.split()[0]) > 8}
    best = min(many, key=many.__getitem__)
    told = {"the mean": values["the mean"], best: values[best]}
    return values[best] < values["the mean"], _told(told, "{:.3f}")


def accuracy(results: Sequence[Any]) -> Verdict:
    """Accuracy, NLL and ECE beside AdamW and SGD; as accurate means within half a point."""
    means = _means(results)
    return _as_accurate(means["ivon.samples"], means["sgd.mean"], means["adamw.mean"])


def classified(result: Any) -> Verdict:
    """The same of every recipe of the study, averaged over them."""
    means: dict[str, list[dict[str, float]]] = {}
    for methods in result["each"].values():
        for title, found in methods.items():
            if "mean" not in title:
                means.setdefault(title.split(",")[0], []).extend(found)
    return _as_accurate(
        *({m: fmean(run[m] for run in means[o]) for m in means[o][0]} for o in OPTIMIZERS)
    )


def _as_accurate(ivon: Metrics, sgd: Metrics, adamw: Metrics) -> Verdict:
    peers = adamw, sgd
    holds = all(ivon["accuracy"] >= p["accuracy"] - 0.005 for p in peers)
    holds &= all(ivon[k] < p[k] for k in ("nll", "ece") for p in peers)
    named = zip(OPTIMIZERS, (ivon, sgd, adamw), strict=True)
    ours = "; ".join(
        f"{name} {m['accuracy']:.2%}, {m['nll']:.4f}, {m['ece']:.4f}" for name, m in named
    )
    return holds, f"accuracy (half a point counts as equal), NLL, ECE: {ours}"


def sampling(results: Sequence[Any]) -> Verdict:
    """ECE at the mean and averaged."""
    means = _means(results)
    at_mean, sampled = means["ivon.mean"]["ece"], means["ivon.samples"]["ece"]
    return sampled < at_mean, f"ECE {at_mean:.4f} at the mean, {sampled:.4f} averaged"


def in_domain(result: Any) -> Verdict:
    """NLL of one run of IVON beside one run of each other method."""
    values = _each(result, "nll")
    names = ("IVON", "SGD", "Bayes by backprop", "MC-dropout", "SWAG")
    told = {name: values[name] for name in names}
    return all(told["IVON"] <= v for v in told.values()), f"NLL: {_told(told)}"


def multi(result: Any) -> Verdict:
    """NLL of ensembles."""
    values = _each(result, "nll")
    told = {name: values[name] for name in ("Multi-IVON", "deep ensemble", "IVON")}
    return told["Multi-IVON"] <= told["deep ensemble"], f"NLL: {_told(told)}"


def unknown(result: Any) -> Verdict:
    """AUROC by the largest probability, for every pair of data."""
    holds, told = True, []
    pairs = dict.fromkeys((r["known"], r["unknown"]) for r in result["rows"])
    for known, other in pairs:
        mine = {
            r["method"]: r["AUROC"]
            for r in result["rows"]
            if (r["known"], r["unknown"], r["score"]) == (known, other, "probability")
            and "mean" not in r["method"]
        }
        best = max(mine, key=mine.__getitem__)
        holds &= best.startswith("IVON")
        told.append(f"{known} → {other}: {_told(mine, '{:.3f}')}")
    return holds, "AUROC " + "; ".join(told)


def between(result: Any) -> Verdict:
    """Standard deviation at the data and in the gap."""
    row = _rows(result)["IVON, one run"]
    at, gap = row["sd at the data"], row["sd in the gap"]
    return gap > at, f"s.d. {at:.3f} at the data, {gap:.3f} in the gap"


def finetuned(result: Any) -> Verdict:
    """Accuracy and NLL, averaged over models and domains."""

    def mean(method: str, measure: str) -> float:
        return fmean(row[measure] for row in result["rows"] if row["method"] == method)

    names = {"IVON": "ivon, averaged", "AdamW": "adamw, the mean"}
    accuracy = {name: mean(method, "accuracy") for name, method in names.items()}
    nll = {name: mean(method, "nll") for name, method in names.items()}
    holds = accuracy["IVON"] >= accuracy["AdamW"]
    return holds, f"accuracy {_told(accuracy, '{:.2%}')}; NLL {_told(nll, '{:.3f}')}"


def merged(result: Any) -> Verdict:
    """Accuracy of the merged models, averaged over domains and seeds."""

    def mean(method: str) -> float:
        found = [run["test"][method]["accuracy"].values() for run in result["runs"]]
        return fmean(fmean(values) for values in found)

    names = ("Hessian of IVON", "squared gradients", "task arithmetic", "simple average")
    told = {name: 100 * mean(name) for name in names}
    holds = all(told["Hessian of IVON"] >= value for value in told.values())
    return holds, f"average accuracy, %: {_told(told, '{:.2f}')}"


def left_out(result: Any) -> Verdict:
    """Rank correlation and gap to the test loss."""
    ivon, adamw = ([r for r in result["rows"] if o in r["method"]] for o in ("IVON", "AdamW"))
    corr, gap = (fmean(r[key] for r in ivon) for key in ("rank correlation", "gap"))
    stand_in = fmean(r["gap"] for r in adamw)
    ours = (
        f"rank correlation {corr:.3f}, mean gap {gap:.1%}; AdamW's stand-in is {stand_in:.0%} off"
    )
    return corr >= 0.9 and gap <= 0.1 and stand_in > gap, ours


def wrong_labels(result: Any) -> Verdict:
    """AUROC of finding wrong labels."""
    rows = _rows(result)
    mine, loss = rows["sensitivity, IVON"]["AUROC"], rows["loss, IVON"]["AUROC"]
    return mine >= 0.9, f"wrong labels found with AUROC {mine:.3f} (by the loss {loss:.3f})"


def pretrained(result: Any) -> Verdict:
    """Held-out loss of both."""
    losses = {m: row["loss"] for m, row in _rows(result).items()}
    return losses["IVON"] <= losses["AdamW"], f"nats a byte: {_told(losses)}"


def more_samples(result: Any) -> Verdict:
    """NLL with one sample, with 64, and with the most."""
    rows = [r for r in result["rows"] if r["method"].startswith("1 ")]
    values = {r["at test"]: r["NLL"] for r in rows}
    one, plateau, most = (
        values["1"],
        values["64"],
        values[max(values.keys() - {"the mean"}, key=int)],
    )
    told = {"one sample": one, "64": plateau, "all": most}
    return plateau < one and plateau - most <= 0.05 * (one - most), f"NLL: {_told(told)}"


def exact(result: Any) -> Verdict:
    """Agreement with the reference and total variation to it, beside the other methods."""
    rows = _rows(result)
    names = ("Multi-IVON", "IVON", "deep ensemble", "SWAG", "MC-dropout")
    far = {name: rows[name]["total variation"] for name in names}
    agree = {name: rows[name]["agreement"] for name in names}
    holds = min(far, key=far.__getitem__) == "Multi-IVON" == max(agree, key=agree.__getitem__)
    return holds, f"agreement {_told(agree, '{:.3f}')}; total variation {_told(far, '{:.3f}')}"


FASHION = "Fashion-MNIST, 207k weights, 18 epochs"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Figures 1, 2",
        "GPT-2 from scratch: lower validation perplexity than AdamW's.",
        "12.6 against 13.0 (773M), 14.1 against 14.5 (355M), 17.9 against 18.1 (125M)",
        "GPT of 3.2M weights over bytes, 43 MB of essays and a dictionary, bf16",
        "posterity study pretraining --seeds 0 1 2",
        "pretraining/result.json",
        pretrained,
    ),
    Claim(
        "Figure 2",
        "Averaging more than 8 posterior samples lowers perplexity further.",
        "GPT-2, off a plot",
        "byte-level GPT of 1.9M weights on essays",
        "posterity study language",
        "language/result.json",
        averaging,
    ),
    Claim(
        "Section 3",
        "IVON costs what Adam costs.",
        "less than 20 % more on GPT-2, nothing on images",
        "two cores, against PyTorch's fused AdamW",
        "make bench",
        "bench/bench.json",
        speed,
    ),
    Claim(
        "Table 1",
        "As accurate as AdamW and SGD or better, with lower NLL and calibration error.",
        "ImageNet, ResNet-50, top-1 / NLL / ECE: 77.46/.869/.022; SGD 76.63/.917/.038; "
        "AdamW 75.16/1.018/.066",
        FASHION,
        "posterity compare fashion-mnist --seeds 0 1 2",
        "fashion-mnist/*-seed*.json",
        accuracy,
    ),
    Claim(
        "Table 1",
        "The same with a residual network on colour images.",
        "CIFAR-10, ResNet-20: accuracy ≈ 92.6 %, NLL ≈ .219 (200 epochs)",
        "CIFAR-10, ResNet-20, 20 epochs",
        "posterity study classification",
        "classification/result.json",
        classified,
    ),
    Claim(
        "Table 1",
        "Calibration comes from sampling.",
        "TinyImageNet, ResNet-18, ECE: .150 at the mean, .019 averaged",
        FASHION,
        "posterity compare fashion-mnist --seeds 0 1 2",
        "fashion-mnist/*-seed*.json",
        sampling,
    ),
    Claim(
        "Section 4.2.1",
        "Better in-domain uncertainty than SGD, Bayes by backprop, MC-dropout and SWAG.",
        "CIFAR-10, ResNet-20: NLL ≈ .219",
        FASHION,
        "posterity study in-domain --seeds 0 1 2",
        "in-domain/result.json",
        in_domain,
    ),
    Claim(
        "Section 4.2.1",
        "Multi-IVON is better than a deep ensemble.",
        "CIFAR-10, ResNet-20, five members each",
        FASHION,
        "posterity study in-domain --seeds 0 1 2",
        "in-domain/result.json",
        multi,
    ),
    Claim(
        "Section 4.2.2, Figure 3",
        "Tells unknown inputs apart better than AdamW and SGD.",
        "CIFAR-10 against SVHN and Flowers102",
        "Fashion-MNIST against MNIST; CIFAR-10 against emoji and MNIST",
        "posterity study ood --seeds 0 1 2",
        "ood/result.json",
        unknown,
    ),
    Claim(
        "Figure 3c",
        "The variance grows where there are no data.",
        "a picture",
        "a line with a gap",
        "posterity study gap",
        "gap/result.json",
        between,
    ),
    Claim(
        "Section 4.2.3, Figure 4",
        "More samples at test time help, up to some 64.",
        "accuracy ≈ 91.2 %, NLL ≈ .288 with one, ≈ 92.6 %, .219 with 64",
        FASHION,
        "posterity study mc-samples --seeds 0 1 2",
        "mc-samples/result.json",
        more_samples,
    ),
    Claim(
        "Section 4.2.4",
        "Near the exact posterior: agreement with HMC.",
        "an earlier version won the NeurIPS 2021 competition",
        "610 weights, 1,000 images of Fashion-MNIST, three chains of the No-U-Turn Sampler",
        "posterity study agreement --seeds 0 1 2 3 4",
        "agreement/result.json",
        exact,
    ),
    Claim(
        "Section 4.3",
        "Finetuned large language models as accurate as AdamW's, or better.",
        "RoBERTa-large and DeBERTa-v3-large on GLUE",
        "MiniLM on four domains of sentiment; SmolLM2-135M by LoRA on film reviews",
        "posterity study finetuning --seeds 0 1 2",
        "finetuning/result.json",
        finetuned,
    ),
    Claim(
        "Section 4.3",
        "IVON's Hessian merges as well as squared gradients, at no further pass over the data.",
        "average accuracy 94.0 against 93.9 (RoBERTa, five domains)",
        "MiniLM, five domains of 1,500 sentences",
        "posterity study merging --seeds 0 1 2",
        "merging/result.json",
        merged,
    ),
    Claim(
        "Figure 5",
        "The leave-one-out estimate follows the test loss during training; AdamW's does not.",
        "curves on ImageNet",
        "Fashion-MNIST, LeNet-5, the paper's settings",
        "posterity study leave-one-out",
        "leave-one-out/result.json",
        left_out,
    ),
    Claim(
        "Section 4.5",
        "The examples that a model is most sensitive to are the odd ones.",
        "pictures",
        "5 % of Fashion-MNIST's training labels made wrong",
        "posterity study label-noise",
        "label-noise/result.json",
        wrong_labels,
    ),
)
