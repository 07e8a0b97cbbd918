"""Show a run: `python results.py [RUN]`, the newest by default. Also what job.py prints on the way."""

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

RUNS = Path(__file__).resolve().parent / "runs"
CONFIGURATION = (
    *("partition", "alpha", "shards_per_site", "n_clients", "num_rounds"),
    *("image_size", "batch_size", "local_epochs", "learning_rate", "seed"),
)
MAX_COLUMNS, MAX_ROWS = 10, 20  # on the screen; partition.json and results.json have all


def show_holdings(counts: dict[str, dict[str, int]]) -> None:
    """Print who holds what: a row a site, a column a class; `counts` is that of partition.json."""
    classes = list(max(counts.values(), key=len))
    table = _table()
    _column(table, "site", left=True)
    for name in classes[:MAX_COLUMNS]:
        _column(table, name[:6])
    _column(table, "all")
    for site, held in list(counts.items())[:MAX_ROWS]:
        row = (str(held.get(name, "-")) for name in classes[:MAX_COLUMNS])  # a real site may keep it to itself
        table.add_row(site, *row, str(sum(held.values())) if held else "-")
    _print("Who holds what (images to learn from)", table, len(counts), len(classes), "partition.json")


def show(result: dict) -> None:
    """Print a run's results.json: the global model after each round, and the test of the final one."""
    sites = list(result["test"]["sites"])
    table = _table()
    _column(table, "", left=True)
    _column(table, "all sites")
    for site in sites[:MAX_COLUMNS]:
        _column(table, site)
    rounds = result["rounds"]
    for entry in rounds if len(rounds) <= MAX_ROWS else [rounds[0], *rounds[1 - MAX_ROWS :]]:
        row = (entry["sites"][site] for site in sites[:MAX_COLUMNS])
        table.add_row(_after(entry["round"]), _share(entry["accuracy"]), *map(_share, row))
    table.add_section()
    test = result["test"]
    row = (test["sites"][site]["accuracy"] for site in sites[:MAX_COLUMNS])
    table.add_row("final test", _share(test["accuracy"]), *map(_share, row))
    title = f"Accuracy of the global model ({result['dataset']}, {result['partition']})"
    _print(title, table, len(rounds), len(sites), "results.json")
    worst = f"; worst site {test['worst']}" if len(sites) > 1 and test["worst"] else ""
    print(f"\nFinal test accuracy {_share(test['accuracy'])}, loss {_share(test['loss'])}{worst}")
    print(f"{result['wall_s']:.0f} s in all")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)


def _column(table: Table, name: str, left: bool = False) -> None:
    """A column that is never cut, however narrow the screen."""
    table.add_column(name, justify="left" if left else "right", no_wrap=True, min_width=max(len(name), 5))


def _print(title: str, table: Table, n_rows: int, n_columns: int, file: str) -> None:
    print(f"\n{title}")  # not the table's own title, which is folded to the table's width
    Console().print(table, crop=False)
    if n_rows > MAX_ROWS or n_columns > MAX_COLUMNS:
        print(f"(not all fits here: {file} has the rest)")


def _after(rounds: int) -> str:
    return f"after round {rounds}" if rounds else "untrained"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class Progress:
    """Follows a run: NVFlare's log if `verbose`, else a line a round."""

    def __init__(self, num_rounds: int, verbose: bool):
        self.num_rounds, self.verbose, self.shown = num_rounds, verbose, 0

    def __call__(self, log: str, rounds: list[dict]) -> None:
        if self.verbose:
            print(log, end="", flush=True)
            return
        for record in rounds[self.shown :]:
            accuracy = {m["name"]: m["value"] for m in record["aggregated_metrics"]}.get("val_acc")
            number = record["round"] + 1  # NVFlare counts from 0, and records the metrics of what the round began with
            print(f"round {number} of {self.num_rounds} done; it began with validation accuracy {_share(accuracy)}")
            sys.stdout.flush()
        self.shown = len(rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show a run's result.")
    parser.add_argument("run", nargs="?", default="latest", help="name of a folder under runs/ [the newest]")
    run = RUNS / parser.parse_args().run
    try:
        if counts := json.loads((run / "partition.json").read_text(encoding="utf-8"))["counts"]:
            show_holdings(counts)
        show(json.loads((run / "results.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        print(f"results.py: {error.filename} is not there: finish a run with python job.py", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
