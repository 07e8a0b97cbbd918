"""Show runs: `python results.py [RUN ...]`, by default the newest that finished; `--html` writes a page instead.

Several runs are compared side by side, by their validation accuracy; `--list` lists them. job.py prints its tables with
these functions, too.
"""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import sys
import textwrap
from typing import Any, Literal

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from federation.errors import UserError, exit_code
from federation.launch.options import FLAGS, Command, read_arguments
from federation.run import schema
from federation.run.folder import PROJECT, RUNS, RunFolder
from federation.run.metrics import QUANTILES, as_text, quantiles, worst_sites
from settings import Options

MAX_ROWS = 20  # on the screen
WHY = "the highest of several test accuracies is partly luck, so choose by validation accuracy"


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
    """Print a run, as `schema.read` returns it: validation accuracy by round, the test of the final and best model."""
    rounds, test, best = result["rounds"], result["test"], result["best"]
    finished = result.get("state", "finished") == "finished"  # job.py shows what it has just written
    shown = rounds if len(rounds) <= MAX_ROWS else [rounds[0], *rounds[1 - MAX_ROWS :]]
    models = {schema.after_rounds(entry["round"]): (entry["accuracy"], entry["sites"]) for entry in shown}
    tests = {"final test": test} if finished else {}
    if best:
        tests[f"best test (round {best['round']})"] = best["test"]
    for name, its_test in tests.items():
        models[name] = its_test["accuracy"], {site: own["accuracy"] for site, own in its_test["sites"].items()}
    title = f"Accuracy of the global model ({result['dataset']}, {result['partition']})"
    each_site = print_by_site(title, models, section=len(shown))
    if len(shown) < len(rounds):
        print(f"(not shown: {len(rounds) - len(shown)} of {len(rounds)} rounds; results.json has all)")
    if not each_site and finished:
        rows = [[site, as_text(own["accuracy"]), as_text(own["images"])] for site, own in worst_sites(test).items()]
        title = f"Final test: the worst {len(rows)} of {len(test['sites']):,} sites"
        print_table(title, [["site", "accuracy", "test images"], *rows])
    print()
    for sentence in schema.coverage(result):
        print(sentence)
    worst = f"; worst site {test['worst']}" if len(test["sites"]) > 1 and test["worst"] else ""
    metrics = f"accuracy {as_text(test['accuracy'])}, loss {as_text(test['loss'])}{worst}"
    if finished:
        print(f"Final test {metrics}; {result['wall_s']:.0f} s in total")
    if values := test.get("metrics"):
        majority = test["majority"]
        print(
            "Final test " + ", ".join(f"{name} {as_text(own[0])}" for name, own in values.items() if name != "accuracy")
        )
        print("95 % interval of the accuracy: {1:.3f} to {2:.3f}".format(*values["accuracy"]), end="; ")
        print(f"always {majority['class']}: {as_text(majority['metrics']['accuracy'])}")
    for sentence in schema.privacy(result):
        print(textwrap.fill(sentence, Console().width))
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


def compare(results: dict[str, dict[str, Any]], chosen: str | None, test: bool = False) -> list[list[str]]:
    """Compare runs: each row is a property's name and its value in each run.

    Args:
        results: name of a run -> what `schema.read` returned.
        chosen: the run that `choose` returned.
        test: whether to show its test metrics.
    """
    runs = results.values()
    names = [name for name in schema.CONFIGURATION if name != "data_root"]  # paths are private
    shown = [name for name in names if any(run.get(name) is not None for run in runs)]
    last = [run["rounds"][-1] if run["rounds"] else {} for run in runs]
    marks = ["*" if name == chosen else "" for name in results]
    best = [max(filter(schema.validated, run["rounds"]), key=schema.validated, default=None) for run in runs]
    tests = [run["test"] if name == chosen else {} for name, run in results.items()]
    worst = [own.get("sites", {}).get(own.get("worst"), {}) for own in tests]
    of_test = [
        ["test accuracy", *(as_text(own.get("accuracy")) for own in tests)],
        ["test loss", *(as_text(own.get("loss")) for own in tests)],
        ["worst site", *(str(own.get("worst") or "-") for own in tests)],
        ["its accuracy", *(as_text(own.get("accuracy")) for own in worst)],
    ]
    return [
        ["validation accuracy", *(as_text(e.get("accuracy")) + mark for e, mark in zip(last, marks, strict=True))],
        ["validation loss", *(as_text(entry.get("loss")) for entry in last)],
        ["best round", *(f"{entry['round']} ({as_text(entry['accuracy'])})" if entry else "-" for entry in best)],
        *(of_test if test else []),
        ["state", *(state_of(run) for run in runs)],
        *([name, *(str(run.get(name, "-")) for run in runs)] for name in shown),
        ["seconds", *("-" if run["wall_s"] is None else f"{run['wall_s']:.0f}" for run in runs)],
        ["model SHA-256", *((run["sha256"] or "-")[:12] for run in runs)],
    ]


