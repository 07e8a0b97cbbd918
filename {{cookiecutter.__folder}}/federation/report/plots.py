"""The plots of a report, as SVG to embed in a page: the same numbers give the same bytes."""

import hashlib
import html
import io
import re
import textwrap
import warnings
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from federation.run.metrics import MAX_SITES, QUANTILES, as_text, some
from federation.run.schema import COMPARED

MAX_ANNOTATED = 16  # larger heat maps have a color bar instead of numbers in their cells
MAX_NAMES, LONG = 40, 6.0  # longer axes have numbers instead of names, and this length in inches
LINES = ("-", "--", "-.", ":")  # overlapping lines stay visible
DPI = 200  # of what is drawn as pixels
N_INTERVALS = 1000  # of a timeline
# Okabe & Ito: safe for color blindness
OKABE_ITO = ("#0072b2", "#009e73", "#d55e00", "#e69f00", "#56b4e9", "#cc79a7", "#8c6d31", "#999999")
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
def curves(series: dict[str, dict[int, float | None]], label: str) -> str | None:
    """Plot one line per series by round, `all sites` in black on top; None if there are no values.

    Args:
        series: name -> round -> value, None where unknown. Quantiles over the sites become bands.
        label: the metric's name.
    """
    values = {name: np.array([*own.values()], dtype=float) for name, own in series.items()}  # None becomes NaN, a gap
    known = {name: own for name, own in values.items() if not np.isnan(own).all()}
    if not known:
        return None
    bands = [name for name in series if name != "all sites"] == [*QUANTILES]
    names = "mean and distribution over the sites" if bands else some(known)
    whole = known.pop("all sites", None)
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    if bands:
        rounds, (least, low, median, high, most) = list(series["all sites"]), known.values()
        axes.fill_between(rounds, least, most, color="#dbe9f4", linewidth=0, label="min to max")
        axes.fill_between(rounds, low, high, color="#9cc4e0", linewidth=0, label="10 % to 90 %")
        axes.plot(rounds, median, color="#1f5f96", linestyle="--", linewidth=1.5, label="median")
        known = {}
    for number, (name, own) in enumerate(known.items()):
        text = re.sub("^_", "\u200b_", name)  # matplotlib omits labels with a leading underscore from legends
        look = {"color": OKABE_ITO[number % len(OKABE_ITO)], "linestyle": LINES[number % len(LINES)], "label": text}
        axes.plot(list(series[name]), own, linewidth=1.2, marker=".", **look)
    if whole is not None:
        style = {} if bands else {"marker": "o", "markersize": 4}
        axes.plot(list(series["all sites"]), whole, color="#111111", label="all sites", linewidth=2.2, **style)
    axes.set(xlabel="after round", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return as_svg(figure, f"{label} by round: {names}")


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
    shown = [name for names in (rows, columns) if len(names) <= MAX_NAMES for name in names]
    margin = 0.075 * max(map(len, shown), default=4) + 0.6
    width, height = (margin + (cell * n if n <= MAX_NAMES else LONG) for n in (len(columns), len(rows)))
    figure = Figure(figsize=(max(3.0, width + (not numbered)), max(1.6, height)), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    if numbered:
        axes.pcolormesh(shade, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=0.5)
        axes.set_aspect("equal")
    else:  # as pixels, because thousands of rectangles would be megabytes
        norm, ticks = (
            (Normalize(0, 1), None) if confusion else (LogNorm(1, max(matrix.max(), 2)), LogLocator(subs=(1, 2, 5)))
        )
        mesh = axes.pcolormesh(shade if confusion else matrix, cmap="viridis_r", norm=norm, rasterized=True)
        unit = "share of the true class" if confusion else "images (white: none)"
        figure.colorbar(mesh, label=unit, shrink=0.8, ticks=ticks, format="{x:,.6g}")
    axes.invert_yaxis()
    for axis, names, kind in ((axes.yaxis, rows, "sites"), (axes.xaxis, columns, "classes")):
        if len(names) <= MAX_NAMES:
            axis.set_ticks(np.arange(len(names)) + 0.5, names)
        else:
            axis.set_label_text(kind)
    axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    if confusion:
        axes.set(ylabel="true class", xlabel="predicted class")
    for (row, column), value in np.ndenumerate(matrix) if numbered else ():
        color = "white" if shade[row, column] > 0.6 else "#222222"
        axes.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=7, color=color)
    return as_svg(figure, label)


@matplotlib.rc_context(STYLE)
def reliability(calibration: np.ndarray, label: str) -> str:
    """Plot the share of correct predictions against their probability, and how many there are.

    Args:
        calibration: (3, bins), as in `classification.Counts`.
        label: description for screen readers.
    """
    n, correct, probability = calibration
    known = n > 0
    figure = Figure(figsize=(3.6, 4.2), layout="constrained")
    axes, below = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    axes.plot((0, 1), (0, 1), "--", color="#666666", linewidth=1, label="perfectly calibrated")
    axes.plot(probability[known] / n[known], correct[known] / n[known], "o-", color=COLORS["computing"], label="model")
    axes.set(ylabel="share of correct predictions", xlim=(0, 1), ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
    below.stairs(n, np.linspace(0, 1, len(n) + 1), fill=True, color=COLORS["computing"])
    below.set(xlabel="probability of the predicted class", ylabel="images")
    return as_svg(figure, label)


@matplotlib.rc_context({**STYLE, "axes.grid": False})
def baselines(comparison: dict[str, Any]) -> Figure:
    """Plot a compare.json: a group of bars for all sites, and one per site; with many sites, one box per row."""
    rows = comparison["rows"]
    sites = list(rows["federated"]["sites"])
    many = len(sites) > MAX_SITES
    figure = Figure(figsize=(7 if many else max(6, 2.5 + 1.5 * len(sites)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.88 / len(COMPARED)
    for i, (key, title) in enumerate(COMPARED.items()):
        if many:
            known = [value for value in rows[key]["sites"].values() if value is not None]
            look = {"patch_artist": True, "boxprops": {"facecolor": OKABE_ITO[i]}, "medianprops": {"color": "black"}}
            name = title.replace(", ", ",\n")
            axes.boxplot(known, positions=[i], widths=0.5, whis=(0, 100), tick_labels=[name], **look)
            axes.plot(i, rows[key]["all"], "D", color="white", markeredgecolor="black")
            continue
        heights = [rows[key]["all"], *(rows[key]["sites"][site] for site in sites)]
        places = [group + (i - (len(COMPARED) - 1) / 2) * width for group in range(len(heights))]
        bars = axes.bar(places, [height or 0 for height in heights], width, label=title, color=OKABE_ITO[i])
        axes.bar_label(bars, map(as_text, heights), fontsize=7)
    if many:
        figure.supxlabel(
            f"{len(sites):,} sites from min to max; box: the middle half; line: median; diamond: mean", size=9
        )
    else:
        axes.set_xticks(range(1 + len(sites)), [textwrap.fill(site, 14) for site in ("all sites", *sites)])
        axes.margins(x=0.01)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set(ylabel="test accuracy", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{comparison['run']}: {comparison['model_class']}, epochs: {comparison['epochs']}"
    axes.set_title(title, pad=16)  # above the numbers on the bars
    return figure


@matplotlib.rc_context(STYLE)
def timeline(phases: dict[str, list[tuple[float, float, str]]]) -> str:
    """Plot the result of `timing.phases`: one row per process; in each interval, the share of each kind."""
    figure = Figure(figsize=(10, 0.9 + 0.26 * min(len(phases), MAX_NAMES)), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, max(spans[-1][1] for spans in phases.values()), N_INTERVALS + 1)
    for row, spans in enumerate(phases.values()):
        base, ends = np.full(N_INTERVALS, row + 0.9), [0.0, *(end for _, end, _ in spans)]
        for kind, color in COLORS.items():
            spent = np.cumsum([0.0, *((end - start) * (k == kind) for start, end, k in spans)])
            top = base - 0.8 * np.diff(np.interp(edges, ends, spent)) / edges[1]
            label = None if row else kind
            axes.stairs(top, edges, baseline=base, fill=True, color=color, label=label, rasterized=True)
            base = top
    if len(phases) <= MAX_NAMES:
        axes.set_yticks(np.arange(len(phases)) + 0.5, list(phases))
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    figure.legend(loc="outside upper center", ncols=len(COLORS), fontsize=8)
    return as_svg(figure, "Timeline of each process")


def as_svg(figure: Figure, label: str) -> str:
    stream = io.StringIO()
    salt = hashlib.sha256(label.encode(errors="replace")).hexdigest()  # ids must differ between the plots of a page
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser draws it with another font
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", bbox_inches="tight", transparent=True, metadata=nothing, dpi=DPI)
    svg = stream.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # ids that nothing refers to
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
