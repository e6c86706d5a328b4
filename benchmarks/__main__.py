"""`make bench`: what IVON costs beside AdamW, on this machine, in one run.

Prints the tables and writes them with their provenance, and the cost against the number of
parameters as a picture, to a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from rich.console import Console

from benchmarks import cases
from benchmarks.gate import gate
from benchmarks.memory import peak
from benchmarks.peers import BASE
from posterity_studies.runs import provenance, replacing, write_json

matplotlib.use("Agg")
from matplotlib import pyplot

Found = dict[str, dict[str, dict[str, float] | None]]  # case → peer → figures


def show(rows: cases.Rows, found: Found, console: Console) -> None:
    """Collect rows and print each case's table when it is whole."""
    for case, peer, figures in rows:
        if case not in found:
            console.print(f"[bold]{case}", highlight=False, soft_wrap=True)
        found.setdefault(case, {})[peer] = figures
        cells = (
            [f"{key} {value:.4g}" for key, value in figures.items()] if figures else ["too busy"]
        )
        console.print(f"  {peer:22} {'   '.join(cells)}", highlight=False, soft_wrap=True)


def picture(costs: dict[str, list[tuple[float, float]]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name, points in costs.items():
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="parameters", ylabel="seconds for a step of the optimizer")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main() -> None:
    suites = ("optimizers", "memory", "training", "drawing", "sizes", "ranks")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument(
        *("--only",), nargs="+", choices=suites, default=suites, help="what to measure"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--numel", type=int, default=100_000_000, help=argparse.SUPPRESS)
    given = parser.parse_args()
    device, rounds = given.device, given.rounds
    if given.peak:
        print(peak(given.peak, given.numel, device))
        return
    console, found = Console(), Found()
    errors = gate(device)
    threads = (2,) if device == "cuda" else (2, 1)
    parts: dict[str, list[Callable[[], cases.Rows]]] = {
        "optimizers": [partial(cases.optimizers, device, n, rounds) for n in threads],
        "memory": [partial(cases.memory, given.numel, device)],
        "training": [partial(cases.training, device, rounds)],
        "drawing": [partial(cases.drawing, 25_000_000, rounds)],
        "ranks": [cases.ranks],
        "sizes": [partial(cases.sizes, device, max(rounds // 2, 3))],
    }
    for part, runs in parts.items():
        for rows in runs if part in given.only else ():
            show(rows(), found, console)
    costs: dict[str, list[tuple[float, float]]] = {}
    for case in found.values():
        for name, figures in case.items():
            if figures and "numel" in figures:
                costs.setdefault(name, []).append((figures["numel"], figures["seconds"]))
                if name == "IVON":
                    costs.setdefault(BASE, []).append((figures["numel"], figures["base"]))
    if costs:
        picture(costs, given.out / "cost.png")
    facts = {"base": BASE, "float64": errors, "found": found, "provenance": provenance(0, "none")}
    write_json(given.out / "bench.json", facts)
    console.print(f"written to {given.out}")


if __name__ == "__main__":
    main()
