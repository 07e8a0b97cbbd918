"""Leaves no process behind, whatever ends job.py: it cleans up by itself, and a watchdog does where it was killed.

The watchdog is a process of its own that job.py cannot take along. It waits for the end of its standard input, a pipe
from job.py over which it learns the processes that job.py has started. So that it costs little, this file imports
nothing but psutil.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from federation.run.folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what ends job.py and lets it clean up
GRACE_S = 3.0  # from SIGTERM to SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


@contextlib.contextmanager
def guard(run: "RunFolder") -> Iterator[Callable[[int], object]]:
    """Leave no process that is started inside this context, and no key of a POC, also where this process is killed.

    Yields a function to be called with the ID of each process that has been started.
    """
    if sys.platform == "linux":  # what loses its parent becomes a child of this process, and so is found at the end
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder, poc = run.path.resolve(), run.poc.resolve()
    watchdog = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(poc)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's signals
        bufsize=0,
    )
    pipe = watchdog.stdin
    assert pipe
    os.register_at_fork(after_in_child=pipe.close)  # a fork must not keep it open
    try:
        yield lambda pid: pipe.write(f"{pid}\n".encode())
    finally:
        # An impatient second Ctrl-C does not interrupt the cleaning up.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        clean_up([child for child in psutil.Process().children() if child.pid != watchdog.pid], folder, poc)
        watchdog.kill()
        watchdog.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def clean_up(roots: list[psutil.Process], folder: Path, poc: Path) -> None:
    """End these processes, their descendants and NVFlare's that were started with a path in the run's folder.

    Then remove a POC's keys; its logs and what was written for the job stay.
    """
    found: set[psutil.Process] = set()
    while new := set(_find_processes(roots, folder)) - found:
        for process in new:
            with contextlib.suppress(psutil.Error):
                process.suspend()  # so that it starts no other; what it has started since is found by the next pass
        found |= new
    for act in (psutil.Process.terminate, psutil.Process.resume):
        for process in found:
            with contextlib.suppress(psutil.Error):
                act(process)
    for process in psutil.wait_procs(found, timeout=GRACE_S)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=GRACE_S)
    for pattern in ("*/state", "*/*/*/startup", "*/*/*/local", "*/*/*/transfer"):
        for secret in poc.glob(pattern):
            shutil.rmtree(secret, ignore_errors=True)


def _find_processes(roots: list[psutil.Process], folder: Path) -> Iterator[psutil.Process]:
    for root in roots:
        with contextlib.suppress(psutil.Error):
            if root.is_running():  # and its ID has not passed to another one
                yield root
                yield from root.children(recursive=True)
    for process in psutil.process_iter(["cmdline"]):  # NVFlare's: their parents may have died before them
        words = process.info["cmdline"] or []
        if any(word.startswith("nvflare.") for word in words) and any(word.startswith(f"{folder}/") for word in words):
            yield process


if __name__ == "__main__":  # the watchdog: read a process ID per line; once there will be no more, clean up
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    started = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.append(psutil.Process(int(line)))
    clean_up(started, Path(sys.argv[1]), Path(sys.argv[2]))
