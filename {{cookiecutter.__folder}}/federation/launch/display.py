"""What the screen shows while a federation runs: a live view on a terminal, else a line a round; or NVFlare's own log.

What a site is doing stands in the site's own log: client.py prints each part of a round there.
"""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

STATES = {  # what client.py prints -> what the site does from then on
    "--- validate global model ---": "validating",
    "--- train new model ---": "training",
    "--- test new model ---": "sent, testing",
    "--- prediction with new model ---": "sent, predicting",
    "--- evaluate global model ---": "evaluating",
    "--- wait for the server ---": "sent, waiting",
}
LINE = re.compile("|".join(map(re.escape, STATES)) + r"|step (?P<step>\d+) of (?P<steps>\d+), (?P<speed>\S+) steps/s")
MAX_ROWS = 12  # sites with a row of their own; more of them are counted by what they do


class Site:
    """What one site does, by its log."""

    def __init__(self, log: Path):
        self.log, self.read, self.state = log, 0, "starting"
        self.step = self.steps = 0
        self.speed = ""

    def update(self) -> None:
        if not self.log.exists():
            return
        with self.log.open("rb") as stream:
            stream.seek(self.read)
            new = stream.read()
        new = new[: new.rfind(b"\n") + 1]
        self.read += len(new)
        for found in LINE.finditer(new.decode(errors="replace")):
            if found["speed"]:
                self.step, self.steps, self.speed = int(found["step"]), int(found["steps"]), found["speed"]
            else:
                self.state = STATES[found[0]]
                if self.state == "validating":
                    self.step = self.steps = 0

    def describe(self) -> str:
        if self.state == "training" and self.steps:
            return f"training, step {self.step} of {self.steps}, {self.speed} steps/s"
        return self.state


class Progress:
    """How far a run has come.

    Args:
        logs: each site's log, which may not be there yet.
        num_rounds: of this run.
        first_round: how many there were before, in a run that goes on from another.
    """

    def __init__(self, logs: dict[str, Path], num_rounds: int, first_round: int = 0):
        self.sites = {name: Site(log) for name, log in logs.items()}
        self.num_rounds, self.first_round = num_rounds, first_round
        self.rounds: list[dict[str, Any]] = []
        self.ends: list[float] = []  # when the sites began to work, then when each round ended

    def update(self, rounds: list[dict[str, Any]], now: float) -> list[str]:
        """Look again.

        Args:
            rounds: NVFlare's records of the rounds that are done.
            now: time in seconds.

        Returns:
            a line for each round that has been done since.
        """
        for site in self.sites.values():
            site.update()
        states = [site.state for site in self.sites.values()]  # none where the sites' logs are not on this machine
        if not self.ends and (rounds or not states or states.count("starting") < len(states)):
            self.ends.append(now)
        lines = []
        while len(self.rounds) < len(rounds):
            self.rounds.append(rounds[len(self.rounds)])
            self.ends.append(now)
            took, left = duration(self.ends[-1] - self.ends[-2]), self.time_left(now, before=", ")
            done = f"{self.name(len(self.rounds))} done in {took}"
            lines.append(f"{done}, {self.accuracy()}{left}")  # at most 80 columns
            for record in self.rounds[-1].get("rejected", []):
                lines.append(f"{record['site']}: the server rejected its answer: {record['reason']}")
        return lines

    def accuracy(self, site: str | None = None) -> str:
        """The newest validation accuracy of the global model, at all sites or at one.

        The sites validate a global model when the next round begins: it is that of the model before the last round.
        """
        if not self.rounds:
            return ""
        record = self.rounds[-1]
        metrics = record["sites"].get(site, {}).get("metrics", {}) if site else record["metrics"]
        value, after = metrics.get("val_acc"), self.first_round + len(self.rounds) - 1
        known = f"accuracy {'-' if value is None else f'{value:.3f}'}"
        return known if site else f"{known} {f'after round {after}' if after else 'untrained'}"

    def name(self, number: int) -> str:
        return f"round {self.first_round + number} of {self.first_round + self.num_rounds}"

    def fraction(self) -> float:
        """How much of this round's training the slowest site has done."""
        return min((site.step / site.steps if site.steps else 0.0 for site in self.sites.values()), default=0.0)

    def time_left(self, now: float, before: str = "") -> str:
        """An estimate from the rounds so far, or in the first one from the steps so far; empty if there is none."""
        todo = self.num_rounds - len(self.rounds)
        if not self.ends or not todo:
            return ""
        passed = now - self.ends[-1]
        if self.rounds:
            a_round = (self.ends[-1] - self.ends[0]) / len(self.rounds)
        elif self.fraction():
            a_round = passed / self.fraction()
        else:
            return ""
        return f"{before}{duration(max(0.0, a_round * todo - passed))} left"

    def picture(self, now: float) -> Group:
        """The live view: 2 lines and one a site, or one a state where the sites are many."""
        done = len(self.rounds)
        head, rows = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, None, 1):  # the last column takes what is left of the width
            rows.add_column(no_wrap=True, overflow="ellipsis", ratio=ratio)
        if done < self.num_rounds:
            what, completed = self.name(done + 1), done + self.fraction()
        else:
            what, completed = "final evaluation", done
        head.add_row(what, ProgressBar(self.num_rounds, completed, width=24), self.accuracy(), self.time_left(now))
        if len(self.sites) <= MAX_ROWS:
            for name, site in self.sites.items():
                rows.add_row(name, self.accuracy(name), site.describe())
        else:
            for state in ("starting", *STATES.values()):
                names = [name for name, site in self.sites.items() if site.state == state]
                if names:
                    rows.add_row(f"{len(names)} sites", state, ", ".join(names))
        for column in head.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        return Group("", head, rows)


@contextlib.contextmanager
def follow(
    logs: dict[str, Path], num_rounds: int, verbose: bool, first_round: int = 0
) -> Iterator[Callable[[str, list[dict[str, Any]]], None]]:
    """Show a run while it lasts. What is yielded is to be called a few times a second.

    Its arguments are what NVFlare's log has got since, and the records of all rounds so far.
    """
    progress = Progress(logs, num_rounds, first_round)
    if verbose:
        yield lambda log, rounds: print(log, end="", flush=True)
    elif not sys.stdout.isatty():

        def show_lines(log: str, rounds: list[dict[str, Any]]) -> None:
            for line in progress.update(rounds, time.monotonic()):
                print(line, flush=True)

        yield show_lines
    else:
        # No thread: the simulator is forked from this process. What is printed meanwhile appears above the live view.
        live = Live(console=Console(), auto_refresh=False)

        def show_live(log: str, rounds: list[dict[str, Any]]) -> None:
            now = time.monotonic()
            for line in progress.update(rounds, now):
                live.console.print(line, highlight=False)
            live.update(progress.picture(now), refresh=True)

        with live:
            yield show_live
            live.transient = True  # a run that ends well leaves its rounds; one that does not, also where each site was


def duration(seconds: float) -> str:
    """Seconds as a person says them: 7 s, 3 min 20 s, 45 min, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
