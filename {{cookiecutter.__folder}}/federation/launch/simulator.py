"""Run a federation in NVFlare's simulator on this machine, the default.

NVFlare's simulator has a thread that starts a new interpreter for each client and waits for it, a second at a time.
Here, its server and the hosts, NVFlare's clients, start at once. Where that is safe, they are forks of this process,
which has imported everything: a host is then ready in a moment and shares the memory of the imports.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_constant import FLContextKey, RunnerTask
from nvflare.fuel.f3.communicator import load_comm_drivers
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.fuel.f3.streaming import stream_utils
from nvflare.private.fed.app.simulator import simulator_worker
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from federation.errors import RunError
from federation.launch.display import Follow
from federation.launch.machine import FORKS
from federation.launch.nvflare_log import has_stopped, root_cause
from federation.launch.watchdog import SIGNALS, guard
from federation.protocol import EVALUATION
from federation.run import outcome
from federation.run.folder import PROJECT, RunFolder
from federation.site.partition import hosts
from settings import Options

POLL_S = 0.1  # how often this process looks at the run
FETCH_S = 0.05  # how often a host asks for its next task; at real sites, NVFlare's `task_request_interval`


def simulate(run: RunFolder, options: Options, environment: dict[str, str], follow: Follow) -> None:
    """Run the job in NVFlare's simulator and write its output to the run's log.

    Args:
        run: the run's folder, with the exported job; its path has no whitespace.
        options: the run's options.
        environment: additional environment variables for the server and the hosts.
        follow: called several times a second.

    Raises:
        RunError: a site failed or died.
        KeyboardInterrupt: passed on after all processes have ended.
    """
    names = [*hosts(options)]
    n_gpus = torch.cuda.device_count() if options.gpu else 0
    context: Any = multiprocessing.get_context("fork" if FORKS and not n_gpus else "spawn")
    pipes = {name: context.Pipe() for name in names}  # between the server and each host
    servers_ends = {name: pipe[0] for name, pipe in pipes.items()}
    begin = {"log": run.log, "environment": environment}
    job = {"job": run.job, "workspace": run.workspace, "hosts": servers_ends, "n_gpus": n_gpus}
    server = context.Process(target=_run_server, kwargs={**begin, **job})
    processes = {name: context.Process(target=_run_host, kwargs={**begin, "server": pipes[name][1]}) for name in names}
    run.log.touch()
    gc.freeze()  # or each fork's first garbage collection would touch, and so copy, all shared pages
    with guard(run) as started, run.log.open(encoding="utf-8", errors="replace") as log:
        # Blocked: Python would swallow the exception of a signal that arrives during a fork, in an at-fork callback.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for process in (server, *processes.values()):
            process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for process in (server, *processes.values()):
            started(process.pid)
        while not wait([server.sentinel], timeout=POLL_S):
            follow(log.read(), run.rounds())
            for name, process in processes.items():
                if process.exitcode:  # NVFlare's server would wait for it forever
                    raise RunError(root_cause(run.workspace) or outcome.death(run, name))
            if (run.server / EVALUATION).exists() and has_stopped(run.site_log("server")):
                return
        follow(log.read(), run.rounds())
    if server.exitcode != 0:
        raise RunError(root_cause(run.workspace) or f"the simulator ended with exit code {server.exitcode}")


class _Simulator(SimulatorRunner):
    """NVFlare's simulator, whose clients are hosts that are running already.

    Args:
        hosts: name -> connection to the host.
        n_gpus: number of GPUs, which the hosts share.
        arguments: NVFlare's.
    """

    def __init__(self, hosts: dict[str, Connection], n_gpus: int, **arguments: Any):
        super().__init__(**arguments)
        self.hosts, self.n_gpus = hosts, n_gpus

    def create_clients(self) -> None:
        """Register the clients, and tell each host what NVFlare tells a new interpreter."""
        super().create_clients()
        for number, client in enumerate(self.federated_clients):
            name = client.client_name
            workspace = os.path.join(self.workspace, name)
            arguments = Namespace(
                workspace=workspace,
                logging_config=self.log_config,
                client=name,
                token=client.token,
                port=None,
                gpu=str(number % self.n_gpus) if self.n_gpus else None,
                parent_pid=os.getpid(),
                simulator_root=self.simulator_root,
                root_url=str(client.cell.get_root_url_for_child()),
                parent_url=str(client.cell.get_internal_listener_url()),
                task_name=RunnerTask.TASK_EXEC,
                decomposer_module="",
            )
            deploy_args = Namespace(**{**vars(self.deploy_args), "workspace": workspace})
            build_ctx = {**self.build_ctx, "client_name": name}
            self.hosts[name].send((arguments, deploy_args, build_ctx))

    def client_run(self, *_: Any) -> None:
        """Wait until all hosts are done."""
        for host in self.hosts.values():
            host.recv()


class _Host(simulator_worker.ClientTaskWorker):
    """A client that fetches its tasks until the run is over."""

    def run(self, args: Namespace, conn: Connection) -> None:
        try:
            client = self._create_client(args, args.build_ctx, args.deploy_args)
            self.create_client_engine(client, args.deploy_args)
            self.create_client_runner(client)
            with client.run_manager.new_context() as fl_ctx:
                runner = fl_ctx.get_prop(FLContextKey.RUNNER)
            while not runner.run_abort_signal.triggered:
                with client.run_manager.new_context() as fl_ctx:
                    runner.fetch_and_run_one_task(fl_ctx)
                time.sleep(FETCH_S)
            runner.end_run_events_sequence()
        except Exception:
            logging.getLogger("host").error(f"{args.client}: {traceback.format_exc()}")
            os._exit(1)
        conn.send(args.client)
        os._exit(0)


def _run_server(
    log: Path, environment: dict[str, str], job: Path, workspace: Path, hosts: dict[str, Connection], n_gpus: int
) -> None:
    """Runs in the server's process."""
    _begin(log, environment)
    simulator = _Simulator(
        hosts,
        n_gpus,
        job_folder=str(job),
        workspace=str(workspace),
        clients=",".join(hosts),
        max_clients=len(hosts),
        threads=len(hosts),
        log_config="concise",
    )
    sys.exit(MainProcessMonitor.run(simulator.simulator_run_main, run_dir=simulator.workspace, shutdown_grace_time=0))


