"""All paths in a run's folder, `runs/<name>/`."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.protocol import AUDIT_LOG, BEST, FINAL, PROGRESS, ROUNDS, JsonLines

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
        self.partition = path / "partition.json"  # images per site and class
        self.bundle = path / "bundle"  # files that travel with the job, besides its code
        self.job = path / "job"  # what the server and the sites receive
        # During the run
        self.workspace = path / "workspace"  # one folder for the server and one per site
        self.server = self.workspace / "server" / "simulate_job"  # the server's run folder
        self.poc = path / "federation"  # startup kits of a POC, where its server and sites work
        self.ledger = path / "ledger"  # the sites' own ledgers, except of real sites
        # After the run
        self.results = path / RESULTS
        self.final, self.best = path / FINAL, path / BEST  # global models
        self.model_card = path / MODEL_CARD  # what is needed to use them elsewhere
        self.last = path / "last.pt"  # failed run: global model after the last finished round
        self.audit_log = path / AUDIT_LOG
        self.tensorboard = path / "tensorboard"
        # Written by results.py and compare.py
        self.report = path / "report.html"
        self.comparison, self.comparison_plot = path / "compare.json", path / "compare.png"
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
    def find(cls, name: str, file: str = RESULTS) -> "RunFolder":
        """The folder of a finished run, given its name or its path as a shell completes it: `first`, `runs/first/`.

        Raises:
            UserError: there is no such run, or it lacks this file.
        """
        places = [(PROJECT / RUNS / name).resolve(), Path(name).resolve()]
        for place in places:
            if (place / file).is_file():
                return cls(place)
        missing = places[len(Path(name).parts) > 1] / file
        raise UserError(f"{missing} does not exist: finish a run with python job.py")

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
