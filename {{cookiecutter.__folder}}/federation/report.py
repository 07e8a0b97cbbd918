"""The page of a run: one HTML file that opens without a network. Figures, sizes and names, never an image."""

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import numpy as np

from federation import page, plots, schema, timing
from federation.confusion import NoConfusion, confusion
from federation.figures import as_text

PARTS = ("train", "val", "test")  # of a site's images in partition.json
METRICS = {"accuracy": "sites", "loss": "losses"}  # of a round in results.json -> the sites' own


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
        *map(page.note, schema.caveats(result)),
        page.section("learning", "What the model learned", _learning(result)),
        page.section("holdings", "Who holds what", _holdings(partition)),
        page.section("confusion", "What the final model takes for what", _confusion(run, result, partition["classes"])),
        page.section("time", "Where the time went", _time(run, result)),
        page.section("receipt", "Receipt: what left the sites", _receipt(run, result)),
        page.section("configuration", "How it was made", _configuration(run, result)),
    ]
    subtitle = f"{result['algorithm']} on {result['dataset']}, {_dealt(result)}; run {run.name}"
    return page.write(run / "report.html", project, subtitle, body)


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
    table = page.table(["", *results], rows, marked=differs) + page.note("What is not the same in all runs is marked.")
    curves = [_curves({name: _series(result, key) for name, result in results.items()}, key) for key in METRICS]
    body = [
        page.section("table", "Side by side", [table]),
        page.section("learning", "The global models, by round", [page.pair(curves)]),
    ]
    return page.write(file, project, f"{len(runs)} runs compared", body)


def _facts(result: dict[str, Any]) -> str:
    test = result["test"]
    facts = {"final test accuracy": as_text(test["accuracy"])}
    if len(test["sites"]) > 1 and test["worst"]:
        facts[f"worst site: {test['worst']}"] = as_text(test["sites"][test["worst"]]["accuracy"])
    facts |= {"sites": str(len(test["sites"])), "rounds": str(result["num_rounds"])}
    facts["in all"] = f"{result['wall_s']:.0f} s"
    return page.facts(facts)


def _learning(result: dict[str, Any]) -> list[str]:
    sites = list(result["test"]["sites"])
    curves = []
    for key, own in METRICS.items():
        series = {site: [entry[own].get(site) for entry in result["rounds"]] for site in sites}
        curves.append(_curves({"all sites": _series(result, key), **series}, key))
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
        page.pair(curves),
        page.details("The figures of the plots", page.table(["after round", "site", "accuracy", "loss"], rows)),
        "<p>The final model on the test images, which nothing was trained or chosen on:</p>",
        page.table(["site", "test images", "accuracy", "loss"], [whole, *test]),
    ]


def _holdings(partition: dict[str, Any]) -> list[str]:
    classes = partition["classes"]
    counts = {site: held for site, held in partition["counts"].items() if held}  # a real site may keep them to itself
    if not counts:
        return [page.note("Unknown: no site told how many images of each class it has.")]
    matrix = np.array([[held.get(name, 0) for name in classes] for held in counts.values()])
    plot = plots.heat_map(matrix, list(counts), classes, f"Images of {len(classes)} classes at {len(counts)} sites")
    parts = [page.figure(plot, "Training and validation images: one row per site, one column per class.")]
    if silent := [site for site in partition["counts"] if site not in counts]:
        parts.append(page.note(f"Not told by: {', '.join(silent)}."))
    if partition["sites"]:  # not known of real sites
        images = [[site, *(len(own[part]) for part in PARTS)] for site, own in partition["sites"].items()]
        parts.append(page.table(["site", "training", "validation", "test"], images))
    return parts


def _confusion(run: Path, result: dict[str, Any], classes: list[str]) -> list[str]:
    try:
        matrices = confusion(run, result, classes)
    except NoConfusion as reason:
        return [page.note(f"No matrix: the test images or the model cannot be used on this machine ({reason}).")]
    if not matrices:
        return [page.note("No matrix: no site has test images.")]
    shown = {"all sites": np.sum(list(matrices.values()), axis=0)}
    worst = result["test"]["worst"]
    if worst in matrices and len(matrices) > 1:
        shown[f"the worst site, {worst}"] = matrices[worst]
    parts, notes = [], []
    for name, matrix in shown.items():
        right = np.trace(matrix) / matrix.sum()
        label = f"Confusion matrix of {name}: {right:.3f} of {matrix.sum()} test images are on the diagonal"
        plot = plots.heat_map(matrix, classes, classes, label, by_row=True, axes=("true class", "taken for"))
        parts.append(page.figure(plot, f"{name[0].upper()}{name[1:]}: {right:.3f} of {matrix.sum()} on the diagonal"))
        reported = result["test"]["accuracy"] if name == "all sites" else result["test"]["sites"][worst]["accuracy"]
        if reported is None or abs(right - reported) > 0.005:
            notes.append(f"Computed anew here. {name} had reported {as_text(reported)}: model.py or the images differ.")
    return [
        "<p>The final model on the test images: a row a true class, a column what the model says; "
        "the darker, the larger a part of its row.</p>",
        page.pair(parts),
        *map(page.note, notes),
    ]


