"""The page of a run, or a comparison of several: one HTML file that opens offline. It never contains an image.

This module computes the content; page.html.j2 has the text and the layout.
"""

import hashlib
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from federation.errors import UserError
from federation.protocol import read_json_lines
from federation.report import plots
from federation.report.confusion import confusion
from federation.run import schema, timing
from federation.run.folder import RunFolder
from federation.run.metrics import MAX_SITES, QUANTILES, as_text, quantiles, some, worst_sites
from settings import PROJECT_NAME

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names of classes, sites, runs and the project can be anything
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"as_text": as_text, "some": some}


def write(run: RunFolder) -> Path:
    """Write `report.html` into a finished run's folder, and return its path.

    Raises:
        UserError: the run has no readable result.
    """
    result, partition = schema.read(run), schema.read_json(run.partition)
    phases, rounds, curves = timing.phases(run), _rounds(result), {}
    for i, metric in enumerate(("accuracy", "loss")):
        series = {name: {n: own[name][i] for n, own in rounds.items()} for name in next(iter(rounds.values()))}
        curves[metric] = plots.curves(series, metric)
    parts = ("train", "val", "test")
    return _render(
        run.report,
        name=run.name,
        result=result,
        partition=partition,
        notes=schema.coverage(result) + schema.caveats(result),
        rounds=rounds,
        curves=curves,
        test=_test(result["test"]),
        distribution=_distribution(partition),
        images=_by_site({site: [len(own[part]) for part in parts] for site, own in partition["sites"].items()}),
        confusion=_confusion(run, result, partition["classes"]),
        timeline=plots.timeline(phases) if phases else None,
        seconds=timing.totals(phases) or result["timing"],
        kinds=timing.KINDS,
        audit=_audit(run, result),
        files=[
            [path.relative_to(run.job).as_posix(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
            for path in sorted(run.job.rglob("*"))
            if path.is_file()
        ],
    )


def write_comparison(results: dict[str, dict[str, Any]], rows: list[list[str]], file: Path, reading: str) -> Path:
    """Write a page that compares several runs, and return its path.

    Args:
        results: name of a run -> its results.json.
        rows: one per property: its name, then its value in each run, as text.
        file: where to write the page.
        reading: how to read the table, in a sentence.
    """
    curves = {}
    for metric in ("accuracy", "loss"):
        series = {name: {entry["round"]: entry[metric] for entry in of["rounds"]} for name, of in results.items()}
        curves[metric] = plots.curves(series, metric)
    return _render(file, runs=list(results), rows=rows, curves=curves, reading=reading)


def _render(file: Path, **values: Any) -> Path:
    page = TEMPLATES.get_template("page.html.j2").render(values, title=PROJECT_NAME)
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def _by_site(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Site -> numbers, or if there are many sites: name of a quantile -> that of each number over the sites."""
    if len(rows) <= MAX_SITES:
        return rows
    columns = [quantiles(column) for column in zip(*rows.values(), strict=True)]
    return dict(zip(QUANTILES, zip(*columns, strict=True), strict=True))


def _rounds(result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Round -> `all sites`, and sites or quantiles -> accuracy and loss."""
    rounds, rows = result["rounds"], {}
    sites = dict.fromkeys([*result["test"]["sites"], *(site for entry in rounds for site in entry["sites"])])
    for entry in rounds:
        own = _by_site({site: [entry["sites"].get(site), entry["losses"].get(site)] for site in sites})
        rows[entry["round"]] = {"all sites": [entry["accuracy"], entry["loss"]], **own}
    return rows


def _test(test: dict[str, Any]) -> dict[str, Any]:
    """`all sites`, quantiles if there are many, and sites, of many the worst -> images, accuracy and loss."""
    rows = {site: [own["images"], own["accuracy"], own["loss"]] for site, own in test["sites"].items()}
    worst = {site: rows[site] for site in worst_sites(test)} if len(rows) > MAX_SITES else {}
    images = sum(own["images"] for own in test["sites"].values())
    return {"all sites": [images, test["accuracy"], test["loss"]], **_by_site(rows), **worst}


def _distribution(partition: dict[str, Any]) -> tuple[str, str] | None:
    """Heat map of the sites that reported their counts, which real sites need not do, and caption; None if none did."""
    classes = partition["classes"]
    counts = {site: own for site, own in partition["counts"].items() if own}
    if not counts:
        return None
    matrix = np.array([[own.get(name, 0) for name in classes] for own in counts.values()])
    caption = "Training and validation images: one row per site, one column per class."
    if len(counts) > plots.MAX_NAMES:
        matrix = matrix[np.lexsort((-matrix.max(axis=1), matrix.argmax(axis=1)))]
        caption += " Sites are sorted by their most frequent class, then by its images."
    label = f"Images per site and class, {len(counts):,} sites"
    return plots.heat_map(matrix, list(counts), classes, label), caption


def _confusion(run: RunFolder, result: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """`matrices`: plot and caption, for all sites and for the worst site; `notes`: what is missing or different."""
    try:
        counts = confusion(run, result, classes)
    except Exception as error:  # whatever the user's data.py and model.py raise, write the rest of the page
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = name + str(error).strip().partition("\n")[0]
        note = f"Not available: the test images or the model cannot be used on this machine ({reason})."
        return {"matrices": [], "notes": [note]}
    if not counts:
        return {"matrices": [], "notes": ["Not available: no site has test images."]}
    test = result["test"]
    shown = [("all sites", counts["all sites"], test["accuracy"])]
    if (worst := test["worst"]) in counts and len(test["sites"]) > 1:
        shown.append((f"the worst site, {worst}", counts[worst], test["sites"][worst]["accuracy"]))
    matrices, notes = [], []
    for name, matrix, reported in shown:
        accuracy = np.trace(matrix) / matrix.sum()
        caption = f"{name}: accuracy {accuracy:.3f} on {matrix.sum():,} test images"
        plot = plots.heat_map(matrix, classes, classes, f"Confusion matrix of {caption}", confusion=True)
        matrices.append((plot, caption[0].upper() + caption[1:]))
        if reported is None or abs(accuracy - reported) > 0.005:
            notes.append(f"Recomputed here, but {name} reported {as_text(reported)}: model.py or images changed.")
    return {"matrices": matrices, "notes": notes}


def _audit(run: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
    """The records of the audit log, sorted, one for all sites with the same answer, with the lists that they share."""
    grouped: dict[str, dict[str, Any]] = {}
    for line in read_json_lines(run.audit_log):
        sites = line.pop("sites", None) or [line.pop("site")]  # version 1 has one line per site
        grouped.setdefault(json.dumps(line, sort_keys=True), {**line, "sites": []})["sites"] += sites
    records = list(grouped.values())
    for record in records:
        record["sites"].sort(key=lambda site: (len(site), site))
        record["bytes"] = sum(tensor["bytes"] for tensor in record["tensors"])
    records.sort(key=lambda r: (r["round"] is None, r["round"] or 0, r["task"], len(r["sites"][0]), r["sites"][0]))
    return {
        "records": records,
        "n_answers": sum(len(record["sites"]) for record in records),
        "n_sites": len({site for record in records for site in record["sites"]}),
        "bytes": sum(len(record["sites"]) * record["bytes"] for record in records),
        "not_in_model": _not_in_model(run.path / result["model"], records),
        "tensors": _deduplicate(records, "tensors", lambda n: string.ascii_uppercase[n % 26] * (n // 26 + 1)),
        "headers": _deduplicate(records, "headers", lambda n: str(n + 1)),
    }


def _deduplicate(records: list[dict[str, Any]], key: str, label: Callable[[int], str]) -> dict[str, Any]:
    """List once what many records share: label -> list. Each record gets the label of its list."""
    labels: dict[str, str] = {}
    for record in records:
        if record[key]:
            record[f"{key}_list"] = labels.setdefault(json.dumps(record[key]), label(len(labels)))
    return {label: json.loads(text) for text, label in labels.items()}


def _not_in_model(model: Path, records: list[dict[str, Any]]) -> list[str]:
    """Names of the received tensors that match no weight of the model by name and shape."""
    import torch

    sent = {(tensor["name"], tuple(tensor["shape"])) for record in records for tensor in record["tensors"]}
    if not sent:
        return []
    weights = {(name, tuple(tensor.shape)) for name, tensor in torch.load(model, weights_only=True).items()}
    return sorted(name for name, shape in sent - weights)
