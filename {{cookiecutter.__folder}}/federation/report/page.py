"""The page of a run, or a comparison of several: one HTML file that opens offline. It never contains an image.

This module computes the content; page.html.j2 has the text and the layout.
"""

import hashlib
import json
import re
import shlex
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from federation.protocol import TEST_COUNTS, read_json_lines
from federation.report import plots
from federation.run import schema, timing
from federation.run.classification import CLASS_METRICS, METRICS, Counts
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
    classification = _classification(run, result)
    parts = ("train", "val", "test")
    return _render(
        run.report,
        name=run.name,
        result=result,
        partition=partition,
        notes=schema.coverage(result) + schema.caveats(result),
        rounds=rounds,
        curves=curves,
        test=_test(result["test"], classification["sites"] if classification else {}),
        distribution=_distribution(partition),
        images=_by_site({site: [len(own[part]) for part in parts] for site, own in partition["sites"].items()}),
        classification=classification,
        about=_about(run, result, partition),
        compared=_compared(run),
        metrics=METRICS,
        class_metrics=CLASS_METRICS,
        timeline=plots.timeline(phases) if phases else None,
        seconds=timing.totals(phases) or result["timing"],
        kinds=timing.KINDS,
        privacy=schema.privacy(result),
        spent=_by_site({site: [own["epsilon"], own["delta"], own["noise"]] for site, own in result["privacy"].items()}),
        leak=_by_site(schema.leak(result)),
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


def _about(run: RunFolder, result: dict[str, Any], partition: dict[str, Any]) -> dict[str, str]:
    """What a reader has to know before trusting the numbers: name of a fact -> text. Paths are private."""
    words = [re.sub("(^|=)[^=]*/.*", r"\1PATH", word) for word in result["command"] or []]
    commit = {True: "", False: ", with changes that are not committed", None: ""}[result["clean"]]
    size, fit = result.get("image_size"), result.get("image_fit", "stretch")
    parts = {"train": "training", "val": "validation", "test": "test"}
    sums = {title: sum(len(own[part]) for own in partition["sites"].values()) for part, title in parts.items()}
    how = {"dirichlet": f", alpha {result['alpha']}", "shards": f", {result['shards_per_site']} per site"}
    found = {
        "Run": run.name + (f", resumed from {result['resumed']['run']}" if result["resumed"] else ""),
        "Command": f"python {shlex.join(words)}" if words else "unknown",
        "Started": (result["started"] or "unknown").replace("T", " "),
        "Code": f"commit {result['commit']}{commit}" if result["commit"] else "unknown: not in a git repository",
        "Model": f"{result['model_class'] or 'unknown'}, trained by {result['algorithm']}",
        "Images": f"{result['dataset']}, {size} × {size} pixels, fitted by: {fit}",
        "Split": ", ".join(f"{n:,} {title}" for title, n in sums.items()) + "; no image is in two of these parts",
        "Sites": f"{result['n_clients']:,}, partition: {result['partition']}{how.get(result['partition'], '')}",
        "Seed": f"{result['seed']}: of weights, partition, split, shuffling, and intervals",
    }
    if not partition["sites"]:
        found["Split"] = "unknown: each site has its own images"
    return found


def _compared(run: RunFolder) -> dict[str, Any] | None:
    """What compare.py found out, if it has run: a table's `header` and `rows`, and a `plot`."""
    if not run.comparison.exists():
        return None
    comparison = schema.read_json(run.comparison)
    rows = {title: comparison["rows"][key] for key, title in schema.COMPARED.items()}
    values = [[own["sites"][site] for own in rows.values()] for site in rows["federated"]["sites"]]
    columns = _by_site(dict(zip(rows["federated"]["sites"], values, strict=True)))
    return {
        "header": ["model, test images", "all sites", *columns],
        "rows": [
            [title, own["all"], *(each[i] for each in columns.values())] for i, (title, own) in enumerate(rows.items())
        ],
        "plot": plots.as_svg(plots.baselines(comparison), "Test accuracy with and without the federation"),
    }


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


def _test(test: dict[str, Any], metrics: dict[str, list[float | None]]) -> dict[str, Any]:
    """Quantiles if there are many, and sites, of many the worst -> images, accuracy, loss, and `metrics` if any."""
    unknown = [None] * max(map(len, metrics.values()), default=0)
    rows = {
        site: [own["images"], own["accuracy"], own["loss"], *metrics.get(site, unknown)]
        for site, own in test["sites"].items()
    }
    worst = {site: rows[site] for site in worst_sites(test)} if len(rows) > MAX_SITES else {}
    return {**_by_site(rows), **worst}


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


def _classification(run: RunFolder, result: dict[str, Any]) -> dict[str, Any] | None:
    """The test of the final model by class and by site, from the counts that the sites shared; None if none did.

    Returns:
        `overall`: rows of a metric, its value over all sites with interval, at the worst site, and of the majority
        class, whose name is `majority`; `worst`: the worst site, if it shared its counts and there are several;
        `classes`: all sites, and the worst -> rows of a class; `sites`: site -> metrics; `plots`: plots and captions;
        `silent`: sites that did not share their counts.
    """
    if not run.test_counts.exists():
        return None
    read = schema.read_json(run.test_counts)
    names, sites, test = read["classes"], read["sites"], result["test"]
    counts = {site: Counts.of(own) for site, own in sites.items()}
    shown = {"all sites": Counts.of(*sites.values())}
    worst = test["worst"] if test["worst"] in counts and len(test["sites"]) > 1 else None
    if worst:
        shown[f"worst site: {worst}"] = counts[worst]
    of_all, at_worst = shown["all sites"].metrics(), counts[worst].metrics() if worst else {}
    bounds, _ = shown["all sites"].intervals(result["seed"])
    majority, baseline = shown["all sites"].majority()
    classes, figures = {}, []
    for title, own in shown.items():
        values, limits = own.classes(), own.intervals(result["seed"])[1]
        classes[title] = [
            [name, int(n), *(_with_interval(values[m][c], *limits[m][:, c]) for m in CLASS_METRICS)]
            for c, (name, n) in enumerate(zip(names, own.confusion.sum(axis=1), strict=True))
        ]
        caption = f"{title}: {own.confusion.sum():,} test images"
        matrix = plots.heat_map(own.confusion, names, names, f"Confusion matrix, {caption}", confusion=True)
        figures.append((matrix, f"Confusion matrix, {caption}"))
    reliability = "How often the predicted class is right, by the probability that the model gives it"
    figures.append((plots.reliability(shown["all sites"].calibration, f"Reliability: {reliability}"), reliability))
    return {
        "overall": [
            [
                name,
                _with_interval(of_all[name], *bounds.get(name, ())),
                *([_known(at_worst[name])] if worst else []),
                baseline.get(name),
            ]
            for name in METRICS
        ],
        "majority": names[majority],
        "worst": worst,
        "classes": classes,
        "sites": {site: [*map(_known, own.metrics().values())][1:] for site, own in counts.items()},
        "plots": figures,
        "silent": [site for site in test["sites"] if site not in counts],
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _with_interval(value: float, low: float | None = None, high: float | None = None) -> str:
    text = as_text(_known(value))
    # A bootstrap without variation says nothing.
    return text if low is None or np.isnan(low) or low == high else f"{text} ({low:.3f} to {high:.3f})"


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
    """Names of the received tensors that match no weight of the model by name and shape, and are not counts."""
    import torch

    sent = {(tensor["name"], tuple(tensor["shape"])) for record in records for tensor in record["tensors"]}
    sent = {(name, shape) for name, shape in sent if name not in TEST_COUNTS}
    if not sent:
        return []
    weights = {(name, tuple(tensor.shape)) for name, tensor in torch.load(model, weights_only=True).items()}
    return sorted(name for name, shape in sent - weights)
