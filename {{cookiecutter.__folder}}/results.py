"""Show finished runs: `python results.py [RUN ...]`, the newest by default; `--html` writes a page instead.

Several runs are set side by side. Also what job.py prints on the way.
"""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import sys
from typing import Any, Literal

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from federation.errors import exit_code
from federation.launch.options import Command, read_arguments
from federation.run import schema
from federation.run.folder import PROJECT, RUNS, RunFolder
from federation.run.metrics import as_text

MAX_COLUMNS, MAX_ROWS = 10, 20  # on the screen; partition.json and results.json have all


def show_distribution(counts: dict[str, dict[str, int]]) -> None:
    """Print one row per site with its images of each class; `counts` is that of partition.json."""
    classes = list(dict.fromkeys(name for held in counts.values() for name in held))
    table = new_table(["site", *(name[:6] for name in classes[:MAX_COLUMNS]), "all"])
    for site, held in list(counts.items())[:MAX_ROWS]:
        row = (str(held.get(name, "-")) for name in classes[:MAX_COLUMNS])  # a real site may keep it to itself
        table.add_row(site, *row, str(sum(held.values())) if held else "-")
    is_cut = len(counts) > MAX_ROWS or len(classes) > MAX_COLUMNS
    print_table("Images per site and class (training + validation)", table, "partition.json" if is_cut else None)


def show(result: dict[str, Any]) -> None:
    """Print a run's results.json: the global model after each round, and the test of the final one."""
    rounds, test, best = result["rounds"], result["test"], result["best"]
    sites = list(test["sites"])
    table = new_table(["", "all sites", *sites[:MAX_COLUMNS]])
    for entry in rounds if len(rounds) <= MAX_ROWS else [rounds[0], *rounds[1 - MAX_ROWS :]]:
        accuracies = [entry["accuracy"], *map(entry["sites"].get, sites[:MAX_COLUMNS])]
        table.add_row(schema.after_rounds(entry["round"]), *map(as_text, accuracies))
    table.add_section()
    tests = {"final test": test, **({f"best test (round {best['round']})": best["test"]} if best else {})}
    for name, its_test in tests.items():
        own = (its_test["sites"].get(site, {}).get("accuracy") for site in sites[:MAX_COLUMNS])
        table.add_row(name, *map(as_text, [its_test["accuracy"], *own]))
    title = f"Accuracy of the global model ({result['dataset']}, {result['partition']})"
    is_cut = len(rounds) > MAX_ROWS or len(sites) > MAX_COLUMNS
    print_table(title, table, "results.json" if is_cut else None)
    worst = f"; worst site {test['worst']}" if len(sites) > 1 and test["worst"] else ""
    metrics = f"accuracy {as_text(test['accuracy'])}, loss {as_text(test['loss'])}{worst}"
    print(f"\nFinal test {metrics}; {result['wall_s']:.0f} s in all")
    for warning in schema.caveats(result):
        print(f"WARNING: {warning}")
    if result["stopped_early"]:
        print(f"stopped early: no better validation accuracy with --patience {result['patience']}")


def new_table(header: list[str]) -> Table:
    """A table of numbers, but for its first column. No column is ever cut, however narrow the screen."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for number, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(Text(name), justify=justify, no_wrap=True, min_width=max(len(name), 5))  # never markup
    return table


def print_table(title: str, table: Table, rest: str | None = None) -> None:
    """Print a table whose cells are any text; `rest` is the file that has what does not fit into it."""
    print(f"\n{title}" if title else "")  # not the table's own title, which is folded to the table's width
    Console(markup=False, emoji=False).print(table, crop=False)  # `[/b]` in a name is not markup
    if rest:
        print(f"(not all fits here: {rest} has the rest)")


def compare(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Set runs side by side: name of a run -> its results.json. Each row is a property's name and its values."""
    runs = results.values()
    names = [name for name in schema.CONFIGURATION if name != "data_root"]  # a path is for nobody else's eyes
    shown = [name for name in names if any(run.get(name) is not None for run in runs)]
    tests = [run["test"] for run in runs]
    worst = [test["sites"][test["worst"]]["accuracy"] if test["worst"] else None for test in tests]
    return [
        *([name, *(str(run.get(name, "-")) for run in runs)] for name in shown),
        ["test accuracy", *(as_text(test["accuracy"]) for test in tests)],
        ["test loss", *(as_text(test["loss"]) for test in tests)],
        ["worst site", *(str(test["worst"] or "-") for test in tests)],
        ["its accuracy", *map(as_text, worst)],
        ["seconds", *(f"{run['wall_s']:.0f}" for run in runs)],
        ["model SHA-256", *((run["sha256"] or "-")[:12] for run in runs)],
    ]


def main() -> None:
    page = "write a page instead: runs/RUN/report.html; of several runs, runs/comparison.html"
    flags = [click.Argument(["run"], nargs=-1), click.Option(["--html"], is_flag=True, help=page)]
    purpose = "Show the result of a run, or several side by side: names of folders under runs/, or the newest."
    arguments = read_arguments(Command("results.py", params=flags, help=purpose)).params
    runs = list({run.path: run for run in map(RunFolder.find, arguments["run"] or ["latest"])}.values())
    results = {run.name: schema.read(run) for run in runs}
    if arguments["html"]:
        from federation.report import page as report  # its plots' library takes a second to import

        comparison = PROJECT / RUNS / "comparison.html"
        one = len(runs) == 1
        print(report.write(runs[0]) if one else report.write_comparison(results, compare(results), comparison))
    elif len(runs) == 1:
        if counts := schema.read_json(runs[0].partition)["counts"]:  # real sites may keep them
            show_distribution(counts)
        show(results[runs[0].name])
    else:
        table = new_table(["", *(f" {name}" for name in results)])
        for row in compare(results):
            table.add_row(*row)
        print_table("", table)


if __name__ == "__main__":
    sys.exit(exit_code("results.py", main))