def _time(run: Path, result: dict[str, Any]) -> list[str]:
    found = timing.phases(run / "workspace")
    sums = timing.totals(found) or result["timing"]
    if not sums:
        return [page.note("Unknown: the logs of the sites are not here, or do not say when what began.")]
    parts = [
        "<p><b>start</b>: until the first task: process, imports, data. <b>computing</b>: training. "
        "<b>evaluating</b>: validation, test, prediction. <b>waiting</b>: for the server and the other sites.</p>"
    ]
    if found:
        parts.append(page.figure(plots.timeline(found), "From the server's first sign of life to its last."))
    rows = [[site, *(f"{kinds[kind]:.1f}" for kind in timing.KINDS)] for site, kinds in sums.items()]
    parts.append(page.table(["site, seconds", *timing.KINDS], rows))
    return parts


def _receipt(run: Path, result: dict[str, Any]) -> list[str]:
    path = run / "receipt.jsonl"
    if not path.exists():
        return [page.note("None: this run's server kept no receipt.")]
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
        f"{total:,} bytes of tensors in all. No value is kept, only names, types and sizes. Every answer to a task "
        "(training, evaluation) is listed with all that was in it. Of a curve for a tracker only the first message is, "
        "however many followed. Not listed are NVFlare's other messages, such as heartbeats, and what administrators "
        "fetched from a site with commands of their own.</p>",
        _foreign(run, result, records),
        page.table(named, rows),
    ]
    for tensors, letter in tensor_lists.items():
        named = ["tensor", "shape", "type", "bytes"]
        lines = [[t["name"], _shape(t["shape"]), t["dtype"], t["bytes"]] for t in json.loads(tensors)]
        parts.append(page.details(f"List {letter}: {len(lines)} tensors", page.table(named, lines)))
    for entries, number in entry_lists.items():
        lines = list(map(list, json.loads(entries).items()))
        parts.append(
            page.details(f"List {number}: {len(lines)} of NVFlare's own entries", page.table(["entry", "type"], lines))
        )
    return parts


def _foreign(run: Path, result: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Say whether all tensors that came look like the model's weights."""
    import torch

    final = torch.load(run / result["model"], weights_only=True)
    weights = {(name, tuple(tensor.shape)) for name, tensor in final.items()}
    sent = {(tensor["name"], tuple(tensor["shape"])) for record in records for tensor in record["tensors"]}
    if foreign := sorted(name for name, shape in sent - weights):
        return page.note(f"Not by name and shape a weight of the final model: {', '.join(foreign)}.")
    return "<p>Every tensor has the name and the shape of a weight of the final model.</p>"


def _configuration(run: Path, result: dict[str, Any]) -> list[str]:
    hidden = {"rounds", "test", "timing", "versions", "data_root", "rejected"}
    rows = [[name, str(value)] for name, value in result.items() if name not in hidden and not isinstance(value, dict)]
    rows[0][0] = "version of results.json"
    rows += [[f"version of {name}", value] for name, value in result["versions"].items()]
    parts = [page.table(["", ""], rows)]
    job = run / "job"
    files = [
        [path.relative_to(job).as_posix(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(job.rglob("*"))
        if path.is_file()
    ]
    if files:
        parts.append("<p>The files that were sent to the server and the sites:</p>")
        parts.append(page.table(["file", "bytes", "SHA-256"], files))
    return parts


def _series(result: dict[str, Any], key: str) -> list[float | None]:
    return [entry[key] for entry in result["rounds"]]


def _curves(series: dict[str, list[float | None]], label: str) -> str:
    if all(value is None for values in series.values() for value in values):
        return page.note(f"The {label} of the rounds was not recorded.")
    return page.figure(plots.curves(series, label), f"{label.capitalize()} by round")


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
