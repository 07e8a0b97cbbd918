"""Turn the measured parts into metrics with targets, a Markdown page and a plot.

Pure functions, except for the plot.
"""

from pathlib import Path
from statistics import median
from typing import Any

import timeline

NAMES = {"limit": "plain loop (lower bound)", "project": "project as rendered", "textbook": "textbook way"}
MB = 1e6


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def column(part: dict[str, Any], what: str, name: str = "wall_s", rows: str = "runs") -> list[float]:
    """One value of all of a part's runs (or commands) of one kind."""
    return [run[name] for run in part[rows] if run["what"] == what]


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Ratios of measurements that alternated: each to its neighbor."""
    return [a / b for a, b in zip(above, below, strict=True)]


def typical(runs: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The costs of one kind of run: medians over the repeats."""
    same = [run for run in runs if run["what"] == what]
    return {key: median(run[key] for run in same) for key, value in same[0].items() if isinstance(value, (int, float))}


def metrics(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics and their targets: `metric`, `unit`, `target` (an upper bound), spread.

    With `at_least`, the target is a lower bound. Metrics of missing parts are left out.
    """
    rows = []

    def add(name: str, values: list[float], target: float | None, unit: str = "", at_least: bool = False) -> None:
        row: dict[str, Any] = {"metric": name, "unit": unit, "target": target, "at_least": at_least, **spread(values)}
        if target is not None:
            row["met"] = row["median"] >= target if at_least else row["median"] <= target
        rows.append(row)

    if speed := parts.get("speed"):
        add(
            "time inside fit / plain loop",
            ratios(column(speed, "project", "fit_s"), column(speed, "limit", "fit_s")),
            1.10,
        )
        limit, whole = column(speed, "limit"), column(speed, "project")
        add("wall time / plain loop", ratios(whole, limit), 1.6)
        final = column(speed, "limit", "final_evaluation_s")
        bare = [wall - last for wall, last in zip(limit, final, strict=True)]
        add("wall time / plain loop without its final evaluation", ratios(whole, bare), None)
        imports = column(speed, "imports", rows="commands")
        add(
            "start to first training step / bare imports",
            ratios(column(speed, "project", "to_training_s"), imports),
            3,
        )
        add("overhead per round", column(speed, "project", "overhead_s"), 1.5, "s")
        for what in ("help", "wrong flag"):
            add(f"job.py, {what}", column(speed, what, rows="commands"), 0.5, "s")
        gap = [
            a - b for a, b in zip(column(speed, "project", "accuracy"), column(speed, "limit", "accuracy"), strict=True)
        ]
        add("test accuracy minus plain loop, same seed", gap, None)
    if textbook := parts.get("textbook"):
        divisor, walls = textbook["divisor"], column(textbook, "project")
        slow = textbook["runs"][0]
        add(f"textbook way / project, 1/{divisor} of the images", [slow["wall_s"] / wall for wall in walls], None)
        if speed:
            predicted = timeline.predict_wall(slow, slow["rounds"], divisor)
            add(
                "textbook way / project, all images, predicted",
                [predicted / wall for wall in whole],
                30,
                at_least=True,
            )
            if full := textbook["full"]:
                add("textbook way / project, all images", [full["wall_s"] / w for w in whole], 30, at_least=True)
                add("textbook way, predicted / measured", [predicted / full["wall_s"]], None)
    if rounds := parts.get("rounds"):
        long, small = rounds["runs"]
        for run, part, size in (
            (long, "speed", "all images"),
            (small, "textbook", f"1/{rounds['divisor']} of the images"),
        ):
            if part in parts:
                predicted = timeline.predict_wall(typical(parts[part]["runs"], "project"), run["rounds"])
                error = abs(predicted / run["wall_s"] - 1)
                add(f"{run['rounds']} rounds, {size}: predicted {predicted:.0f} s, error", [100 * error], 10, "%")
        if long["uss"]:
            add("private memory (USS) of a client / bare imports", [long["uss"] / rounds["imports_uss"]], 1.15)
        if long["uss_late"]:
            add(
                f"memory growth of a client over {long['rounds']} rounds",
                [(long["uss_late"] - long["uss_early"]) / MB],
                5,
                "MB",
            )
        if long["uss"] and small["uss"]:
            more = f"memory growth of a client from {small['n_train']:,} to {long['n_train']:,} training images"
            add(more, [(long["uss"] - small["uss"]) / MB], 5, "MB")
    if clients := parts.get("clients"):
        counts, beyond = beyond_limit(clients)
        if len(counts) > 1:
            name = f"time beyond the plain loop, {counts[-1]} clients / {counts[0]} clients"
            add(name, [beyond[-1] / beyond[0]], counts[-1] / counts[0])
    return rows


def beyond_limit(clients: dict[str, Any]) -> tuple[list[int], list[float]]:
    counts = [run["n_clients"] for run in clients["runs"] if run["what"] == "project"]
    return counts, [a - b for a, b in zip(column(clients, "project"), column(clients, "limit"), strict=True)]


def by_size(parts: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The runs grouped by amount of work: on all images, and on a subset."""
    all_images, few = (list(parts[name]["runs"]) if name in parts else [] for name in ("speed", "textbook"))
    if few and parts["textbook"]["full"]:
        all_images.append(parts["textbook"]["full"])
    return [runs for runs in (all_images, few) if runs]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def costs_table(runs: list[dict[str, Any]]) -> str:
    head = ["", "total", "startup and shutdown", "per round", "per step", "test accuracy", "runs"]
    rows = []
    for what, name in NAMES.items():
        if same := [run for run in runs if run["what"] == what]:
            one = typical(same, what)
            walls, hits = spread([run["wall_s"] for run in same]), spread([run["accuracy"] for run in same])
            rows.append(
                [
                    name,
                    f"{walls['median']:.1f} s ({walls['min']:.1f} to {walls['max']:.1f})",
                    f"{one['start_s']:.1f} s",
                    f"{one['round_s']:.2f} s",
                    f"{1000 * one['step_s']:.2f} ms",
                    f"{hits['median']:.3f} ({hits['min']:.3f} to {hits['max']:.3f})",
                    str(len(same)),
                ]
            )
    return table(head, rows)


def markdown(results: dict[str, Any]) -> str:
    machine, work, parts = results["machine"], results["work"], results["parts"]
    dates = sorted({part["date"] for part in parts.values()})
    loads = [run["load_before"] for part in parts.values() for run in part["runs"]]
    text = "# Speed\n\nMeasured by `make bench`; [how to read it](../README.md).\n\n"
    text += f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; Python "
    text += f"{machine['python']}, torch {machine['torch']}, lightning {machine['lightning']}, nvflare "
    text += f"{machine['nvflare']}; {' to '.join(dates)}. Images: {work['images']}. "
    text += f"Load average before the runs: {min(loads)} to {max(loads)}"
    text += " (other processes make the measurements noisy).\n" if max(loads) > machine["cores"] else ".\n"
    if work["quick"]:
        text += "\n**A quick run: it shows that the benchmark works; its numbers mean nothing.**\n"
    for runs in by_size(parts):
        one = runs[0]
        text += f"\n## {one['n_clients']} clients, {one['n_train']:,} training images each"
        text += f" ({one['steps']:,} steps of {work['batch_size']}), {one['rounds']} rounds\n\n"
        text += costs_table(runs)
        text += (
            "\ntotal = startup and shutdown + rounds x (per round + steps x per step). Medians (minimum to maximum).\n"
        )
    text += "\n## Targets\n\n"
    rows = []
    for row in results["metrics"]:
        digits = 3 if abs(row["median"]) < 1 else 2
        value = f"{row['median']:.{digits}f}"
        if row["n"] > 1:
            value += f" ({row['min']:.{digits}f} to {row['max']:.{digits}f})"
        target = "" if row["target"] is None else f"{row['target']:g} {row['unit']}".strip()
        target += (" or more" if row["at_least"] else " or less") if target else ""
        verdict = {True: "met", False: "missed", None: ""}[row.get("met")]
        rows.append([row["metric"], f"{value} {row['unit']}".strip(), target, verdict])
    text += table(["metric", "measured", "target", ""], rows)
    if clients := parts.get("clients"):
        text += "\n## More clients, same total number of images\n\n"
        counts, beyond = beyond_limit(clients)
        rows = [
            [
                str(run["n_clients"]),
                f"{run['wall_s']:.1f} s",
                f"{more:.1f} s",
                f"{more / run['n_clients']:.1f} s",
                f"{run['peak_pss'] / MB:.0f} MB" if run["peak_pss"] else "-",
                f"{run['uss'] / MB:.0f} MB" if run["uss"] else "-",
            ]
            for run, more in zip((r for r in clients["runs"] if r["what"] == "project"), beyond, strict=True)
        ]
        head = [
            "clients",
            "total",
            "beyond the plain loop",
            "the same per client",
            "total memory (PSS)",
            "per client (USS)",
        ]
        text += table(head, rows)
    return text


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of where the time went, one panel per amount of work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = by_size(results["parts"])
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 0.9 + 1.4 * len(panels)), squeeze=False)
    for axis, runs in zip(axes[:, 0], panels, strict=True):
        kinds = [what for what in NAMES if any(run["what"] == what for run in runs)][::-1]
        ones = [typical(runs, what) for what in kinds]
        left = [0.0] * len(kinds)
        for label, color, value in (
            ("startup and shutdown", "#9aa5b1", lambda one: one["start_s"]),
            ("rounds without training", "#e3a857", lambda one: one["rounds"] * one["round_s"]),
            ("training", "#3d7ea6", lambda one: one["rounds"] * one["fit_s"]),
        ):
            widths = [value(one) for one in ones]
            axis.barh([NAMES[what] for what in kinds], widths, left=left, color=color, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axis.text(total, row, f" {total:.0f} s", va="center")
        axis.set_xlim(0, 1.12 * max(left))
        axis.set_title(f"2 clients, {runs[0]['n_train']:,} training images each", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="upper right", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
