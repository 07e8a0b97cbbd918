"""Show a running federation: a live view on a terminal, else one line per round."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from federation.protocol import METRIC, PHASES, STARTING, TRAINING, VALIDATING, WAITING, JsonLines
from federation.run.folder import RunFolder
from federation.run.metrics import as_text

MAX_ROWS = 12  # with more processes, there is one row per phase instead of one per process
# Called a few times per second with the new part of NVFlare's log and the records of all rounds so far.
Follow = Callable[[str, list[dict[str, Any]]], None]


class Process:
    """What a process is doing, according to its progress file: a site, or a host that runs several, one by one."""

    def __init__(self, name: str, progress: JsonLines) -> None:
        self.name, self.progress, self.phase = name, progress, STARTING
        self.site, self.number, self.sites = name, 1, 1  # the site, and which of those of its task it is
        self.step = self.steps = 0
        self.speed = 0.0

    def update(self) -> None:
        for record in self.progress.read():
            if "site" in record:
                self.site, self.number, self.sites = record["site"], record["number"], record["sites"]
            elif "step" in record:
                self.step, self.steps, self.speed = record["step"], record["steps"], record["speed"]
            else:
                self.phase = record["phase"]
                if self.phase in (VALIDATING, TRAINING):
                    self.step = self.steps = 0

    def fraction(self) -> float:
        """The fraction of its task's training that it has completed."""
        return max(0.0, self.number - 1 + (self.step / self.steps if self.steps else 0.0)) / self.sites

    def describe(self) -> str:
        is_host = self.site != self.name
        site = f"{self.site} ({self.number} of {self.sites}): " if is_host and self.phase != WAITING else ""
        if self.phase == TRAINING and self.steps:
            return f"{site}training, step {self.step} of {self.steps}, {self.speed:.1f} steps/s"
        return site + self.phase


class Overview:
    """The progress of a run.

    Args:
        run: the run's folder.
        processes: the sites or hosts with a visible progress file: none if they are remote.
        num_rounds: number of rounds in this run.
        first_round: number of earlier rounds, if the run is resumed.
    """

    def __init__(self, run: RunFolder, processes: list[str], num_rounds: int, first_round: int = 0) -> None:
        self.processes = {name: Process(name, JsonLines(run.progress(name))) for name in processes}
        self.num_rounds, self.first_round = num_rounds, first_round
        self.rounds: list[dict[str, Any]] = []
        self.ends: list[float] = []  # when the sites started working, then when each round ended

    def update(self, rounds: list[dict[str, Any]], now: float) -> list[str]:
        """Read the sites' progress. Return a line for each new round and for each answer rejected in it.

        Args:
            rounds: the server's records of the rounds so far.
            now: current time in seconds.
        """
        processes = self.processes.values()
        for process in processes:
            process.update()
        if not self.ends and (rounds or not processes or any(process.phase != STARTING for process in processes)):
            self.ends.append(now)
        lines = []
        for record in rounds[len(self.rounds) :]:
            self.rounds.append(record)
            took = duration(now - self.ends[-1])
            self.ends.append(now)
            line = [f"{self.name(len(self.rounds))} done in {took}", self.accuracy(), self.time_left(now)]
            lines.append(", ".join(filter(None, line)))  # at most 80 columns
            for answer in record.get("rejected", []):
                lines.append(f"{answer['site']}: answer rejected: {answer['reason']}")
        return lines

    def accuracy(self, site: str | None = None) -> str:
        """The latest validation accuracy of the global model, over all sites or at one.

        Sites validate a global model at the start of the next round, so this is the model before the last round.
        """
        if not self.rounds:
            return ""
        record = self.rounds[-1]
        if site:
            return f"accuracy {as_text(record['sites'].get(site, {}).get('metrics', {}).get(METRIC))}"
        after = self.first_round + len(self.rounds) - 1
        return f"accuracy {as_text(record['metrics'].get(METRIC))} {f'after round {after}' if after else 'untrained'}"

    def name(self, number: int) -> str:
        return f"round {self.first_round + number} of {self.first_round + self.num_rounds}"

    def fraction(self) -> float:
        """The fraction of this round's training that the slowest process has completed."""
        return min((process.fraction() for process in self.processes.values()), default=0.0)

    def time_left(self, now: float) -> str:
        """Estimated from the rounds so far, or from the steps during the first round; empty if unknown."""
        todo, done = self.num_rounds - len(self.rounds), len(self.rounds) or self.fraction()
        if not (self.ends and todo and done):
            return ""
        passed = now - self.ends[-1]
        a_round = (self.ends[-1] - self.ends[0] if self.rounds else passed) / done
        return f"{duration(max(0.0, a_round * todo - passed))} left"

    def render(self, now: float) -> Group:
        """The live view: 2 lines plus one per process, or one per phase if there are many processes."""
        done, what, completed = len(self.rounds), "final evaluation", float(self.num_rounds)
        if done < self.num_rounds:
            what, completed = self.name(done + 1), done + self.fraction()
        head = _grid(4)
        head.add_row(what, ProgressBar(self.num_rounds, completed, width=24), self.accuracy(), self.time_left(now))
        rows = _grid(3)
        rows.expand, rows.columns[-1].ratio = True, 1  # the last column takes the remaining width
        if len(self.processes) <= MAX_ROWS:
            for name, process in self.processes.items():
                rows.add_row(name, self.accuracy(name) if process.site == name else "", process.describe())
        else:
            for phase in PHASES:
                if names := [name for name, process in self.processes.items() if process.phase == phase]:
                    rows.add_row(f"{len(names)} processes", phase, ", ".join(names))
        return Group("", head, rows)


def _grid(n_columns: int) -> Table:
    return Table.grid(*(Column(no_wrap=True, overflow="ellipsis") for _ in range(n_columns)), padding=(0, 2))


@contextlib.contextmanager
def follow(
    run: RunFolder, processes: list[str], num_rounds: int, verbose: bool, first_round: int = 0
) -> Iterator[Follow]:
    """Yield a function that shows a run's progress (see `Overview`), or NVFlare's log with `verbose`."""
    overview = Overview(run, processes, num_rounds, first_round)
    # No refresh thread, since the simulator is forked from this process. Other output appears above the live view.
    live = Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() and not verbose else None

    def show(log: str, rounds: list[dict[str, Any]]) -> None:
        if verbose:
            print(log, end="", flush=True)
            return
        now = time.monotonic()
        for line in overview.update(rounds, now):
            print(line, flush=True)
        if live:
            live.update(overview.render(now), refresh=True)

    with live or contextlib.nullcontext():
        yield show
        if live:
            live.transient = True  # after a success, only the lines stay; after a failure, also where each site was


def duration(seconds: float) -> str:
    """Format seconds: 7 s, 3 min 20 s, 45 min, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
