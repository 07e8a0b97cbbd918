"""The plots of a report, as SVG to embed in a page: the same numbers give the same bytes."""

import hashlib
import html
import io
import re
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure

MAX_LINES = 20  # with more sites than this, all get the same color and one legend entry
MAX_ANNOTATED = 16  # larger heat maps show no numbers in their cells
LINES = ("-", "--", "-.", ":")  # overlapping lines stay visible
COLORS = {"start": "#b8b8b8", "computing": "#2a78b5", "evaluating": "#e39b2d", "waiting": "#e8e8e8"}  # timing.KINDS
STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, searchable, accessible
    "text.parse_math": False,  # a class can be named "$5"
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
def curves(series: dict[str, list[float | None]], label: str) -> str | None:
    """Plot one line per series by round, `all sites` in black on top; None if there are no values.

    Args:
        series: name -> one value per round, None where unknown.
        label: the metric's name.
    """
    values = {name: np.array(own, dtype=float) for name, own in series.items()}  # None becomes NaN, a gap
    known = {name: own for name, own in values.items() if not np.isnan(own).all()}
    if not known:
        return None
    names = ", ".join(known)
    whole = known.pop("all sites", None)
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab10" if len(known) <= 10 else "tab20"].colors
    for number, (name, own) in enumerate(known.items()):
        if len(known) > MAX_LINES:
            style = {"color": "#9db7cc", "label": None if number else "each site"}
        else:  # matplotlib omits labels with a leading underscore from legends
            text = re.sub("^_", "\u200b_", name)
            style = {"color": colors[number], "linestyle": LINES[number % len(LINES)], "label": text}
        axes.plot(own, linewidth=1.2, marker=".", **style)
    if whole is not None:
        axes.plot(whole, color="#111111", label="all sites", linewidth=2.2, marker="o", markersize=4)
    axes.set(xlabel="after round", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return _svg(figure, f"{label} by round: {names}")


@matplotlib.rc_context(STYLE)
def heat_map(matrix: np.ndarray, rows: list[str], columns: list[str], label: str, confusion: bool = False) -> str:
    """Plot a matrix of counts: the larger, the darker.

    Args:
        matrix: int (rows, columns).
        label: description for screen readers.
        confusion: True for a confusion matrix, in which shades are shares of the row.
    """
    shade = matrix / np.maximum(matrix.sum(axis=1, keepdims=True) if confusion else matrix.max(), 1)
    numbered = max(matrix.shape) <= MAX_ANNOTATED
    cell = 0.36 if numbered else 0.24  # inches
    margin = 0.075 * max(len(name) for name in (*rows, *columns)) + 0.6
    size = (max(3.0, cell * len(columns) + margin), max(1.6, cell * len(rows) + margin))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(shade, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=0.5)
    axes.set_aspect("equal")
    axes.grid(False)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90)
    axes.tick_params(length=0)
    if confusion:
        axes.set(ylabel="true class", xlabel="predicted class")
    for (row, column), value in np.ndenumerate(matrix) if numbered else ():
        color = "white" if shade[row, column] > 0.6 else "#222222"
        axes.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=7, color=color)
    return _svg(figure, label)


@matplotlib.rc_context(STYLE)
def timeline(phases: dict[str, list[tuple[float, float, str]]]) -> str:
    """Plot the result of `timing.phases`: one row per site."""
    figure = Figure(figsize=(10, 0.9 + 0.26 * len(phases)), layout="constrained")
    axes = figure.subplots()
    for row, spans in enumerate(phases.values()):
        for kind, color in COLORS.items():
            bars = [(start, end - start) for start, end, k in spans if k == kind]
            axes.broken_barh(bars, (row + 0.1, 0.8), color=color, label=None if row else kind)
    axes.set_yticks(np.arange(len(phases)) + 0.5, list(phases))
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    figure.legend(loc="outside upper center", ncols=len(COLORS), fontsize=8)
    return _svg(figure, "Timeline of each site")


def _svg(figure: Figure, label: str) -> str:
    stream = io.StringIO()
    salt = hashlib.sha256(label.encode(errors="replace")).hexdigest()  # ids must differ between the plots of a page
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser draws it with another font
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata=nothing)
    svg = stream.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # ids that nothing refers to
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
