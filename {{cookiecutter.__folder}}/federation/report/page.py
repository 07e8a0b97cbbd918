"""The page of a run, or of several: one HTML file that opens without a network. Numbers and names, never an image.

What is on it is computed here; how it looks is in page.html.j2.
"""

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from federation.errors import UserError
from federation.protocol import AUDIT_LOG, read_json_lines
from federation.report import plots
from federation.report.confusion import confusion
from federation.run import schema, timing
from federation.run.metrics import as_text

METRICS = ("accuracy", "loss")
PARTS = ("train", "val", "test")  # of a site's images in partition.json
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # a class, a site, a run or the project may have any name
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(run: Path, project: str) -> Path:
    """Write `report.html` into a finished run's folder, and return its path.

    Args:
        run: the run's folder.
        project: the project's name; any text.

    Raises:
        UserError: the run has no result that can be read.
    """
    result = schema.read(run)
    partition = schema.read_json(run / "partition.json")
    return _render(
        run / "report.html",
        title=project,
        subtitle=f"{result['algorithm']} on {result['dataset']}, {_partitioned(result)}; run {run.name}",
        facts=_facts(result),
        caveats=schema.caveats(result),
        learning=_learning(result),
        distribution=_distribution(partition),
        confusion=_confusion(run, result, partition["classes"]),
        time=_time(run, result),
        audit=_audit(run, result),
        configuration=_configuration(run, result),
    )


def write_comparison(runs: list[Path], rows: list[list[str]], file: Path, project: str) -> Path:
    """Write a page that sets several finished runs side by side, and return its path.

    Args:
        runs: their folders.
        rows: one per property: its name, then its value in each run, as text.
        file: the page.
        project: the project's name; any text.
    """
    results = {run.name: schema.read(run) for run in runs}
    rounds = [
        [entry["round"], name, entry["accuracy"], entry["loss"]]
        for name, result in results.items()
        for entry in result["rounds"]
    ]
    comparison = {
        "runs": list(results),
        "rows": rows,
        "differing": [number for number, row in enumerate(rows) if len(set(row[1:])) > 1],
        "curves": _curves(rounds),
    }
    return _render(file, title=project, subtitle=f"{len(runs)} runs compared", comparison=comparison)


def _render(file: Path, **values: Any) -> Path:
    page = TEMPLATES.get_template("page.html.j2").render(values)
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def _facts(result: dict[str, Any]) -> dict[str, str]:
    test = result["test"]
    facts = {"final test accuracy": as_text(test["accuracy"])}
    if len(test["sites"]) > 1 and test["worst"]:
        facts[f"worst site: {test['worst']}"] = as_text(test["sites"][test["worst"]]["accuracy"])
    facts |= {"sites": str(len(test["sites"])), "rounds": str(result["num_rounds"])}
    return {**facts, "total time": f"{result['wall_s']:.0f} s"}


def _curves(rounds: list[list[Any]]) -> dict[str, str | None]:
    """A plot of each metric, None where no round has it. Rows: round, site or run, accuracy, loss."""
    found: dict[str, str | None] = {}
    for column, metric in enumerate(METRICS, start=2):
        series: dict[str, list[float | None]] = {}
        for row in rounds:
            series.setdefault(row[1], []).append(row[column])
        known = any(row[column] is not None for row in rounds)
        found[metric] = plots.curves(series, metric) if known else None
    return found


def _learning(result: dict[str, Any]) -> dict[str, Any]:
    test = result["test"]
    rounds = [
        [entry["round"], name, accuracy, loss]
        for entry in result["rounds"]
        for name, accuracy, loss in [
            ("all sites", entry["accuracy"], entry["loss"]),
            *((site, entry["sites"].get(site), entry["losses"].get(site)) for site in test["sites"]),
        ]
    ]
    total = sum(own["images"] for own in test["sites"].values())
    sites = [[site, own["images"], own["accuracy"], own["loss"]] for site, own in test["sites"].items()]
    whole = ["all sites", total, test["accuracy"], test["loss"]]
    return {"curves": _curves(rounds), "rounds": rounds, "test": [whole, *sites]}


def _distribution(partition: dict[str, Any]) -> dict[str, Any]:
    classes = partition["classes"]
    counts = {site: own for site, own in partition["counts"].items() if own}  # real sites need not report theirs
    if not counts:
        return {"plot": None}
    matrix = np.array([[own.get(name, 0) for name in classes] for own in counts.values()])
    label = f"Images of {len(classes)} classes at {len(counts)} sites"
    return {
        "plot": plots.heat_map(matrix, list(counts), classes, label),
        "silent": [site for site in partition["counts"] if site not in counts],
        "images": [[site, *(len(own[part]) for part in PARTS)] for site, own in partition["sites"].items()],
    }


