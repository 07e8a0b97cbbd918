"""Where a federation runs, by default: NVFlare's simulator, on this machine. Start it, follow it, end it."""

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

from federation.errors import RunError
from federation.launch.fork_server import forked_clients
from federation.launch.options import PROJECT
from federation.launch.watchdog import SIGNALS, guard
from federation.protocol import EVALUATION
from federation.run.workspace import SERVER, Follow, read_rounds, root_cause

FORKS = sys.platform == "linux"  # elsewhere a fork is not safe, nor is one that goes on to use CUDA
FORKED_MEMORY, STARTED_MEMORY = 0.5e9, 1.2e9  # bytes for one client process: 0.2 and 1.1 GB were seen, with LitNet
POLL_S = 0.2


def simultaneous_clients(n_clients: int, forked: bool) -> int:
    """How many client processes fit into the memory that is free; the others wait for their turn."""
    memory = FORKED_MEMORY if forked else STARTED_MEMORY
    return max(1, min(n_clients, int(psutil.virtual_memory().available / memory)))


def threads_per_client(n_simultaneous: int) -> int:
    """The machine's cores shared out. Uncapped, every client would take all of them and run three times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // n_simultaneous)


def simulate(job: Path, run: Path, options: argparse.Namespace, follow: Follow) -> None:
    """Run an exported job in NVFlare's simulator, with its output in `run/log.txt`.

    Args:
        job: the folder of the exported job.
        run: the run's folder; its path has no white space.
        options: the command line's; `n_clients`, `n_threads`, `algorithm` and `gpu` are used.
        follow: called a few times a second with what the log has got since, and the records of all rounds so far.

    Raises:
        RunError: a site failed, died or did not report.
        KeyboardInterrupt: passed on, once no process is left.
    """
    workspace, log = run / "workspace", run / "log.txt"
    gpus = None
    if options.gpu and torch.cuda.is_available():
        gpus = ",".join(str(i) for i in range(min(torch.cuda.device_count(), options.n_clients)))
    forked = FORKS and not gpus
    at_once = min(options.n_threads or simultaneous_clients(options.n_clients, forked), options.n_clients)
    if at_once < options.n_clients:
        why = "--n_threads asks for" if options.n_threads else "the free memory allows"
        if options.algorithm == "scaffold":  # each would forget its control variate
            raise RunError(f"SCAFFOLD needs all {options.n_clients} sites at once, and {why} {at_once} at a time")
        print(f"{options.n_clients} sites run {at_once} at a time, as {why}: each starts anew for each of its tasks")
    # The clients inherit it. The same bits need the same number, so that a user may set it.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_client(at_once)))
    context: Any = multiprocessing.get_context("fork" if FORKS else "spawn")
    simulator = context.Process(
        target=_run_simulator, args=(str(job), str(workspace), str(log), options.n_clients, at_once, gpus, forked)
    )
    log.touch()
    with guard(run) as started, log.open(encoding="utf-8", errors="replace") as lines:
        # Held back meanwhile: a signal that comes in the middle of a fork ends in one of Python's callbacks, unheard.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        simulator.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        started(simulator.pid)
        while True:
            running = simulator.is_alive()
            follow(lines.read(), read_rounds(workspace))
            if died := _dead_client(workspace):
                raise RunError(root_cause(workspace) or f"{died} died: its process is gone")
            if _has_finished(workspace):
                return
            if not running:
                break
            simulator.join(POLL_S)
    if simulator.exitcode != 0:
        raise RunError(root_cause(workspace) or f"the simulator ended with code {simulator.exitcode}")


def _run_simulator(
    job: str, workspace: str, log: str, n_clients: int, at_once: int, gpus: str | None, forked: bool
) -> None:
    """The body of the simulator's process."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # job.py ends the whole process tree
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not the live display's
    if FORKS:
        multiprocessing.set_start_method("fork", force=True)
    # Without the project's folder and modules, server and clients see the job's files alone, as real sites do.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != PROJECT]
    for name, module in list(sys.modules.items()):
        own = Path(getattr(module, "__file__", None) or "/").parent == PROJECT
        if own or name.split(".")[0] == "federation":
            del sys.modules[name]
    simulator = SimulatorRunner(
        job_folder=job,
        workspace=workspace,
        n_clients=n_clients,
        threads=at_once,
        gpu=gpus,
        log_config="concise",
        max_clients=n_clients,
    )
    with forked_clients() if forked else contextlib.nullcontext():
        sys.exit(simulator.run())


def _has_finished(workspace: Path) -> bool:
    """All results are written. What NVFlare's simulator does after that is to wait, for some 4 seconds."""
    log = workspace / "server" / "log.txt"
    if not (workspace / SERVER / EVALUATION).exists():
        return False
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        return b"Server app stopped" in stream.read()


def _dead_client(workspace: Path) -> str | None:
    """A client whose process has vanished: NVFlare's server notes it and waits for ever."""
    log = workspace / "server" / "error_log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = re.search(r"(?:Subprocess died for|Communication error with) client ([^\s:,]+)", text)
    return found[1] if found else None
