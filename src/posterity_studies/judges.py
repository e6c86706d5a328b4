"""What a result says of a claim: whether it holds there, and our figures.

A judge gets what the result file holds, and must calculate its figures from that. Where there are
several seeds, less than two standard errors of a difference are no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

Verdict = tuple[bool, str]
Metrics = Mapping[str, float]
OPTIMIZERS = ("IVON", "SGD", "AdamW")
PAIRS = "IVON in pairs"


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


def _standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the difference of two means; 0 where there is one run each."""
    return math.sqrt(sum(variance(x) / len(x) for x in (a, b) if len(x) > 1))


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
    most = max((m for m in values if m.split()[0].isdigit()), key=lambda m: int(m.split()[0]))
    told = {"the mean": values["the mean"], most: values[most]}
    return values[most] < values["the mean"], _told(told, "{:.3f}")


def averaged(result: Any) -> Verdict:
    """What averaging the most samples, in pairs, adds to the mean's held-out loss."""
    runs = [run["scores"] for run in result["runs"]["pairs"]]
    lower, change = _averaged(runs)
    return lower, f"nats a token: {change}"


def elsewhere(result: Any) -> Verdict:
    """The same on text of another kind, beside the mean with its logits divided."""
    runs = result["news"]["runs"]["pairs"]
    lower, change = _averaged(runs)
    softer = fmean(run["softened"] - run["mean"] for run in runs)
    divisor, t = fmean(run["divisor"] for run in runs), result["news"]["best"]["pairs"]
    told = f"{change}, at temperature {t:g}; logits over {divisor:.2f} add {softer:+.4f}"
    return lower, f"nats a token: {told}"


def _averaged(runs: Sequence[Mapping[str, float]]) -> tuple[bool, str]:
    most = max((key for key in runs[0] if key.isdigit()), key=int)
    changes = [run[most] - run["mean"] for run in runs]
    change, error = fmean(changes), math.sqrt(variance(changes) / len(runs) if runs[1:] else 0)
    told = f"the mean {fmean(run['mean'] for run in runs):.4f}, {most} samples add {change:+.5f}"
    return change < -2 * error, f"{told} (s.e. {error:.5f})"


def accuracy(results: Sequence[Any]) -> Verdict:
    """Accuracy, NLL and ECE beside AdamW and SGD; as accurate means within .3 points."""
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
    holds = all(ivon["accuracy"] >= p["accuracy"] - 0.003 for p in peers)
    holds &= all(ivon[k] < p[k] for k in ("nll", "ece") for p in peers)
    named = zip(OPTIMIZERS, (ivon, sgd, adamw), strict=True)
    ours = "; ".join(
        f"{name} {m['accuracy']:.2%}, {m['nll']:.4f}, {m['ece']:.4f}" for name, m in named
    )
    return holds, f"accuracy (.3 points count as equal), NLL, ECE: {ours}"


def sampling(results: Sequence[Any]) -> Verdict:
    """ECE at the mean and averaged."""
    means = _means(results)
    at_mean, sampled = means["ivon.mean"]["ece"], means["ivon.samples"]["ece"]
    return sampled < at_mean, f"ECE {at_mean:.4f} at the mean, {sampled:.4f} averaged"


def in_domain(result: Any) -> Verdict:
    """NLL of one run of IVON beside one run of each other method: lower by two standard errors."""
    values = _each(result, "nll")
    ivon, *others = names = ("IVON", "SGD", "Bayes by backprop", "MC-dropout", "SWAG")
    each = {name: [run["nll"] for run in result["each"][name]] for name in names}
    margins = {name: 2 * _standard_error(each[ivon], each[name]) for name in others}
    equal = [n for n in others if abs(values[n] - values[ivon]) <= margins[n]]
    holds = not equal and all(values[ivon] < values[name] for name in others)
    ours = f"NLL: {_told({name: values[name] for name in names})}"
    return holds, ours + (f"; within the seeds' spread of {', '.join(equal)}" if equal else "")


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
    """Held-out loss beside AdamW's."""
    return _beside_adamw(result, "IVON")


def paired(result: Any) -> Verdict:
    """The same in pairs."""
    return _beside_adamw(result, PAIRS)


def _beside_adamw(result: Any, name: str) -> Verdict:
    losses = {
        m: row["loss"] for m, row in _rows(result).items() if m.split(",")[0] in (name, "AdamW")
    }
    return losses[name] <= losses["AdamW"], f"nats a token: {_told(losses)}"


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
