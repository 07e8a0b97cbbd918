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

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what ends job.py and lets it clean up
GRACE_S = 3.0  # from SIGTERM to SIGKILL
POC_FOLDER = "federation"  # in the run's folder
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


@contextlib.contextmanager
def guard(run: Path) -> Iterator[Callable[[int], None]]:
    """End what is started inside this context, also where this process is killed: its process trees, a POC's keys.

    Args:
        run: the run's folder.

    Yields:
        a function to be called with the ID of each process that has been started.
    """
    if sys.platform == "linux":  # what loses its parent becomes a child of this process, and so is found at the end
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    watchdog = subprocess.Popen(
        [sys.executable, __file__, str(run.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's signals
        bufsize=0,
    )
    pipe = watchdog.stdin
    assert pipe
    os.register_at_fork(after_in_child=pipe.close)  # a fork must not keep it open

    def started(pid: int) -> None:
        pipe.write(f"{pid}\n".encode())

    try:
        yield started
    finally:
        with _undisturbed():
            children = [child for child in psutil.Process().children() if child.pid != watchdog.pid]
            clean_up(children, run.resolve())
            watchdog.kill()
            watchdog.wait()


def main(run: Path) -> None:
    """The watchdog: read a process ID per line; once there will be no more, clean up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    roots = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.NoSuchProcess):
            roots.append(psutil.Process(int(line)))
    clean_up(roots, run)


def clean_up(roots: list[psutil.Process], run: Path) -> None:
    """End these processes with all their descendants and what else works in the run's folder; remove a POC's keys."""
    terminate_process_trees(roots, run)
    remove_keys(run / POC_FOLDER)


def terminate_process_trees(roots: list[psutil.Process], run: Path) -> None:
    """End processes and their descendants, and those of NVFlare that were started with a path in the folder `run`."""
    found: set[psutil.Process] = set()
    while new := {*_descendants(roots), *_of_nvflare(run)} - found:
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


def remove_keys(poc: Path) -> None:
    """Remove a POC's start-up kits and root key from its folder; its logs and what was written for the job stay."""
    for pattern in ("*/state", "*/*/*/startup", "*/*/*/local", "*/*/*/transfer"):
        for folder in poc.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _descendants(roots: list[psutil.Process]) -> Iterator[psutil.Process]:
    for root in roots:
        with contextlib.suppress(psutil.Error):
            if root.is_running():  # and its ID has not passed to another one
                yield root
                yield from root.children(recursive=True)


def _of_nvflare(run: Path) -> Iterator[psutil.Process]:
    """Their parents may have died before them."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith("nvflare.") for word in words) and any(word.startswith(f"{run}/") for word in words):
            yield process


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """An impatient second Ctrl-C does not interrupt the cleaning up."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
