"""From the measured parts to what is read: figures with their targets, a Markdown page, a plot.

Pure but for the plot.
"""

from pathlib import Path
from statistics import median
from typing import Any

import timeline

NAMES = {"limit": "plain loop (the limit)", "project": "project as rendered", "textbook": "textbook way"}
MB = 1e6


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def column(part: dict[str, Any], what: str, name: str = "wall_s", rows: str = "runs") -> list[float]:
    """One column of a part's runs, or commands, of one kind."""
    return [run[name] for run in part[rows] if run["what"] == what]


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Of measurements made in turns: each to its neighbour."""
    return [a / b for a, b in zip(above, below, strict=True)]


def typical(runs: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The costs of a kind of run: of each the median over the repeats."""
    same = [run for run in runs if run["what"] == what]
    return {key: median(run[key] for run in same) for key, value in same[0].items() if isinstance(value, (int, float))}


def figures(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured against its target: `figure`, `unit`, `target` (the largest that is well), spread.

    `at_least` turns the target round. A figure whose part is missing is left out.
    """
    rows = []

    def add(figure: str, values: list[float], target: float | None, unit: str = "", at_least: bool = False) -> None:
        row: dict[str, Any] = {"figure": figure, "unit": unit, "target": target, "at_least": at_least, **spread(values)}
        if target is not None:
            row["met"] = row["median"] >= target if at_least else row["median"] <= target
        rows.append(row)

    if speed := parts.get("speed"):
        add(
            "time inside fit over the plain loop's",
            ratios(column(speed, "project", "fit_s"), column(speed, "limit", "fit_s")),
            1.10,
        )
        limit, whole = column(speed, "limit"), column(speed, "project")
        add("whole job over the limit's whole wall", ratios(whole, limit), 1.6)
        final = column(speed, "limit", "final_evaluation_s")
        bare = [wall - last for wall, last in zip(limit, final, strict=True)]
        add("the same, the limit without the final evaluation that the job makes", ratios(whole, bare), None)
        imports = column(speed, "imports", rows="commands")
        add(
            "start to first training step over the three imports",
            ratios(column(speed, "project", "to_training_s"), imports),
            3,
        )
        add("wall of a round less its computing", column(speed, "project", "overhead_s"), 1.5, "s")
        for what in ("help", "wrong flag"):
            add(f"job.py, {what}", column(speed, what, rows="commands"), 0.5, "s")
        gap = [
            a - b for a, b in zip(column(speed, "project", "accuracy"), column(speed, "limit", "accuracy"), strict=True)
        ]
        add("final test accuracy less the plain loop's, same seed", gap, None)
    if textbook := parts.get("textbook"):
        divisor, walls = textbook["divisor"], column(textbook, "project")
        slow = textbook["runs"][0]
        add(f"textbook way over project, 1/{divisor} of the images", [slow["wall_s"] / wall for wall in walls], None)
        if speed:
            predicted = timeline.predict_wall(slow, slow["rounds"], divisor)
            add(
                "textbook way over project, all images, predicted",
                [predicted / wall for wall in whole],
                30,
                at_least=True,
            )
            if full := textbook["full"]:
                add("textbook way over project, all images", [full["wall_s"] / w for w in whole], 30, at_least=True)
                add("textbook way, predicted over measured", [predicted / full["wall_s"]], None)
    if rounds := parts.get("rounds"):
        long, small = rounds["runs"]
        for run, part, size in ((long, "speed", "all images"), (small, "textbook", f"1/{rounds['divisor']} of them")):
            if part in parts:
                predicted = timeline.predict_wall(typical(parts[part]["runs"], "project"), run["rounds"])
                error = abs(predicted / run["wall_s"] - 1)
                add(f"{run['rounds']} rounds, {size}: predicted {predicted:.0f} s, error", [100 * error], 10, "%")
        if long["uss"]:
            add("private memory (USS) of a client over the three imports", [long["uss"] / rounds["imports_uss"]], 1.15)
        if long["uss_late"]:
            add(f"its growth over {long['rounds']} rounds", [(long["uss_late"] - long["uss_early"]) / MB], 5, "MB")
        if long["uss"] and small["uss"]:
            more = f"its growth from {small['n_train']:,} to {long['n_train']:,} training images"
            add(more, [(long["uss"] - small["uss"]) / MB], 5, "MB")
    if clients := parts.get("clients"):
        counts, beyond = beyond_limit(clients)
        if len(counts) > 1:
            name = f"time beyond the limit, {counts[-1]} clients over {counts[0]} clients"
            add(name, [beyond[-1] / beyond[0]], counts[-1] / counts[0])
    return rows


def beyond_limit(clients: dict[str, Any]) -> tuple[list[int], list[float]]:
    counts = [run["n_clients"] for run in clients["runs"] if run["what"] == "project"]
    return counts, [a - b for a, b in zip(column(clients, "project"), column(clients, "limit"), strict=True)]


def by_size(parts: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The runs of all three ways that did the same work together: on all images, and on a part of them."""
    all_images, few = (list(parts[name]["runs"]) if name in parts else [] for name in ("speed", "textbook"))
    if few and parts["textbook"]["full"]:
        all_images.append(parts["textbook"]["full"])
    return [runs for runs in (all_images, few) if runs]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def costs_table(runs: list[dict[str, Any]]) -> str:
    head = ["", "whole", "start and end", "a round", "a step", "test accuracy", "runs"]
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
    text += " (what runs beside makes the figures noisy).\n" if max(loads) > machine["cores"] else ".\n"
    if work["quick"]:
        text += "\n**A quick run: it shows that the benchmark works; its figures say nothing.**\n"
    for runs in by_size(parts):
        one = runs[0]
        text += f"\n## {one['n_clients']} clients, each {one['n_train']:,} training images"
        text += f" ({one['steps']:,} steps of {work['batch_size']}), {one['rounds']} rounds\n\n"
        text += costs_table(runs)
        text += "\nwhole = start and end + rounds x (a round + steps x a step). Medians; smallest to largest.\n"
    text += "\n## Against the targets\n\n"
    rows = []
    for row in results["figures"]:
        digits = 3 if abs(row["median"]) < 1 else 2
        value = f"{row['median']:.{digits}f}"
        if row["n"] > 1:
            value += f" ({row['min']:.{digits}f} to {row['max']:.{digits}f})"
        target = "" if row["target"] is None else f"{row['target']:g} {row['unit']}".strip()
        target += (" or more" if row["at_least"] else " or less") if target else ""
        verdict = {True: "met", False: "missed", None: ""}[row.get("met")]
        rows.append([row["figure"], f"{value} {row['unit']}".strip(), target, verdict])
    text += table(["figure", "measured", "target", ""], rows)
    if clients := parts.get("clients"):
        text += "\n## More clients, the same images in all\n\n"
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
        head = ["clients", "whole", "beyond the limit", "the same a client", "memory of all (PSS)", "of a client (USS)"]
        text += table(head, rows)
    return text


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of where the time goes, a panel for each amount of work."""
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
            ("start and end", "#9aa5b1", lambda one: one["start_s"]),
            ("rounds without training", "#e3a857", lambda one: one["rounds"] * one["round_s"]),
            ("training", "#3d7ea6", lambda one: one["rounds"] * one["fit_s"]),
        ):
            widths = [value(one) for one in ones]
            axis.barh([NAMES[what] for what in kinds], widths, left=left, color=color, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axis.text(total, row, f" {total:.0f} s", va="center")
        axis.set_xlim(0, 1.12 * max(left))
        axis.set_title(f"2 clients, each {runs[0]['n_train']:,} training images", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="upper right", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
