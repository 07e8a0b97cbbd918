"""Run a federation in NVFlare's simulator on this machine, the default."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

from federation.errors import RunError
from federation.launch.display import Follow
from federation.launch.fork_server import forked_clients
from federation.launch.machine import FORKS
from federation.launch.nvflare_log import dead_client, has_stopped, root_cause
from federation.launch.watchdog import SIGNALS, guard
from federation.protocol import EVALUATION
from federation.run import outcome
from federation.run.folder import PROJECT, RunFolder
from federation.site.partition import hosts
from settings import Options

POLL_S = 0.2


def simulate(run: RunFolder, options: Options, environment: dict[str, str], follow: Follow) -> None:
    """Run the job in NVFlare's simulator and write its output to the run's log.

    Args:
        run: the run's folder, with the exported job; its path has no whitespace.
        options: the run's options.
        environment: additional environment variables for the server and the sites.
        follow: called at least about once a second.

    Raises:
        RunError: a site failed or died.
        KeyboardInterrupt: passed on after all processes have ended.
    """
    clients = [*hosts(options)]
    n_gpus = min(torch.cuda.device_count(), len(clients)) if options.gpu else 0
    if 1 < n_gpus < len(clients):  # NVFlare would run those that share one of several GPUs in turns
        n_gpus = 1
    forked = FORKS and not n_gpus
    arguments = {
        "job_folder": str(run.job),
        "workspace": str(run.workspace),
        "clients": ",".join(clients),
        "n_clients": len(clients),
        "max_clients": len(clients),
        "threads": len(clients),
        "gpu": ",".join(map(str, range(n_gpus))) or None,
        "log_config": "concise",
    }
    environment = {**environment, "OMP_NUM_THREADS": str(options.threads)}
    context: Any = multiprocessing.get_context("fork" if FORKS else "spawn")
    simulator = context.Process(target=_run_simulator, args=(arguments, run.log, forked, environment))
    run.log.touch()
    running = True
    with guard(run) as started, run.log.open(encoding="utf-8", errors="replace") as log:
        # Blocked: Python would swallow the exception of a signal that arrives during a fork, in an at-fork callback.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        simulator.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        started(simulator.pid)
        while running:
            running = simulator.is_alive()
            follow(log.read(), run.rounds())
            if died := dead_client(run.workspace / "server" / "error_log.txt"):
                raise RunError(root_cause(run.workspace) or outcome.death(run, died))
            if (run.server / EVALUATION).exists() and has_stopped(run.site_log("server")):
                return
            simulator.join(POLL_S)
    if simulator.exitcode != 0:
        raise RunError(root_cause(run.workspace) or f"the simulator ended with exit code {simulator.exitcode}")


def _run_simulator(arguments: dict[str, Any], log: Path, forked: bool, environment: dict[str, str]) -> None:
    """Runs in the simulator's process."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # job.py ends the whole process tree
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not the live display's
    os.environ.update(environment)  # for the clients, which inherit it
    torch.set_num_threads(1)  # the server does little: leave the cores to the clients
    if FORKS:
        multiprocessing.set_start_method("fork", force=True)
    # Hide the project's folder and modules: like real sites, server and clients see only the job's files.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != PROJECT]
    for name, module in list(sys.modules.items()):
        if name.startswith("federation") or Path(getattr(module, "__file__", None) or "/").parent == PROJECT:
            del sys.modules[name]
    with forked_clients() if forked else contextlib.nullcontext():
        sys.exit(SimulatorRunner(**arguments).run())