def choose(results: dict[str, dict[str, Any]]) -> str | None:
    """The finished run whose final model has the highest validation accuracy; None if there is none."""
    finished = {name: run["rounds"][-1] for name, run in results.items() if run["state"] == "finished"}
    known = {name: entry["accuracy"] for name, entry in finished.items() if schema.validated(entry)}
    return max(known, key=known.__getitem__, default=None)


def state_of(result: dict[str, Any]) -> str:
    """A run's state, and for an unfinished one the last round that has finished."""
    state = str(result["state"])
    return state if state == "finished" else f"{state} after round {schema.n_finished(result)}"


def show_list(results: dict[str, dict[str, Any]]) -> None:
    """Print a row per run: when it began, its last validation accuracy, its state, what differs from the defaults."""
    usual, rows = vars(Options()), [["run", "started", "validation", "state", "changed settings"]]
    for name, run in results.items():
        flags = [f"--resume {run['resumed']['run']}"] if run["resumed"] else []
        for option in schema.CONFIGURATION:
            if option != "data_root" and run.get(option) not in (None, usual[option]):
                flags.append(f"{FLAGS[option]} {run[option]}")
        accuracy = run["rounds"][-1]["accuracy"] if run["rounds"] else None
        started = (run["started"] or "-")[:16].replace("T", " ")
        rows.append([name, started, as_text(accuracy), state_of(run), " ".join(flags)])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    widths = [max(map(cell_len, cells)) + 1 for cells in zip(*rows, strict=True)]
    for name, width in zip(rows[0], [*widths[:-1], None], strict=True):  # flags are wrapped, all else is not
        table.add_column(name, min_width=width and width - 1, no_wrap=width is not None)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    width = max(Console().width, sum(widths[:-1]) + len(rows[0][-1]))
    Console(markup=False, emoji=False, width=width).print(table)


def main() -> None:
    page = "write a page instead: runs/RUN/report.html, or for several runs runs/comparison.html"
    flags = [
        click.Argument(["run"], nargs=-1),
        click.Option(["--list"], is_flag=True, help="list these runs, or all, one per line"),
        click.Option(["--test"], is_flag=True, help="several runs: test accuracy of the best on validation images"),
        click.Option(["--html"], is_flag=True, help=page),
    ]
    purpose = (
        "Show a run, or compare several side by side. RUN is a folder under runs/, or a pattern such as 'lr-*'; by "
        "default the newest that finished."
    )
    arguments = read_arguments(Command("results.py", params=flags, help=purpose)).params
    names = arguments["run"] or ["*" if arguments["list"] else "latest"]
    runs = list({run.path: run for name in names for run in RunFolder.find_all(name)}.values())
    results = {run.name: schema.read(run) for run in runs}
    if arguments["list"]:
        show_list(results)
        return
    several, chosen = len(runs) > 1, choose(results)
    if arguments["test"] and several and not chosen:
        raise UserError("--test: none of these runs has finished with a validation accuracy: name one that has")
    if arguments["html"]:
        from federation.report import page as report  # matplotlib takes a second to import

        if several:
            rows = compare(results, chosen, arguments["test"])
            print(report.write_comparison(results, rows, PROJECT / RUNS / "comparison.html", reading(chosen)))
        elif results[runs[0].name]["state"] != "finished":
            raise UserError(f"{runs[0].name} has not finished: resume it with python job.py --resume {runs[0].name}")
        else:
            print(report.write(runs[0]))
    elif several:
        print_table("", [["", *results], *compare(results, chosen, arguments["test"])])
        print(f"\n{textwrap.fill(reading(chosen), Console().width)}")
    else:
        show_one(runs[0], results[runs[0].name])


def show_one(run: RunFolder, result: dict[str, Any]) -> None:
    """Print a run's tables, and for an unfinished one how far it went."""
    if counts := schema.read_json(run.partition)["counts"]:  # real sites may not share them
        show_distribution(counts)
    if result["rounds"]:
        show(result)
    if result["state"] == "finished":
        return
    n_rounds = result["num_rounds"] + (result["resumed"] or {"round": 0})["round"]
    print(f"{run.name}: {state_of(result)} of {n_rounds}; no final test")
    if result["state"] == "failed":
        print(f"reason: {schema.read_json(run.failure)['reason']}")
    if result["state"] != "running" and schema.n_finished(result):
        print(f"resume it with: python job.py --resume {run.name}")


def reading(chosen: str | None) -> str:
    """How to read a comparison, in a sentence."""
    best = f"* {chosen} is the best on validation images. " if chosen else ""
    return f"{best}Test images are for that run alone, with --test: {WHY}."


if __name__ == "__main__":
    sys.exit(exit_code("results.py", main))
