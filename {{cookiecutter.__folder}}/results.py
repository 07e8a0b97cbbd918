"""Show finished runs: `python results.py [RUN ...]`, the newest by default; `--html` writes a page instead.

Several runs are set side by side. Also what job.py prints on the way.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import settings
from federation.errors import exit_code
from federation.launch.options import run_folder
from federation.run import schema
from federation.run.metrics import as_text

RUNS = Path(__file__).resolve().parent / "runs"
MAX_COLUMNS, MAX_ROWS = 10, 20  # on the screen; partition.json and results.json have all


def show_holdings(counts: dict[str, dict[str, int]]) -> None:
    """Print who holds what: a row a site, a column a class; `counts` is that of partition.json."""
    classes = list(dict.fromkeys(name for held in counts.values() for name in held))
    table = new_table()
    add_column(table, "site", left=True)
    for name in classes[:MAX_COLUMNS]:
        add_column(table, name[:6])
    add_column(table, "all")
    for site, held in list(counts.items())[:MAX_ROWS]:
        row = (str(held.get(name, "-")) for name in classes[:MAX_COLUMNS])  # a real site may keep it to itself
        table.add_row(site, *row, str(sum(held.values())) if held else "-")
    _print("Who holds what (images to learn from)", table, len(counts), len(classes), "partition.json")


def show(result: dict[str, Any]) -> None:
    """Print a run's results.json: the global model after each round, and the test of the final one."""
    sites = list(result["test"]["sites"])
    table = new_table()
    add_column(table, "", left=True)
    add_column(table, "all sites")
    for site in sites[:MAX_COLUMNS]:
        add_column(table, site)
    rounds = result["rounds"]
    for entry in rounds if len(rounds) <= MAX_ROWS else [rounds[0], *rounds[1 - MAX_ROWS :]]:
        row = (entry["sites"].get(site) for site in sites[:MAX_COLUMNS])
        table.add_row(schema.after_rounds(entry["round"]), as_text(entry["accuracy"]), *map(as_text, row))
    table.add_section()
    test, best = result["test"], result["best"]
    tests = {"final test": test, **({f"best test (round {best['round']})": best["test"]} if best else {})}
    for name, its_test in tests.items():
        row = (its_test["sites"].get(site, {}).get("accuracy") for site in sites[:MAX_COLUMNS])
        table.add_row(name, as_text(its_test["accuracy"]), *map(as_text, row))
    title = f"Accuracy of the global model ({result['dataset']}, {result['partition']})"
    _print(title, table, len(rounds), len(sites), "results.json")
    worst = f"; worst site {test['worst']}" if len(sites) > 1 and test["worst"] else ""
    figures = f"accuracy {as_text(test['accuracy'])}, loss {as_text(test['loss'])}{worst}"
    print(f"\nFinal test {figures}; {result['wall_s']:.0f} s in all")
    for warning in schema.caveats(result):
        print(f"WARNING: {warning}")
    if result["stopped_early"]:
        print(f"stopped early: no better validation accuracy with --patience {result['patience']}")


def new_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)


def add_column(table: Table, name: str, left: bool = False) -> None:
    """A column that is never cut, however narrow the screen."""
    width = max(len(name), 5)
    table.add_column(Text(name), justify="left" if left else "right", no_wrap=True, min_width=width)  # never markup


def print_table(table: Table) -> None:
    """Print a table whose cells are any text: `[/b]` in a name is not markup."""
    Console(markup=False, emoji=False).print(table, crop=False)


def _print(title: str, table: Table, n_rows: int, n_columns: int, file: str) -> None:
    print(f"\n{title}")  # not the table's own title, which is folded to the table's width
    print_table(table)
    if n_rows > MAX_ROWS or n_columns > MAX_COLUMNS:
        print(f"(not all fits here: {file} has the rest)")


def compare(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Set runs side by side.

    Args:
        results: name of a run -> its results.json.

    Returns:
        A row a property: its name, then its value in each run.
    """
    rows = [[name, *(str(result[name]) for result in results.values())] for name in ("dataset", "algorithm")]
    rows += [[name, *(str(result.get(name)) for result in results.values())] for name in schema.CONFIGURATION]
    tests = [result["test"] for result in results.values()]
    worst = [test["sites"][test["worst"]]["accuracy"] if test["worst"] else None for test in tests]
    return [
        *rows,
        ["test accuracy", *(as_text(test["accuracy"]) for test in tests)],
        ["test loss", *(as_text(test["loss"]) for test in tests)],
        ["worst site", *(str(test["worst"] or "-") for test in tests)],
        ["its accuracy", *map(as_text, worst)],
        ["seconds", *(f"{result['wall_s']:.0f}" for result in results.values())],
        ["model SHA-256", *((result["sha256"] or "-")[:12] for result in results.values())],
    ]


def show_comparison(results: dict[str, dict[str, Any]]) -> None:
    """Print runs side by side, a column each."""
    table = new_table()
    add_column(table, "", left=True)
    for name in results:
        add_column(table, f" {name}")
    for row in compare(results):
        table.add_row(*row)
    print()
    print_table(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the result of a run, or several side by side.")
    parser.add_argument("run", nargs="*", default=["latest"], help="its name or folder [the newest]")
    page = "write a page instead: runs/RUN/report.html; of several runs, runs/comparison.html"
    parser.add_argument("--html", action="store_true", help=page)
    options = parser.parse_args()
    runs = list(dict.fromkeys(run_folder(name, RUNS) for name in options.run))
    results = {run.name: schema.read(run) for run in runs}
    if options.html:
        from federation.report import page as report  # its plots' library takes a second to import

        if len(runs) == 1:
            print(report.write(runs[0], settings.PROJECT_NAME))
        else:
            print(report.write_comparison(runs, compare(results), RUNS / "comparison.html", settings.PROJECT_NAME))
    elif len(runs) == 1:
        if counts := schema.read_json(runs[0] / "partition.json")["counts"]:  # real sites may keep them
            show_holdings(counts)
        show(results[runs[0].name])
    else:
        show_comparison(results)


if __name__ == "__main__":
    sys.exit(exit_code("results.py", main))
