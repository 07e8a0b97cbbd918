"""The page of a run: one HTML file that opens without a network. Figures, sizes and names, never an image."""

import hashlib
import html
import io
import json
import re
import string
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from federation import schema, timing
from federation.confusion import NoConfusion, confusion
from federation.figures import as_text

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
PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd;
  padding-top: 1rem }
.sub, figcaption, .note { color: #555 }
dl.facts { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem } dl.facts dt { color: #555; font-size: .85rem }
dl.facts dd { margin: 0; font-size: 1.5rem }
.wide { overflow: auto; max-width: 100% } .tall { max-height: 50rem }
.pair { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 1rem 0; max-width: 100% } svg { display: block; max-width: none; height: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top }
th { color: #555; font-weight: 600 } td.number, th.number { text-align: right }
td { max-width: 28rem; overflow-wrap: break-word } #receipt td:nth-child(-n+5) { white-space: nowrap }
tr.differs { background: #fff6df } summary { cursor: pointer; color: #555 }
@media print { .tall { max-height: none } }
</style>
</head>
<body>
<h1>$heading</h1>
<p class="sub">$subtitle</p>
$body
</body>
</html>
""")


@matplotlib.rc_context(STYLE)
def write(run: Path, project: str) -> Path:
    """Write `report.html` into a finished run's folder, and return its path.

    Args:
        run: the run's folder.
        project: the project's name; any text.

    Raises:
        schema.ResultError: the run has no result that can be read.
    """
    result = schema.read(run)
    partition = schema.read_json(run / "partition.json")
    body = [
        _facts(result),
        _section("learning", "What the model learned", _learning(result)),
        _section("holdings", "Who holds what", _holdings(partition)),
        _section("confusion", "What the final model takes for what", _confusion(run, result, partition["classes"])),
        _section("time", "Where the time went", _time(run, result)),
        _section("receipt", "Receipt: what left the sites", _receipt(run, result)),
        _section("configuration", "How it was made", _configuration(run, result)),
    ]
    subtitle = f"{result['algorithm']} on {result['dataset']}, {_dealt(result)}; run {run.name}"
    return _write(run / "report.html", project, subtitle, body)


@matplotlib.rc_context(STYLE)
def write_comparison(runs: list[Path], rows: list[list[str]], file: Path, project: str) -> Path:
    """Write a page that sets several finished runs side by side, and return its path.

    Args:
        runs: their folders.
        rows: a property each, its name first, then its value in each run, as text.
        file: the page.
        project: the project's name; any text.
    """
    results = {run.name: schema.read(run) for run in runs}
    differs = [len(set(row[1:])) > 1 for row in rows]
    table = _table(["", *results], rows, marked=differs) + _note("What is not the same in all runs is marked.")
    plots = [
        _curves({name: _series(result, key) for name, result in results.items()}, label)
        for key, label in (("accuracy", "accuracy"), ("loss", "loss"))
    ]
    body = [
        _section("table", "Side by side", [table]),
        _section("learning", "The global models, by round", [_pair(plots)]),
    ]
    return _write(file, project, f"{len(runs)} runs compared", body)


def _write(file: Path, project: str, subtitle: str, body: list[str]) -> Path:
    heading = html.escape(project)
    page = PAGE.substitute(
        title=f"{heading}: {html.escape(subtitle)}",
        heading=heading,
        subtitle=html.escape(subtitle),
        body="\n".join(body),
    )
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


# The sections


def _facts(result: dict[str, Any]) -> str:
    test = result["test"]
    facts = {"final test accuracy": as_text(test["accuracy"])}
    if len(test["sites"]) > 1 and test["worst"]:
        facts[f"worst site: {test['worst']}"] = as_text(test["sites"][test["worst"]]["accuracy"])
    facts |= {"sites": str(len(test["sites"])), "rounds": str(result["num_rounds"])}
    facts["in all"] = f"{result['wall_s']:.0f} s"
    items = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def _learning(result: dict[str, Any]) -> list[str]:
    sites = list(result["test"]["sites"])
    plots = []
    for key, own, label in (("accuracy", "sites", "accuracy"), ("loss", "losses", "loss")):
        series = {site: [entry[own].get(site) for entry in result["rounds"]] for site in sites}
        plots.append(_curves({"all sites": _series(result, key), **series}, label))
    test = [
        [site, t["images"], as_text(t["accuracy"]), as_text(t["loss"])] for site, t in result["test"]["sites"].items()
    ]
    total = sum(t["images"] for t in result["test"]["sites"].values())
    whole = ["all sites", total, as_text(result["test"]["accuracy"]), as_text(result["test"]["loss"])]
    rows = [
        [entry["round"], name, as_text(accuracy), as_text(loss)]
        for entry in result["rounds"]
        for name, accuracy, loss in [
            ("all sites", entry["accuracy"], entry["loss"]),
            *((site, entry["sites"].get(site), entry["losses"].get(site)) for site in sites),
        ]
    ]
    return [
        "<p>The global model after each round, on the validation images of every site. Round 0 is the untrained "
        "model; all sites together are weighted by their number of images.</p>",
        _pair(plots),
        _details("The figures of the plots", _table(["after round", "site", "accuracy", "loss"], rows)),
        "<p>The final model on the test images, which nothing was trained or chosen on:</p>",
        _table(["site", "test images", "accuracy", "loss"], [whole, *test]),
    ]


def _holdings(partition: dict[str, Any]) -> list[str]:
    counts, classes = partition["counts"], partition["classes"]
    matrix = np.array([[held[name] for name in classes] for held in counts.values()])
    plot = _heat_map(
        matrix, list(counts), classes, "images", f"Images of {len(classes)} classes at {len(counts)} sites"
    )
    rows = [[site, *(len(own[part]) for part in ("train", "val", "test"))] for site, own in partition["sites"].items()]
    return [
        _figure(plot, "Images to learn from, those for validation included: a row a site, a column a class."),
        _table(["site", "training", "validation", "test"], rows),
    ]


def _confusion(run: Path, result: dict[str, Any], classes: list[str]) -> list[str]:
    try:
        matrices = confusion(run, result, classes)
    except NoConfusion as reason:
        return [_note(f"No matrix: the test images or the model cannot be used on this machine ({reason}).")]
    if not matrices:
        return [_note("No matrix: no site has test images.")]
    shown = {"all sites": np.sum(list(matrices.values()), axis=0)}
    worst = result["test"]["worst"]
    if worst in matrices and len(matrices) > 1:
        shown[f"the worst site, {worst}"] = matrices[worst]
    parts, notes = [], []
    for name, matrix in shown.items():
        right = np.trace(matrix) / matrix.sum()
        label = f"Confusion matrix of {name}: {right:.3f} of {matrix.sum()} test images are on the diagonal"
        plot = _heat_map(matrix, classes, classes, "images", label, by_row=True, axes=("true class", "taken for"))
        parts.append(_figure(plot, f"{name[0].upper()}{name[1:]}: {right:.3f} of {matrix.sum()} on the diagonal"))
        reported = result["test"]["accuracy"] if name == "all sites" else result["test"]["sites"][worst]["accuracy"]
        if reported is None or abs(right - reported) > 0.005:
            notes.append(f"Computed anew here. {name} had reported {as_text(reported)}: model.py or the images differ.")
    return [
        "<p>The final model on the test images: a row a true class, a column what the model says; "
        "the darker, the larger a part of its row.</p>",
        _pair(parts),
        *map(_note, notes),
    ]


def _time(run: Path, result: dict[str, Any]) -> list[str]:
    found = timing.phases(run / "workspace")
    sums = timing.totals(found) or result["timing"]
    if not sums:
        return [_note("Unknown: the logs of the sites are not here, or do not say when what began.")]
    parts = [
        "<p><b>start</b>: until the first task: process, imports, data. <b>computing</b>: training. "
        "<b>evaluating</b>: validation, test, prediction. <b>waiting</b>: for the server and the other sites.</p>"
    ]
    if found:
        parts.append(_figure(_timeline(found), "From the server's first sign of life to its last."))
    rows = [[site, *(f"{kinds[kind]:.1f}" for kind in timing.KINDS)] for site, kinds in sums.items()]
    parts.append(_table(["site, seconds", *timing.KINDS], rows))
    return parts


def _receipt(run: Path, result: dict[str, Any]) -> list[str]:
    path = run / "receipt.jsonl"
    if not path.exists():
        return [_note("None: this run's server kept no receipt.")]
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda r: (r["round"] is None, r["round"] or 0, r["task"], len(r["site"]), r["site"]))
    # What is the same in many answers is listed once, under a letter or a number.
    tensor_lists: dict[str, str] = {}
    entry_lists: dict[str, str] = {}
    rows = []
    for record in records:
        tensors, own = json.dumps(record["tensors"]), json.dumps(record["headers"])
        letter = tensor_lists.setdefault(tensors, _letter(len(tensor_lists))) if record["tensors"] else ""
        number = entry_lists.setdefault(own, str(len(entry_lists) + 1)) if record["headers"] else ""
        rows.append(
            [
                "" if record["round"] is None else str(record["round"] + 1),
                record["site"],
                record["task"],
                f"list {letter}: {len(record['tensors'])}" if letter else "none",
                sum(tensor["bytes"] for tensor in record["tensors"]),
                ", ".join(record["metrics"]),
                _entries(record["meta"]),
                f"list {number}: {len(record['headers'])}" if number else "none",
            ]
        )
    sites = {record["site"] for record in records}
    total = sum(tensor["bytes"] for record in records for tensor in record["tensors"])
    named = ["round", "site", "answer to", "tensors", "bytes", "metrics", "other entries", "NVFlare's own entries"]
    parts = [
        f"<p>Written down by the server as each answer arrived: {len(records)} answers of {len(sites)} sites, "
        f"{total:,} bytes of tensors in all. What is not listed did not arrive. No value is kept, only names, types "
        "and sizes; NVFlare's own signals, such as heartbeats, are not answers and are not listed.</p>",
        _foreign(run, result, records),
        _table(named, rows),
    ]
    for tensors, letter in tensor_lists.items():
        named = ["tensor", "shape", "type", "bytes"]
        lines = [[t["name"], _shape(t["shape"]), t["dtype"], t["bytes"]] for t in json.loads(tensors)]
        parts.append(_details(f"List {letter}: {len(lines)} tensors", _table(named, lines)))
    for entries, number in entry_lists.items():
        lines = list(map(list, json.loads(entries).items()))
        parts.append(
            _details(f"List {number}: {len(lines)} of NVFlare's own entries", _table(["entry", "type"], lines))
        )
    return parts


def _foreign(run: Path, result: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Say whether all tensors that came look like the model's weights."""
    import torch

    final = torch.load(run / result["model"], weights_only=True)
    weights = {(name, tuple(tensor.shape)) for name, tensor in final.items()}
    sent = {(tensor["name"], tuple(tensor["shape"])) for record in records for tensor in record["tensors"]}
    if foreign := sorted(name for name, shape in sent - weights):
        return _note(f"Not by name and shape a weight of the final model: {', '.join(foreign)}.")
    return "<p>Every tensor has the name and the shape of a weight of the final model.</p>"


def _configuration(run: Path, result: dict[str, Any]) -> list[str]:
    hidden = {"rounds", "test", "timing", "versions", "data_root"}
    rows = [[name, str(value)] for name, value in result.items() if name not in hidden and not isinstance(value, dict)]
    rows[0][0] = "version of results.json"
    rows += [[f"version of {name}", value] for name, value in result["versions"].items()]
    parts = [_table(["", ""], rows)]
    job = run / "job"
    files = [
        [path.relative_to(job).as_posix(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(job.rglob("*"))
        if path.is_file()
    ]
    if files:
        parts.append("<p>The files that were sent to the server and the sites:</p>")
        parts.append(_table(["file", "bytes", "SHA-256"], files))
    return parts


# The plots


def _series(result: dict[str, Any], key: str) -> list[float | None]:
    return [entry[key] for entry in result["rounds"]]


def _curves(series: dict[str, list[float | None]], label: str) -> str:
    """A line each; the first in black if it stands for all sites."""
    known = {name: values for name, values in series.items() if any(value is not None for value in values)}
    if not known:
        return _note(f"The {label} of the rounds was not recorded.")
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
    return _figure(_svg(figure, f"{label} by round: {names}"), f"{label.capitalize()} by round")


def _gaps(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _heat_map(
    matrix: np.ndarray,
    rows: list[str],
    columns: list[str],
    unit: str,
    label: str,
    by_row: bool = False,
    axes: tuple[str, str] = ("", ""),
) -> str:
    """Cells as vectors, darker the larger; of its row's sum if `by_row`."""
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


def _timeline(found: dict[str, list[tuple[float, float, str]]]) -> str:
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


def _svg(figure: Figure, label: str) -> str:
    """A plot as an element of the page: the same bytes for the same figures."""
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


# The page's parts


def _section(name: str, title: str, parts: Iterable[str]) -> str:
    content = "\n".join(parts)
    return f'<section id="{name}">\n<h2>{html.escape(title)}</h2>\n{content}\n</section>'


def _figure(svg: str, caption: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def _pair(figures: list[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _table(header: list[str], rows: list[list[Any]], marked: list[bool] | None = None) -> str:
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    align = [' class="number"' if rows and all(map(_is_number, column)) else "" for column in columns]
    head = "".join(f"<th{side}>{html.escape(name)}</th>" for name, side in zip(header, align, strict=True))
    classes = [' class="differs"' if mark else "" for mark in marked or [False] * len(rows)]
    lines = []
    for mark, row in zip(classes, rows, strict=True):
        texts = (f"{value:,}" if isinstance(value, int) else str(value) for value in row)
        cells = (f"<td{side}>{html.escape(text)}</td>" for text, side in zip(texts, align, strict=True))
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return f'<div class="wide tall"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or re.fullmatch(r"-|\d+(\.\d+)?", str(value)) is not None


def _literal(text: str | None) -> str | None:
    """A label that matplotlib does not hide: it leaves those out of a legend that begin with an underscore."""
    return f"\u200b{text}" if text and text.startswith("_") else text


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + string.ascii_uppercase[number % 26]


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape)) or "one number"


def _entries(entries: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in entries.items())


def _dealt(result: dict[str, Any]) -> str:
    return {
        "dirichlet": f"dirichlet, alpha {result['alpha']}",
        "shards": f"shards, {result['shards_per_site']} a site",
    }.get(result["partition"], result["partition"])
