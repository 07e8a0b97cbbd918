"""Show a run: `python results.py [RUN]`, the newest by default. Also what job.py prints on the way."""

import sys

from rich.console import Console
from rich.table import Table

CONFIGURATION = ("partition", "n_clients", "num_rounds", "batch_size", "local_epochs", "learning_rate", "seed")
MAX_ROWS = 20  # of a table on the screen; partition.json and results.json have all


def show_holdings(counts: dict[str, dict[str, int]]) -> None:
    """Print who holds what: a row a site, a column a class."""
    classes = list(next(iter(counts.values())))
    table = Table(title="Who holds what (images to learn from)")
    table.add_column("site")
    for name in classes[:MAX_ROWS]:
        table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True)
    table.add_column("all", justify="right")
    for site, held in list(counts.items())[:MAX_ROWS]:
        table.add_row(site, *(str(held[name]) for name in classes[:MAX_ROWS]), str(sum(held.values())))
    Console().print(table)


def show(result: dict) -> None:
    """Print a run's results.json as a table: the global model after each round, and its final test."""
    sites = list(result["test"]["sites"])[:MAX_ROWS]
    table = Table(title=f"Accuracy of the global model, {result['dataset']}, {result['n_clients']} sites")
    for name in ("", "all sites", *sites):
        table.add_column(name, justify="right" if name else "left")
    for entry in result["rounds"]:
        name = f"after {entry['round']} round{'s' * (entry['round'] != 1)}" if entry["round"] else "untrained"
        table.add_row(name, _share(entry["accuracy"]), *(_share(entry["sites"][site]) for site in sites))
    table.add_section()
    test = result["test"]
    table.add_row("test", _share(test["accuracy"]), *(_share(test["sites"][site]["accuracy"]) for site in sites))
    Console().print(table)
    print(f"Test accuracy of the final global model {_share(test['accuracy'])}, loss {test['loss']:.3f}, {result['wall_s']:.0f} s")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class Progress:
    """Follows a run: NVFlare's log with `verbose`, else a line a round."""

    def __init__(self, num_rounds: int, verbose: bool):
        self.num_rounds, self.verbose, self.shown = num_rounds, verbose, 0

    def __call__(self, log: str, rounds: list[dict]) -> None:
        if self.verbose:
            sys.stdout.write(log)
            sys.stdout.flush()
            return
        for record in rounds[self.shown :]:
            metrics = {metric["name"]: metric["value"] for metric in record["aggregated_metrics"]}
            before = f"global model before it: validation accuracy {_share(metrics.get('val_acc'))}"
            print(f"round {record['round'] + 1} of {self.num_rounds} done; {before}", flush=True)
        self.shown = len(rounds)
