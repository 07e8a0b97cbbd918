"""All paths in a run's folder, `runs/<name>/`."""

import contextlib
import fcntl
import glob
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from federation.errors import UserError
from federation.protocol import (
    AUDIT_LOG,
    BEST,
    FINAL,
    LAST,
    OPTIONS,
    PROGRESS,
    ROUNDS,
    JsonLines,
    save_tensors,
    write_json,
)

PROJECT = Path(__file__).resolve().parents[2]
RUNS = Path("runs")  # relative to the project, job.py's working directory
LATEST = "latest"  # link to the newest finished run
RESULTS, MODEL_CARD = "results.json", "model.json"


class RunFolder:
    """The paths of a run. Which of them exist depends on how far the run has come.

    Those of a new run are relative to the project, because NVFlare bundles files only by relative path.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.log = path / "log.txt"  # NVFlare's
        # Before the run
        self.start = path / "start.json"  # the command, when and from what; locked while the run lasts
        self.partition = path / "partition.json"  # images per site and class
        self.bundle = path / "bundle"  # files that travel with the job, besides its code
        self.options = self.bundle / OPTIONS
        self.job = path / "job"  # what the server and the sites receive
        # During the run
        self.workspace = path / "workspace"  # one folder for the server and one per site
        self.server = self.workspace / "server" / "simulate_job"  # the server's run folder
        self.poc = path / "federation"  # startup kits of a POC, where its server and sites work
        self.ledger = path / "ledger"  # the sites' own ledgers, except of real sites
        # After the run
        self.failure = path / "failure.json"  # failed run: the `reason`
        self.results = path / RESULTS
        self.final, self.best = path / FINAL, path / BEST  # global models
        self.model_card = path / MODEL_CARD  # what is needed to use them elsewhere
        self.last = path / LAST  # unfinished run: global model after the last finished round
        self.test_counts = path / "test_counts.json"  # how the final model classified the test images
        self.audit_log = path / AUDIT_LOG
        self.tensorboard = path / "tensorboard"
        # Written by results.py and compare.py
        self.report = path / "report.html"
        self.comparison, self.comparison_plot = path / "compare.json", path / "compare.png"
        self._lock: IO[Any] | None = None
        self._rounds: list[Any] = []
        self._new_rounds = JsonLines(self.server / ROUNDS)

    @classmethod
    def create(cls, name: str | None, overwrite: bool = False) -> "RunFolder":
        """Create a folder under runs/, by default named by date and time; `overwrite` removes an existing one first.

        Raises:
            UserError: the folder exists.
        """
        RUNS.mkdir(exist_ok=True)
        while True:
            path = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
            if overwrite and path.exists():
                shutil.rmtree(path)
            try:
                path.mkdir()
                return cls(path)
            except FileExistsError:
                if name:
                    raise UserError(f"{path} exists: choose another --name, or add --overwrite to replace it") from None
                time.sleep(0.1)  # another run started within this second

    @classmethod
    def find(cls, name: str, file: str = RESULTS, unfinished: bool = False) -> "RunFolder":
        """The folder of a run, given its name or its path as a shell completes it: `first`, `runs/first/`.

        Args:
            name: the name or path.
            file: what it must have.
            unfinished: whether it may instead be a run that was stopped, failed, or is still running.

        Raises:
            UserError: there is no such run, or it lacks this file.
        """
        places = [(PROJECT / RUNS / name).resolve(), Path(name).resolve()]
        for run in map(cls, places):
            if (run.path / file).is_file() or (unfinished and run.state):
                return run
        run = cls(places[len(Path(name).parts) > 1])
        unfinished = run.state not in (None, "finished")
        todo = f"it is {run.state}: python results.py --list" if unfinished else "finish a run with python job.py"
        raise UserError(f"{run.path / file} does not exist: {todo}")

    @classmethod
    def find_all(cls, pattern: str = "*") -> list["RunFolder"]:
        """The folders of the runs that match a name, a path or a glob of either, in the order of their names.

        Raises:
            UserError: there is no such run.
        """
        path = Path(pattern)
        start = PROJECT / RUNS if len(path.parts) == 1 else Path()
        if (start / path).exists() or not any(special in pattern for special in "*?["):
            return [cls.find(pattern, unfinished=True)]
        places = map(Path, sorted(glob.glob(str(start / path))))
        runs = (cls(place.resolve()) for place in places if place.name != LATEST)
        if found := [run for run in runs if run.state]:
            return found
        raise UserError(f"no run matches {pattern}: python results.py --list shows all runs")

    @property
    def state(self) -> str | None:
        """`finished`, `running`, `failed` or `stopped`; None: this is not a run."""
        if self.results.is_file():
            return "finished"
        if not self.options.is_file():
            return None
        with contextlib.suppress(FileNotFoundError), self.start.open("rb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return "running"
        return "failed" if self.failure.is_file() else "stopped"

    def begin(self, record: dict[str, Any]) -> None:
        """Write `start.json` and lock it until this process ends, however it ends."""
        write_json(self.start, record, indent=1)
        self._lock = self.start.open("rb+")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def keep_last(self) -> int:
        """Write `last.pt`, the global model after the last finished round, and return that round's number; 0: none."""
        if not (self.server / LAST).is_file():
            return 0
        import torch

        last = torch.load(self.server / LAST, weights_only=True)
        save_tensors(self.last, last["model"])
        return int(last["round"])

    def point_latest(self) -> None:
        """Make runs/latest a link to this run."""
        link = RUNS / f".{LATEST}-{os.getpid()}"
        link.symlink_to(self.name)
        link.replace(RUNS / LATEST)

    def site_log(self, site: str) -> Path:
        return self.workspace / site / "log.txt"

    def progress(self, site: str) -> Path:
        """What a site is doing; written by site/progress.py."""
        return self.workspace / site / "simulate_job" / PROGRESS

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds finished so far, as server/evaluation.py records them. Reads only new lines."""
        self._rounds += self._new_rounds.read()
        return self._rounds
