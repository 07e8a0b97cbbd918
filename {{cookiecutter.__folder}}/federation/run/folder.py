"""The folder of a run, `runs/<name>/`: every path in it, by name."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.protocol import AUDIT_LOG, BEST, FINAL, PROGRESS, ROUNDS, JsonLines

PROJECT = Path(__file__).resolve().parents[2]
RUNS = Path("runs")  # in the project's folder, which job.py works in
LATEST = "latest"  # link to the newest run that has a result


class RunFolder:
    """A run's paths. Which of the files there are depends on how far the run has come.

    A new run's are relative to the project, as NVFlare bundles files only by a relative path.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.log = path / "log.txt"  # NVFlare's
        # Before it starts
        self.partition = path / "partition.json"  # images per site and class
        self.bundle = path / "bundle"  # travels with the job, next to its code
        self.job = path / "job"  # all that the server and the sites get
        # While it runs
        self.workspace = path / "workspace"  # a folder for the server and one for each site
        self.server = self.workspace / "server" / "simulate_job"  # the server's own results
        self.poc = path / "federation"  # a POC's start-up kits, in which its server and sites work
        # At its end
        self.results = path / "results.json"
        self.final, self.best = path / FINAL, path / BEST  # global models
        self.last = path / "last.pt"  # of a run that failed: the global model after its last finished round
        self.audit_log = path / AUDIT_LOG
        self.tensorboard = path / "tensorboard"
        # By results.py and compare.py
        self.report = path / "report.html"
        self.comparison, self.comparison_plot = path / "compare.json", path / "compare.png"
        self._rounds: list[Any] = []
        self._new_rounds = JsonLines(self.server / ROUNDS)

    @classmethod
    def create(cls, name: str | None, overwrite: bool = False) -> "RunFolder":
        """Make a new folder under runs/, by default named by date and time; `overwrite` removes the old one first.

        Raises:
            UserError: there is one of that name.
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
    def find(cls, name: str) -> "RunFolder":
        """The folder of a finished run, by its name or by its path, as a shell completes it: `first`, `runs/first/`.

        Raises:
            UserError: there is no such run, or it has no result.
        """
        path = Path(name)
        run = cls((PROJECT / RUNS / path if len(path.parts) == 1 else path).resolve())
        if not run.results.is_file():
            raise UserError(f"{run.results} is not there: finish a run with python job.py")
        return run

    def point_latest(self) -> None:
        """Make runs/latest a link to this run."""
        link = RUNS / f".{LATEST}-{os.getpid()}"
        link.symlink_to(self.name)
        link.replace(RUNS / LATEST)

    def site_log(self, site: str) -> Path:
        return self.workspace / site / "log.txt"

    def progress(self, site: str) -> Path:
        """What a site does: site/progress.py."""
        return self.workspace / site / "simulate_job" / PROGRESS

    def rounds(self) -> list[dict[str, Any]]:
        """The records of the rounds so far (server/evaluation.py). It reads only what is new."""
        self._rounds += self._new_rounds.read()
        return self._rounds
