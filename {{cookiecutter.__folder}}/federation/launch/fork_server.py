"""Start the simulator's client processes as forks of a process that has imported everything.

NVFlare's simulator starts a new interpreter for each client, or for each task if clients take turns. Each one imports
PyTorch, Lightning and NVFlare again, which takes seconds and accounts for most of a client's memory. A fork has the
imports done and shares their memory. The price: NVFlare's use of `Popen` is replaced. The forks come from a separate
process, the fork server, which starts before any thread does: only then is forking safe.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from nvflare.fuel.f3.streaming import stream_utils
from nvflare.private.fed.app.simulator import simulator_runner, simulator_worker

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def forked_clients() -> Iterator[None]:
    """Make the simulator that this process is about to run fork its clients. Linux only; without CUDA."""
    requests, servers_end = FORK.Pipe()
    FORK.Process(target=_serve, args=(servers_end, requests)).start()
    servers_end.close()
    one_at_a_time = threading.Lock()  # the simulator has a thread for each client

    def fork(command: list[str], env: dict[str, str], **_: Any) -> _Client:
        with one_at_a_time:
            requests.send((command, env))
            return _Client(requests.recv())

    # NVFlare terminates a client, waits, and kills it if that fails.
    simulator_runner.subprocess = SimpleNamespace(Popen=fork, TimeoutExpired=psutil.Error)
    try:
        yield
    finally:
        requests.close()  # ends the fork server, or the simulator's process would wait for it forever


class _Client(psutil.Process):
    """The part of `subprocess.Popen` that NVFlare uses, for a process that is not a child of this one."""

    returncode = 1  # after it has ended; only its parent knows the real one

    def poll(self) -> int | None:
        return None if self.is_running() else self.returncode

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            super().kill()


def _serve(requests: Connection, simulators_end: Connection) -> None:
    """Fork a client for each request and answer with its process ID, until the simulator is gone."""
    simulators_end.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    gc.freeze()  # or each client's first garbage collection would touch, and so copy, all shared pages
    with contextlib.suppress(EOFError):
        while True:
            client = FORK.Process(target=_become_client, args=(requests, *requests.recv()))
            client.start()
            requests.send(client.pid)
    os._exit(0)


def _become_client(requests: Connection, command: list[str], environment: dict[str, str]) -> None:
    """Do what the command `python -m nvflare...simulator_worker ARGUMENT ...` would do."""
    requests.close()
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    stream_utils.sid_base = time.time_ns() // 1000  # base of its stream IDs, which must be unique among clients
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[1:1] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = command[2:]
    arguments = simulator_worker.parse_arguments()
    simulator_worker.mpm.run(main_func=simulator_worker.main, run_dir=arguments.workspace, args=arguments)
