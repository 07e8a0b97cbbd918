"""The folder of a run: a new one, under runs/ in the current folder."""

import os
import time
from pathlib import Path

from federation.command_line import UsageError

RUNS = Path("runs")


def new_run(name: str | None) -> Path:
    """Make a folder under runs/ that was not there before, and point runs/latest to it.

    Raises:
        UsageError: there is one of that name.
    """
    RUNS.mkdir(exist_ok=True)
    while True:
        folder = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if name:
                raise UsageError(f"{folder} exists: choose another --name, or none") from None
            time.sleep(0.1)  # another run started within this second
    link = RUNS / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(RUNS / "latest")
    return folder