def _run_host(log: Path, environment: dict[str, str], server: Connection) -> None:
    """Runs in a host's process: what NVFlare's `simulator_worker` does in a new interpreter."""
    _begin(log, environment)
    os.setsid()  # NVFlare ends the process group when the server is gone
    load_comm_drivers()  # imports them while the server starts
    arguments, arguments.deploy_args, arguments.build_ctx = server.recv()
    custom = os.path.join(arguments.workspace, SimulatorConstants.JOB_NAME, f"app_{arguments.client}", "custom")
    sys.path.insert(0, custom)
    simulator_worker._create_connection = lambda port: server
    simulator_worker.ClientTaskWorker = _Host
    simulator_worker.main(arguments)


def _begin(log: Path, environment: dict[str, str]) -> None:
    """Turn a copy of job.py's process into one that writes to the log and sees only the job's files."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # job.py ends the whole process tree
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not the live display's
    os.environ.update(environment)
    torch.set_num_threads(1)  # site/host.py sets its own number; the server does little
    stream_utils.sid_base = time.time_ns() // 1000  # base of its stream IDs, which must be unique among clients
    # Hide the project's folder and modules: like real sites, server and hosts see only the job's files.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != PROJECT]
    for name, module in list(sys.modules.items()):
        if name.startswith("federation") or Path(getattr(module, "__file__", None) or "/").parent == PROJECT:
            del sys.modules[name]
