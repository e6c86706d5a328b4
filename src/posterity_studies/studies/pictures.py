"""Pictures of the studies: one look for all, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from posterity_studies import runs

COLOURS = ("#0b6fa4", "#c8502d", "#4c8c3f", "#7d5ba6", "#b58900", "#444444")
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a8a8a",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.markersize": 4,
    "axes.prop_cycle": cycler(color=COLOURS),
}


@contextmanager
def picture(path: Path, columns: int = 1, size: tuple[float, float] = (4.6, 3.4)) -> Iterator[Any]:
    """Panels side by side to draw on, saved as PNG when the block ends: an array of axes."""
    with matplotlib.style.context(STYLE):
        figure = Figure((size[0] * columns, size[1]), layout="constrained")
        panels: Any = figure.subplots(1, columns, squeeze=False)[0]
        yield panels
        with runs.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def label(panel: Axes, title: str, x: str, y: str) -> None:
    """Say what is seen, and in which units."""
    panel.set_title(title, loc="left", fontsize=11)
    panel.set(xlabel=x, ylabel=y)
