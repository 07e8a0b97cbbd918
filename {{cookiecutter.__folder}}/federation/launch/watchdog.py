"""Leave no process behind, however job.py ends: it cleans up after itself, and a watchdog cleans up if it is killed.

The watchdog is a separate process that survives job.py. It reads the IDs of the processes that job.py starts from its
standard input, a pipe, until that is closed. To keep it cheap, this file imports only psutil.
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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # end job.py, which then cleans up
GRACE_S = 3.0  # from SIGTERM to SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


@contextlib.contextmanager
def guard(run: "RunFolder") -> Iterator[Callable[[int], object]]:
    """End all processes started in this context and remove a POC's keys, even if this process is killed.

    Yields a function to call with the ID of each process that was started.
    """
    if sys.platform == "linux":  # orphans become children of this process and are found at the end
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
        # A second Ctrl-C must not interrupt the cleanup.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        clean_up([child for child in psutil.Process().children() if child.pid != watchdog.pid], folder, poc)
        watchdog.kill()
        watchdog.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def clean_up(roots: list[psutil.Process], folder: Path, poc: Path) -> None:
    """End these processes, their descendants, and NVFlare processes whose arguments have a path in the run's folder.

    Then remove a POC's keys, but keep its logs and the job's files.
    """
    found: set[psutil.Process] = set()
    while new := set(_find_processes(roots, folder)) - found:
        for process in new:
            with contextlib.suppress(psutil.Error):
                process.suspend()  # so that it starts no others; the next pass finds any started since
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
            if root.is_running():  # its ID has not been reused
                yield root
                yield from root.children(recursive=True)
    for process in psutil.process_iter(["cmdline"]):  # NVFlare's, whose parents may be gone
        words = process.info["cmdline"] or []
        if any(word.startswith("nvflare.") for word in words) and any(word.startswith(f"{folder}/") for word in words):
            yield process


if __name__ == "__main__":  # the watchdog: read one process ID per line until end of file, then clean up
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    started = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.append(psutil.Process(int(line)))
    clean_up(started, Path(sys.argv[1]), Path(sys.argv[2]))
