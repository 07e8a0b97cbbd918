"""Show finished runs: `python results.py [RUN ...]`, by default the newest; `--html` writes a page instead.

Several runs are compared side by side. job.py prints its tables with these functions, too.
"""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import sys
from collections.abc import Collection
from typing import Any, Literal

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from federation.errors import exit_code
from federation.launch.options import Command, read_arguments
from federation.run import schema
from federation.run.folder import PROJECT, RUNS, RunFolder
from federation.run.metrics import as_text

MAX_ROWS = 20  # on the screen


def show_distribution(counts: dict[str, dict[str, int]]) -> None:
    """Print the number of images per site and class; `counts` as in partition.json."""
    classes = list(dict.fromkeys(name for own in counts.values() for name in own))
    rows = [["site", *classes, "all"]]
    for site, own in list(counts.items())[:MAX_ROWS]:
        row = (str(own.get(name, "-")) for name in classes)  # a real site may not share its counts
        rows.append([site, *row, str(sum(own.values())) if own else "-"])
    shown = print_table("Images per site and class (training + validation)", rows, ("site", "all"))
    print_omitted("partition.json", sites=(len(rows) - 1, len(counts)), classes=(len(shown) - 2, len(classes)))


def show(result: dict[str, Any]) -> None:
    """Print a run's results.json: validation accuracy by round, and the test of the final and the best model."""
    rounds, test, best = result["rounds"], result["test"], result["best"]
    sites = list(test["sites"])
    rows = [["", "all sites", *sites]]
    for entry in rounds if len(rounds) <= MAX_ROWS else [rounds[0], *rounds[1 - MAX_ROWS :]]:
        accuracies = [entry["accuracy"], *map(entry["sites"].get, sites)]
        rows.append([schema.after_rounds(entry["round"]), *map(as_text, accuracies)])
    n_rounds = len(rows) - 1
    tests = {"final test": test, **({f"best test (round {best['round']})": best["test"]} if best else {})}
    for name, its_test in tests.items():
        own = (its_test["sites"].get(site, {}).get("accuracy") for site in sites)
        rows.append([name, *map(as_text, [its_test["accuracy"], *own])])
    title = f"Accuracy of the global model ({result['dataset']}, {result['partition']})"
    shown = print_table(title, rows, ("", "all sites", test["worst"]), section=n_rounds)
    print_omitted("results.json", sites=(len(shown) - 2, len(sites)), rounds=(n_rounds, len(rounds)))
    worst = f"; worst site {test['worst']}" if len(sites) > 1 and test["worst"] else ""
    metrics = f"accuracy {as_text(test['accuracy'])}, loss {as_text(test['loss'])}{worst}"
    print(f"\nFinal test {metrics}; {result['wall_s']:.0f} s in total")
    for warning in schema.caveats(result):
        print(f"WARNING: {warning}")
    if result["stopped_early"]:
        print(f"stopped early: no better validation accuracy with --patience {result['patience']}")


def print_table(title: str, rows: list[list[str]], always: Collection[str], section: int = 0) -> list[int]:
    """Print a table with as many columns as fit the screen, none of them cut, and return their indices.

    Args:
        title: may be empty.
        rows: cells of any text; the first row is the header.
        always: headers of the columns to show even where they do not fit.
        section: the row after which a new section begins; 0: none.
    """
    widths = [1 + max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]
    room, shown = Console().width + 1, []
    for i in sorted(range(len(widths)), key=lambda i: rows[0][i] not in always):  # stable: these first
        if widths[i] <= room or rows[0][i] in always:
            room -= widths[i]
            shown.append(i)
    shown.sort()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for i in shown:
        justify: Literal["left", "right"] = "right" if i else "left"
        table.add_column(Text(rows[0][i]), justify=justify, no_wrap=True)  # Text: `[/b]` in a name is not markup
    for number, row in enumerate(rows[1:], start=1):
        table.add_row(*(row[i] for i in shown), end_section=number == section)
    print(f"\n{title}" if title else "")  # not the table's own title, which rich wraps to the table's width
    Console(markup=False, emoji=False, width=sum(widths)).print(table)
    return shown


def print_omitted(file: str, **counts: tuple[int, int]) -> None:
    """Say what a table left out and which file has it; `counts`: kind -> number shown, number in total."""
    omitted = [f"{total - shown} of {total} {kind}" for kind, (shown, total) in counts.items() if shown < total]
    if omitted:
        print(f"(not shown: {', '.join(omitted)}; {file} has all)")


def compare(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Compare runs: name of a run -> its results.json. Each row is a property's name and its value in each run."""
    runs = results.values()
    names = [name for name in schema.CONFIGURATION if name != "data_root"]  # paths are private
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
    page = "write a page instead: runs/RUN/report.html, or for several runs runs/comparison.html"
    flags = [click.Argument(["run"], nargs=-1), click.Option(["--html"], is_flag=True, help=page)]
    purpose = "Show a run, or compare several side by side. RUN is a folder under runs/, by default the newest."
    arguments = read_arguments(Command("results.py", params=flags, help=purpose)).params
    runs = list({run.path: run for run in map(RunFolder.find, arguments["run"] or ["latest"])}.values())
    results = {run.name: schema.read(run) for run in runs}
    if arguments["html"]:
        from federation.report import page as report  # matplotlib takes a second to import

        comparison = PROJECT / RUNS / "comparison.html"
        one = len(runs) == 1
        print(report.write(runs[0]) if one else report.write_comparison(results, compare(results), comparison))
    elif len(runs) == 1:
        if counts := schema.read_json(runs[0].partition)["counts"]:  # real sites may not share them
            show_distribution(counts)
        show(results[runs[0].name])
    else:
        rows = [["", *results], *compare(results)]
        while len(rows[0]) > 1:  # where not all runs fit, the others follow in further tables
            shown = print_table("", rows, rows[0][:2])
            rows = [[row[0], *(cell for i, cell in enumerate(row) if i not in shown)] for row in rows]


if __name__ == "__main__":
    sys.exit(exit_code("results.py", main))
