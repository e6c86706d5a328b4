"""The report's figures as inline SVG: fixed words only, colours left to the page's style sheet."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

# Matplotlib draws with stand-in colours; the page replaces them by CSS variables, so that one SVG
# serves light and dark. No name from the data enters an SVG: titles and legends are HTML.
INK, MUTED, RULE = "#0b0001", "#0b0002", "#0b0003"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
SHOWN = 84  # pixels of an image's longer side
EXACT = 64  # and up to which a PNG of it stays small, even of noise
TICKS = np.linspace(0, 1, 6)
DASHES = ("", "6 3", "2 2", "8 2 2 2", "4 4", "1 3")  # one per series: colour is not the only cue
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
}


def series(index: int) -> str:
    """The stand-in colour of the index-th entry; the page turns it into var(--series-index)."""
    return f"#0a00{index % len(DASHES):02x}"


def _dashes(index: int) -> Any:
    """Of the index-th entry, as matplotlib takes them."""
    lengths = tuple(map(int, DASHES[index % len(DASHES)].split()))
    return (0, lengths) if lengths else "-"


def training_curves(name: str, curves: Sequence[tuple[int, list[float], list[float]]]) -> Markup:
    """Lines over epochs, one per (series index, epochs, values); non-finite values leave gaps."""
    with _figure(340, 216, name) as (figure, drawn):
        axes = _axes(figure, 36, 36, 296, 160, "nats per image")
        for index, epochs, values in curves:
            y = np.asarray(values, dtype=float)
            drawable = np.where(np.isfinite(y), y, np.nan)
            axes.plot(epochs, drawable, color=series(index), ls=_dashes(index))
            axes.plot(epochs[-1:], y[-1:], "o", color=series(index), ms=4)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("epoch")
    return drawn[0]


def risk_curves(name: str, curves: Sequence[tuple[int, list[float], list[float]]]) -> Markup:
    """Error over the share of answers given, one line per (series index, shares, errors)."""
    with _figure(340, 216, name) as (figure, drawn):
        axes = _axes(figure, 36, 36, 284, 160, "errors among them")
        for index, shares, errors in curves:
            axes.plot(shares, errors, color=series(index), ls=_dashes(index))
        axes.set(xlim=(0, 1), xticks=TICKS, xlabel="share of images that are answered")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _percent(axes.xaxis, axes.yaxis)
    return drawn[0]


def strip(low: float, high: float, quantiles: Sequence[float], mark: float) -> Markup:
    """Five quantiles on the axis low to high: a line, its middle half thick, the median a dot.

    A thin upright line stands at ``mark``.
    """

    def at(value: float) -> float:
        return 2 + 188 * min(max((value - low) / (high - low), 0), 1)

    q = [f"{at(value):.1f}" for value in quantiles]
    ink = 'stroke="var(--series-0)" stroke-width'
    return Markup(
        f'<svg class="strip" viewBox="0 0 192 16" aria-hidden="true">'
        f'<path d="M{at(mark):.1f} 0V16" stroke="var(--muted)" stroke-dasharray="2 2"/>'
        f'<path d="M{q[0]} 8H{q[4]}" {ink}="1.5"/><path d="M{q[1]} 8H{q[3]}" {ink}="5"/>'
        f'<circle cx="{q[2]}" cy="8" r="3.5" fill="var(--card)" {ink}="2"/></svg>'
    )


def losses(top: float, trained: float, left_out: float, test: float | None) -> Markup:
    """Losses on an axis from 0 to top: a ring, a dot that a line joins with it, an upright bar."""
    seen = [trained, left_out] if test is None else [trained, left_out, test]
    if not np.isfinite(seen).all():
        return Markup()
    x = [f"{4 + 184 * loss / top:.1f}" for loss in seen]
    ink = 'stroke="var(--series-0)"'
    ring = f'<path d="M{x[0]} 8H{x[1]}" {ink}/><circle cx="{x[0]}" cy="8" r="3" fill="var(--card)"'
    bar = "".join(f'<path d="M{at} 2V14" stroke="var(--ink)" stroke-width="2"/>' for at in x[2:])
    return Markup(
        f'<svg class="strip" viewBox="0 0 192 16" aria-hidden="true">{ring} {ink}/>'
        f'<circle cx="{x[1]}" cy="8" r="3.5" fill="var(--series-0)"/>{bar}</svg>'
    )


def strip_axis(low: int, high: int) -> Markup:
    """The decades above strips of decimal logarithms."""
    step = -(-(high - low) // 4)
    marks = "".join(
        f'<text x="{2 + 188 * (k - low) / (high - low):.1f}" y="12" text-anchor="'
        f'{"start" if k == low else "end" if k == high else "middle"}">{10.0**k:g}</text>'
        for k in range(low, high + 1, step)
    )
    return Markup(f'<svg class="strip" viewBox="0 0 192 16" aria-hidden="true">{marks}</svg>')


def reliability_diagram(
    name: str,
    index: int,
    confidence: np.ndarray,
    accuracy: np.ndarray,
    count: np.ndarray,
    share: np.ndarray,
    top: float,
) -> Markup:
    """Accuracy over confidence, with 95 % intervals, above the share of images per bin (≤ top)."""
    bins, full = len(count), count > 0
    x, y, n = confidence[full], accuracy[full], count[full]
    low, high = wilson(y, n)
    with _figure(240, 318, name) as (figure, drawn):
        axes = _axes(figure, 36, 104, 190, 190, "accuracy")
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
        axes.vlines(x, low, high, color=series(index), lw=1.2)
        axes.plot(x, y, "o", color=series(index), ms=4, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), yticks=TICKS, xticks=TICKS)
        axes.tick_params(labelbottom=False)
        shares = _axes(figure, 36, 36, 190, 40, "share of images")
        shares.bar(np.arange(bins) / bins, share, 0.8 / bins, align="edge", color=MUTED)
        shares.set(xlim=(0, 1), ylim=(0, top), yticks=(0, top), xticks=TICKS, xlabel="confidence")
        _percent(axes.yaxis, shares.yaxis, shares.xaxis)
    return drawn[0]


def entropy_histogram(
    name: str, index: int, known: np.ndarray, unknown: np.ndarray, limit: float, top: float
) -> Markup:
    """Shares of images per entropy bin on 0..limit: known inputs upwards, unknown downwards."""
    ticks = np.array([share for share in (0.02, 0.1, 0.3, 0.6, 1.0) if share <= top])
    with _figure(240, 230, name) as (figure, drawn):
        axes = _axes(figure, 36, 36, 190, 174, "share of images")
        edges = np.linspace(0, limit, len(known) + 1)
        axes.set_yscale("function", functions=(_signed_root, _signed_square))
        axes.stairs(known, edges, fill=True, color=series(index))
        axes.stairs(-unknown, edges, fill=True, color=RULE)
        axes.stairs(-unknown, edges, color=INK, lw=1)
        axes.axhline(0, color=INK, lw=0.8)
        axes.set(xlim=(0, limit), ylim=(-top, top), xlabel="entropy (nats)")
        axes.set_yticks(np.concatenate((-ticks, [0], ticks)))
        _percent(axes.yaxis)
    return drawn[0]


def wilson(rate: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a proportion seen `count` times (95 % for z = 1.96)."""
    shrink = 1 + z**2 / count
    middle = (rate + z**2 / (2 * count)) / shrink
    half = z / shrink * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def picture(image: np.ndarray) -> str:
    """A uint8 image, (h, w) or (h, w, 3), as a data URI: a small one exactly, else as a JPEG.

    No larger than it is shown.
    """
    buffer, drawn = io.BytesIO(), Image.fromarray(image)
    drawn.thumbnail((SHOWN, SHOWN))
    kind = "png" if max(drawn.size) <= EXACT else "jpeg"
    drawn.save(buffer, format=kind, optimize=True, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@contextmanager
def _figure(width: float, height: float, name: str) -> Iterator[tuple[Figure, list[Markup]]]:
    """A figure of width × height CSS pixels; on exit its SVG joins the list."""
    style = ["default", {**STYLE, "svg.hashsalt": name}]
    with matplotlib.style.context(style):
        figure, drawn = Figure(figsize=(width / 72, height / 72)), []
        yield figure, drawn
        buffer, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        drawn.append(_inline(buffer.getvalue(), width, height))


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float, name: str):
    """Axes at a place in CSS pixels, their vertical axis named above it, where it reads level."""
    w, h = figure.get_size_inches() * 72
    axes = figure.add_axes((left / w, bottom / h, width / w, height / h))
    axes.text(-32 / width, 1 + 8 / height, name, transform=axes.transAxes)
    return axes


def _percent(*axes: Axis) -> None:
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value) * 100:.3g}%"))


def _signed_root(share):
    return np.sign(share) * np.sqrt(np.abs(share))


def _signed_square(height):
    return np.sign(height) * np.square(height)


def _inline(svg: str, width: float, height: float) -> Markup:
    """Matplotlib's SVG file as an element of the page: no prolog, no clashing ids, CSS colours."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"#0a00(..)", lambda m: f"var(--series-{int(m[1], 16)})", body)
    for stand_in, variable in VARIABLES.items():
        body = body.replace(stand_in, variable)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{body}')