def _confusion(run: Path, result: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    try:
        counts = confusion(run, result, classes)
    except UserError as reason:
        note = f"No matrix: the test images or the model cannot be used on this machine ({reason})."
        return {"matrices": [], "notes": [note]}
    if not counts:
        return {"matrices": [], "notes": ["No matrix: no site has test images."]}
    test = result["test"]
    shown = [("all sites", np.sum(list(counts.values()), axis=0), test["accuracy"])]
    if test["worst"] in counts and len(counts) > 1:
        worst = test["worst"]
        shown.append((f"the worst site, {worst}", counts[worst], test["sites"][worst]["accuracy"]))
    matrices, notes = [], []
    for name, matrix, reported in shown:
        accuracy = np.trace(matrix) / matrix.sum()
        share = f"{accuracy:.3f} of {matrix.sum()}"
        label = f"Confusion matrix of {name}: {share} test images are on the diagonal"
        plot = plots.heat_map(matrix, classes, classes, label, by_row=True, axes=("true class", "predicted class"))
        matrices.append({"plot": plot, "caption": f"{name[0].upper()}{name[1:]}: {share} on the diagonal"})
        if reported is None or abs(accuracy - reported) > 0.005:
            notes.append(f"Recomputed here; {name} had reported {as_text(reported)}: model.py or the images differ.")
    return {"matrices": matrices, "notes": notes}


def _time(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    found = timing.phases(run / "workspace")
    seconds = timing.totals(found) or result["timing"] or {}
    return {
        "plot": plots.timeline(found) if found else None,
        "kinds": list(timing.KINDS),
        "rows": [[site, *(float(own[kind]) for kind in timing.KINDS)] for site, own in seconds.items()],
    }


def _audit(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    records = read_json_lines(run / AUDIT_LOG)
    if not records:
        return {"rows": []}
    records.sort(key=lambda r: (r["round"] is None, r["round"] or 0, r["task"], len(r["site"]), r["site"]))
    # What is the same in many answers is listed once, under a letter or a number.
    tensor_lists: dict[str, str] = {}
    header_lists: dict[str, str] = {}
    rows = []
    for record in records:
        tensors, headers = json.dumps(record["tensors"]), json.dumps(record["headers"])
        letter = tensor_lists.setdefault(tensors, _letter(len(tensor_lists))) if record["tensors"] else ""
        number = header_lists.setdefault(headers, str(len(header_lists) + 1)) if record["headers"] else ""
        rows.append(
            [
                "" if record["round"] is None else str(record["round"] + 1),
                record["site"],
                record["task"],
                f"list {letter}: {len(record['tensors'])}" if letter else "none",
                sum(tensor["bytes"] for tensor in record["tensors"]),
                ", ".join(record["metrics"]),
                ", ".join(f"{name} ({kind})" for name, kind in record["meta"].items()),
                f"list {number}: {len(record['headers'])}" if number else "none",
            ]
        )
    return {
        "rows": rows,
        "n_sites": len({record["site"] for record in records}),
        "n_bytes": sum(row[4] for row in rows),
        "foreign": _foreign(run / result["model"], records),
        "tensors": {
            letter: [[t["name"], _shape(t["shape"]), t["dtype"], t["bytes"]] for t in json.loads(tensors)]
            for tensors, letter in tensor_lists.items()
        },
        "headers": {number: list(json.loads(headers).items()) for headers, number in header_lists.items()},
    }


def _foreign(model: Path, records: list[dict[str, Any]]) -> list[str]:
    """Names of the received tensors that are not weights of the model, judged by name and shape."""
    import torch

    weights = {(name, tuple(tensor.shape)) for name, tensor in torch.load(model, weights_only=True).items()}
    sent = {(tensor["name"], tuple(tensor["shape"])) for record in records for tensor in record["tensors"]}
    return sorted(name for name, shape in sent - weights)


def _configuration(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    hidden = {"rounds", "test", "timing", "versions", "data_root", "rejected"}
    rows = [[name, str(value)] for name, value in result.items() if name not in hidden and not isinstance(value, dict)]
    rows[0][0] = "version of results.json"
    rows += [[f"version of {name}", value] for name, value in result["versions"].items()]
    job = run / "job"
    files = [
        [path.relative_to(job).as_posix(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(job.rglob("*"))
        if path.is_file()
    ]
    return {"rows": rows, "files": files}


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + string.ascii_uppercase[number % 26]


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape)) or "one number"


def _partitioned(result: dict[str, Any]) -> str:
    return {
        "dirichlet": f"dirichlet, alpha {result['alpha']}",
        "shards": f"shards, {result['shards_per_site']} per site",
    }.get(result["partition"], result["partition"])
