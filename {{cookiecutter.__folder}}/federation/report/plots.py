"""The plots of a report, as SVG text that stands in a page: the same bytes for the same figures."""

import hashlib
import html
import io
import re
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from federation.run import timing

MAX_LINES = 20  # sites with a colour and a name of their own in a plot; more are drawn alike
MAX_NUMBERED = 16  # rows and columns of a heat map up to which each cell has its number
GLOBAL = "#111111"
LINES = ("-", "--", "-.", ":")  # lines that lie on each other are still seen
COLOURS = {"start": "#b8b8b8", "computing": "#2a78b5", "evaluating": "#e39b2d", "waiting": "#e8e8e8"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and read aloud
    "text.parse_math": False,  # a class may be called "$5"
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@matplotlib.rc_context(STYLE)
def curves(series: dict[str, list[float | None]], label: str) -> str:
    """A line each, by round; `all sites` in black and above the others.

    Args:
        series: a value for each round, None where it is not known.
        label: what is shown.
    """
    known = {name: values for name, values in series.items() if any(value is not None for value in values)}
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    whole = known.pop("all sites", None)
    colours = matplotlib.colormaps["tab10" if len(known) <= 10 else "tab20"].colors
    for number, (name, values) in enumerate(known.items()):
        alike = len(known) > MAX_LINES
        colour, text = ("#9db7cc", "each site" if number == 0 else None) if alike else (colours[number], name)
        line = {"color": colour, "linestyle": "-" if alike else LINES[number % len(LINES)], "linewidth": 1.2}
        axes.plot(range(len(values)), _gaps(values), label=_literal(text), marker=".", **line)
    if whole:
        axes.plot(
            range(len(whole)), _gaps(whole), color=GLOBAL, label="all sites", linewidth=2.2, marker="o", markersize=4
        )
    axes.set(xlabel="after round", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    names = ", ".join(["all sites"] * bool(whole) + list(known))
    return _svg(figure, f"{label} by round: {names}")


@matplotlib.rc_context(STYLE)
def heat_map(
    matrix: np.ndarray,
    rows: list[str],
    columns: list[str],
    label: str,
    by_row: bool = False,
    axes: tuple[str, str] = ("", ""),
) -> str:
    """A matrix of counts, the darker a cell, the larger.

    Args:
        matrix: int (rows, columns).
        label: what the whole shows, for those who cannot see it.
        by_row: a cell is as dark as its share of its row, not of the largest cell.
        axes: what the rows and what the columns are.
    """
    shade = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1) if by_row else matrix / max(matrix.max(), 1)
    cell = 0.36 if max(matrix.shape) <= MAX_NUMBERED else 0.24  # inches
    margin = 0.075 * max(len(name) for name in (*rows, *columns)) + 0.6
    size = (max(3.0, cell * len(columns) + margin), max(1.6, cell * len(rows) + margin))
    figure = Figure(figsize=size, layout="constrained")
    plot = figure.subplots()
    plot.pcolormesh(shade, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=0.5)
    plot.set_aspect("equal")
    plot.grid(False)
    plot.invert_yaxis()
    plot.set_yticks(np.arange(len(rows)) + 0.5, rows)
    plot.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90)
    plot.tick_params(length=0)
    plot.set(ylabel=axes[0], xlabel=axes[1])
    if max(matrix.shape) <= MAX_NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if shade[row, column] > 0.6 else "#222222"
            plot.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=7, color=colour)
    return _svg(figure, label)


@matplotlib.rc_context(STYLE)
def timeline(found: dict[str, list[tuple[float, float, str]]]) -> str:
    """A row a site; its stretches of time in the colours of what it did, as `timing.phases` tells."""
    figure = Figure(figsize=(10, 0.9 + 0.26 * len(found)), layout="constrained")
    axes = figure.subplots()
    for row, spans in enumerate(found.values()):
        for kind in timing.KINDS:
            bars = [(start, end - start) for start, end, k in spans if k == kind]
            axes.broken_barh(bars, (row + 0.1, 0.8), color=COLOURS[kind], label=kind if row == 0 else None)
    axes.set_yticks(np.arange(len(found)) + 0.5, list(found))
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    figure.legend(loc="outside upper center", ncols=len(timing.KINDS), fontsize=8)
    return _svg(figure, "What each site did at each time")


def _gaps(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _literal(text: str | None) -> str | None:
    """A label that matplotlib does not hide: it leaves those out of a legend that begin with an underscore."""
    return f"\u200b{text}" if text and text.startswith("_") else text


def _svg(figure: Figure, label: str) -> str:
    stream = io.StringIO()
    salt = hashlib.sha256(label.encode(errors="replace")).hexdigest()  # no two plots of a page share an id
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # only measured with that font, drawn with another
        figure.savefig(
            stream, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = stream.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # names of parts that nothing refers to
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
