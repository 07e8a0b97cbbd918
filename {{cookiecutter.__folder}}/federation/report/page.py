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
from federation.run.metrics import as_text
from settings import PROJECT_NAME

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names of classes, sites, runs and the project can be anything
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["as_text"] = as_text


def write(run: RunFolder) -> Path:
    """Write `report.html` into a finished run's folder, and return its path.

    Raises:
        UserError: the run has no readable result.
    """
    result, partition = schema.read(run), schema.read_json(run.partition)
    rounds, phases, curves = result["rounds"], timing.phases(run), {}
    for metric, by_site in (("accuracy", "sites"), ("loss", "losses")):
        series = {"all sites": [entry[metric] for entry in rounds]}
        series |= {site: [entry[by_site].get(site) for entry in rounds] for site in result["test"]["sites"]}
        curves[metric] = plots.curves(series, metric)
    return _render(
        run.report,
        name=run.name,
        result=result,
        partition=partition,
        caveats=schema.caveats(result),
        curves=curves,
        distribution=_distribution(partition),
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


def write_comparison(results: dict[str, dict[str, Any]], rows: list[list[str]], file: Path) -> Path:
    """Write a page that compares several finished runs, and return its path.

    Args:
        results: name of a run -> its results.json.
        rows: one per property: its name, then its value in each run, as text.
        file: where to write the page.
    """
    curves = {
        metric: plots.curves({name: [entry[metric] for entry in of["rounds"]] for name, of in results.items()}, metric)
        for metric in ("accuracy", "loss")
    }
    return _render(file, runs=list(results), rows=rows, curves=curves)


def _render(file: Path, **values: Any) -> Path:
    page = TEMPLATES.get_template("page.html.j2").render(values, title=PROJECT_NAME)
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def _distribution(partition: dict[str, Any]) -> str | None:
    """Heat map of the sites that reported their counts, which real sites need not do; None if no site did."""
    classes = partition["classes"]
    counts = {site: own for site, own in partition["counts"].items() if own}
    if not counts:
        return None
    matrix = np.array([[own.get(name, 0) for name in classes] for own in counts.values()])
    return plots.heat_map(matrix, list(counts), classes, f"Images per site and class, {matrix.shape[0]} sites")


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
    shown = [("all sites", np.sum(list(counts.values()), axis=0), test["accuracy"])]
    if (worst := test["worst"]) in counts and len(counts) > 1:
        shown.append((f"the worst site, {worst}", counts[worst], test["sites"][worst]["accuracy"]))
    matrices, notes = [], []
    for name, matrix, reported in shown:
        accuracy = np.trace(matrix) / matrix.sum()
        caption = f"{name}: accuracy {accuracy:.3f} on {matrix.sum()} test images"
        plot = plots.heat_map(matrix, classes, classes, f"Confusion matrix of {caption}", confusion=True)
        matrices.append((plot, caption[0].upper() + caption[1:]))
        if reported is None or abs(accuracy - reported) > 0.005:
            notes.append(f"Recomputed here, but {name} reported {as_text(reported)}: model.py or images changed.")
    return {"matrices": matrices, "notes": notes}


def _audit(run: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
    """The records of the audit log, sorted, with the lists that they share."""
    records = read_json_lines(run.audit_log)
    records.sort(key=lambda r: (r["round"] is None, r["round"] or 0, r["task"], len(r["site"]), r["site"]))
    for record in records:
        record["bytes"] = sum(tensor["bytes"] for tensor in record["tensors"])
    return {
        "records": records,
        "n_sites": len({record["site"] for record in records}),
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
