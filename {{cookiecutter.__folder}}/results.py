"""Show finished runs: `python results.py [RUN ...]`, by default the newest; `--html` writes a page instead.

Several runs are compared side by side. job.py prints its tables with these functions, too.
"""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import sys
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
from federation.run.metrics import QUANTILES, as_text, quantiles, worst_sites

MAX_ROWS = 20  # on the screen


def show_distribution(counts: dict[str, dict[str, int]]) -> None:
    """Print the number of images per site and class, or how they are spread; `counts` as in partition.json."""
    classes = list(dict.fromkeys(name for own in counts.values() for name in own))
    rows = [["site", *classes, "all"]]
    for site, own in counts.items():
        row = (str(own.get(name, "-")) for name in classes)  # a real site may not share its counts
        rows.append([site, *row, str(sum(own.values())) if own else "-"])
    if fits(rows) and len(counts) <= MAX_ROWS:
        print_table("Images per site and class (training + validation)", rows)
        return
    at = {name: [own[name] for own in counts.values() if own.get(name)] for name in classes}
    shown = sorted(classes, key=lambda name: len(at[name]))[:MAX_ROWS] if len(classes) > MAX_ROWS else classes
    numbers = {"all classes": [sum(own.values()) for own in counts.values() if own]} | {
        name: at[name] for name in shown
    }
    rows = [["", "sites", "images", *QUANTILES]]
    rows += [[name, *map(as_text, [len(own), sum(own), *quantiles(own)])] for name, own in numbers.items()]
    print_table("Images per site (training + validation), over the sites that have any", rows, section=1)
    if (more := len(classes) - len(shown)) > 0:
        print(f"(not shown: {more} of {len(classes)} classes, at more sites; partition.json has all)")
    n_classes = quantiles(sum(n > 0 for n in own.values()) for own in counts.values() if own)
    print(f"Classes per site: {', '.join(f'{name} {n}' for name, n in zip(QUANTILES, n_classes, strict=True))}")


def show(result: dict[str, Any]) -> None:
    """Print a run's results.json: validation accuracy by round, and the test of the final and the best model."""
    rounds, test, best = result["rounds"], result["test"], result["best"]
    shown = rounds if len(rounds) <= MAX_ROWS else [rounds[0], *rounds[1 - MAX_ROWS :]]
    models = {schema.after_rounds(entry["round"]): (entry["accuracy"], entry["sites"]) for entry in shown}
    tests = {"final test": test, **({f"best test (round {best['round']})": best["test"]} if best else {})}
    for name, its_test in tests.items():
        models[name] = its_test["accuracy"], {site: own["accuracy"] for site, own in its_test["sites"].items()}
    title = f"Accuracy of the global model ({result['dataset']}, {result['partition']})"
    each_site = print_by_site(title, models, section=len(shown))
    if len(shown) < len(rounds):
        print(f"(not shown: {len(rounds) - len(shown)} of {len(rounds)} rounds; results.json has all)")
    if not each_site:
        rows = [[site, as_text(own["accuracy"]), as_text(own["images"])] for site, own in worst_sites(test).items()]
        title = f"Final test: the worst {len(rows)} of {len(test['sites']):,} sites"
        print_table(title, [["site", "accuracy", "test images"], *rows])
    print()
    for sentence in schema.coverage(result):
        print(sentence)
    worst = f"; worst site {test['worst']}" if len(test["sites"]) > 1 and test["worst"] else ""
    metrics = f"accuracy {as_text(test['accuracy'])}, loss {as_text(test['loss'])}{worst}"
    print(f"Final test {metrics}; {result['wall_s']:.0f} s in total")
    for sentence in schema.privacy(result):
        print(sentence)
    for warning in schema.caveats(result):
        print(f"WARNING: {warning}")
    if result["stopped_early"]:
        print(f"stopped early: no better validation accuracy with --patience {result['patience']}")


def print_by_site(title: str, models: dict[str, tuple[float | None, dict[str, Any]]], section: int = 0) -> bool:
    """Print models' accuracies: of each site if that fits the screen, else quantiles over the sites. Return which.

    Args:
        title: of the table.
        models: name of a model -> its mean, and site -> its accuracy there, None if unknown.
        section: see `print_table`.
    """
    sites = list(dict.fromkeys(site for _, own in models.values() for site in own))
    rows = [["", "all sites", *sites]]
    rows += [[name, *map(as_text, [mean, *map(own.get, sites)])] for name, (mean, own) in models.items()]
    if fits(rows):
        print_table(title, rows, section)
        return True
    rows = [["", "mean", "sites", *QUANTILES]]
    for name, (mean, own) in models.items():
        known = [value for value in own.values() if value is not None]
        rows.append([name, *map(as_text, [mean, len(known), *quantiles(known)])])
    print_table(f"{title}, over the sites", rows, section)
    return False


def fits(rows: list[list[str]]) -> bool:
    """Whether a table is as narrow as the screen."""
    return sum(1 + max(map(cell_len, cells)) for cells in zip(*rows, strict=True)) <= Console().width + 1


def print_table(title: str, rows: list[list[str]], section: int = 0) -> None:
    """Print a table, no cell cut. Columns that do not fit the screen follow in further tables.

    Args:
        title: may be empty.
        rows: cells of any text; the first row is the header.
        section: the row after which a new section begins; 0: none.
    """
    print(f"\n{title}" if title else "")  # not the table's own title, which rich wraps to the table's width
    end = len(rows[0])
    while end > 2 and not fits([row[:end] for row in rows]):
        end -= 1
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for i, name in enumerate(rows[0][:end]):
        justify: Literal["left", "right"] = "right" if i else "left"
        table.add_column(Text(name), justify=justify, no_wrap=True)  # Text: `[/b]` in a name is not markup
    for number, row in enumerate(rows[1:], start=1):
        table.add_row(*row[:end], end_section=number == section)
    Console(
        markup=False, emoji=False, width=sum(max(map(cell_len, cells)) + 1 for cells in zip(*rows, strict=True))
    ).print(table)
    if end < len(rows[0]):
        print_table("", [[row[0], *row[end:]] for row in rows], section)


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
        print_table("", [["", *results], *compare(results)])


if __name__ == "__main__":
    sys.exit(exit_code("results.py", main))
