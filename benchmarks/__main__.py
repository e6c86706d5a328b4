"""`make bench`: what IVON costs beside AdamW, on this machine, in one run.

Prints the tables and writes them with their provenance, and the cost against the number of
parameters as a picture, to a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from benchmarks import cases
from benchmarks.gate import gate
from benchmarks.peers import BASE
from posterity_studies.runs import provenance, replacing, write_json

matplotlib.use("Agg")
from matplotlib import pyplot

Found = dict[str, dict[str, dict[str, float] | None]]  # case → peer → figures


def show(rows: cases.Rows, found: Found, console: Console) -> None:
    """Collect rows and print each case's table when it is whole."""
    title, table = None, Table()
    for case, peer, figures in rows:
        if case != title:
            if title is not None:
                console.print(table)
            title, table = case, Table(title=case, title_justify="left")
            table.add_column("")
            for column in figures or {"ratio": 0}:
                table.add_column(column, justify="right")
        found.setdefault(case, {})[peer] = figures
        cells = [f"{value:.4g}" for value in figures.values()] if figures else ["too busy"]
        table.add_row(peer, *cells)
    console.print(table)


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    suites = ("optimizers", "memory", "training", "drawing", "sizes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=suites,
        default=suites,
        metavar="SUITE",
        help=f"of {', '.join(suites)}",
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--numel", type=int, default=100_000_000, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        return print(cases.peak(given.peak, given.numel))
    console, found, device, rounds = Console(), Found(), given.device, given.rounds
    errors = gate(device)
    parts: dict[str, Iterable[cases.Rows]] = {
        "optimizers": (
            cases.optimizers(device, n, rounds) for n in ((2, 1) if device == "cpu" else (2,))
        ),
        "memory": [cases.memory(given.numel)],
        "training": [cases.training(rounds)],
        "drawing": [cases.drawing(25_000_000, rounds)],
    }
    for part in parts:
        if part in given.only:
            for rows in parts[part]:
                show(rows, found, console)
    costs: dict[str, list[tuple[float, float]]] = {}
    if "sizes" in given.only:
        for _, name, figures in cases.sizes(device, 5):
            costs.setdefault(name, []).append((figures["numel"], figures["seconds"]))
        picture(costs, given.out / "cost.png")
    facts = {"base": BASE, "float64": errors, "found": found, "cost": costs}
    write_json(given.out / "bench.json", facts | {"provenance": provenance(0, "none")})
    console.print(f"written to {given.out}")
    return None


if __name__ == "__main__":
    main()
