"""Start the simulator's client processes as forks of one that has imported everything.

NVFlare's simulator starts a new interpreter for each client (and, where clients take turns, for each of their tasks),
and each of them imports PyTorch, Lightning and NVFlare again: seconds of computing, and most of a client's memory.
A fork begins with all that done and shares its memory. The price: NVFlare's use of `Popen` is replaced.

The forks come from a process of their own, the nursery. It is made before there are threads: only then is a fork safe.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
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
    """Have the simulator that this process is going to run fork its clients. Linux only; without CUDA."""
    orders, nursery = FORK.Pipe()
    FORK.Process(target=_nursery, args=(nursery, orders)).start()
    nursery.close()
    one_at_a_time = threading.Lock()  # the simulator has a thread for each client

    def fork(command: list[str], env: dict[str, str], **_: Any) -> _Client:
        with one_at_a_time:
            orders.send((command, env))
            return _Client(orders.recv())

    simulator_runner.subprocess = SimpleNamespace(Popen=fork, TimeoutExpired=subprocess.TimeoutExpired)
    try:
        yield
    finally:
        orders.close()  # the nursery ends, or the simulator's process would wait for it for ever


class _Client:
    """What NVFlare uses of `subprocess.Popen`, for a process that is another one's child."""

    returncode = None

    def __init__(self, pid: int):
        self.process = psutil.Process(pid)

    def poll(self) -> int | None:
        if not self.process.is_running():
            self.returncode = 1  # only its parent could know
        return self.returncode

    def wait(self, timeout: float) -> None:
        try:
            self.process.wait(timeout)
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired(str(self.process), timeout) from None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            self.process.send_signal(number)
        except psutil.NoSuchProcess:
            raise ProcessLookupError from None


def _nursery(nursery: Connection, orders: Connection) -> None:
    """Fork a client for each order and answer with its process id, until the simulator is gone."""
    orders.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a client that has ended leaves no zombie
    gc.freeze()  # else each client's first collection would touch, and so copy, the pages of all that it shares
    while True:
        try:
            order = nursery.recv()
        except EOFError:
            os._exit(0)
        client = FORK.Process(target=_become_client, args=(nursery, *order))
        client.start()
        nursery.send(client.pid)


def _become_client(nursery: Connection, command: list[str], environment: dict[str, str]) -> None:
    """Do what `python -m nvflare...simulator_worker ARGUMENT ...`, the command, does."""
    nursery.close()
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    stream_utils.sid_base = time.time_ns() // 1000  # its streams count from here: no two clients may share a number
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[1:1] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = command[2:]
    arguments = simulator_worker.parse_arguments()
    simulator_worker.mpm.run(main_func=simulator_worker.main, run_dir=arguments.workspace, args=arguments)
