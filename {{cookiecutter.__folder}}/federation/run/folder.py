"""The folder of a run: a new one, under runs/ in the current folder."""

import os
import shutil
import time
from pathlib import Path

from federation.errors import UserError

RUNS = Path("runs")
LATEST = "latest"  # link to the newest run that has a result


def new_run(name: str | None, overwrite: bool = False) -> Path:
    """Make a folder under runs/ that was not there before.

    Args:
        name: of the folder; None: date and time.
        overwrite: whether a run of that name is removed first.

    Raises:
        UserError: there is one of that name.
    """
    RUNS.mkdir(exist_ok=True)
    while True:
        folder = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if name:
                raise UserError(f"{folder} exists: choose another --name, or add --overwrite to replace it") from None
            time.sleep(0.1)  # another run started within this second


def point_latest_to(folder: Path) -> None:
    """Make runs/latest a link to a run's folder."""
    link = RUNS / f".{LATEST}-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(RUNS / LATEST)
