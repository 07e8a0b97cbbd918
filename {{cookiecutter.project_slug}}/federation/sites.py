"""Where sites are real: NVFlare's POC on this machine (`--env poc`), or a running federation (`--env prod`).

Both hand the job that the simulator would run to a server, through NVFlare's FLARE API, follow it, and bring what the
server wrote home to where the simulator would have left it: `workspace/server/simulate_job` in the run's folder.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.tool.poc.poc_commands import get_prod_dir, prepare_poc_provision

from federation.environments import (
    PROJECT,
    SERVER,
    RunFailed,
    end_family,
    read_rounds,
    root_cause,
    threads_per_client,
)
from federation.evaluation import REPORT

PROVISION = PROJECT / "deploy" / "project.yml"
POC_ADMIN = "admin@nvidia.com"  # the name that NVFlare's POC gives to whoever submits
POC_WAIT_S = 60.0  # for its server to answer and its sites to connect
LOGIN_S = 5.0  # for one attempt to reach the server
POLL_S = 1.0
COMPLETED = "FINISHED:COMPLETED"
LOST = (api_spec.NoConnection, api_spec.NoReply, api_spec.SessionClosed, api_spec.SessionExpired)
Follow = Callable[[str, list[dict[str, Any]]], None]


def rehearse(job: Path, run: Path, options: argparse.Namespace, follow: Follow) -> None:
    """Run an exported job in an NVFlare POC of its own: a server and sites as processes of this machine.

    They have keys and certificates of their own, talk over mutual TLS, and meet at a free port, so that another POC
    is neither in the way nor in danger. All that they write is in `run/federation`.

    Args:
        job: the folder of the exported job.
        run: the run's folder; its path has no white space.
        options: the command line's; `n_clients` and `gpu` are used.
        follow: called about once a second with what the log has got since, and the records of all rounds so far.

    Raises:
        RunFailed: a site failed, died or never came.
        KeyboardInterrupt: passed on, once no process is left.
    """
    sites = [f"site-{i}" for i in range(1, options.n_clients + 1)]
    address(job, sites)
    log = _log_to(run)
    server = None
    try:
        with log.open("a", encoding="utf-8") as stream:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                kits = _provision_poc((run / "federation").resolve(), sites)
            processes = {"server": _start(kits / "server", stream, options)}
            for number, site in enumerate(sites):
                processes[site] = _start(kits / site, stream, options, number)

        def stop_if_one_died() -> None:
            if died := [name for name, process in processes.items() if process.poll() is not None]:
                raise RunFailed(f"{', '.join(died)} died: its process is gone")

        server = Server(kits / POC_ADMIN, POC_ADMIN, POC_WAIT_S, stop_if_one_died)
        server.await_sites(sites)
        job_id = server.submit(job)
        workspace = _lay_out(run, kits, sites, job_id)
        with log.open(encoding="utf-8", errors="replace") as lines:
            status = server.watch(job_id, lambda: follow(lines.read(), read_rounds(workspace)))
        if status != COMPLETED:
            raise RunFailed(root_cause(workspace) or f"NVFlare ended the job with {status}")
        server.bring_home(job_id, workspace / SERVER)
        shutil.copy(workspace / SERVER / "log.txt", workspace / "server")  # where the simulator writes it
    finally:
        if server:
            server.close()
        end_family(run.resolve() / "federation")


def submit(job: Path, run: Path, options: argparse.Namespace, follow: Follow) -> None:
    """Run an exported job on a federation that is running elsewhere.

    Args:
        job, run, follow: as for `rehearse`; of the log, the server's part is seen.
        options: the command line's; `startup_kit`, `username`, `sites` and `wait` are used.

    Raises:
        RunFailed: the server cannot be reached or refuses, a site never came, or the job failed.
        KeyboardInterrupt: passed on, once the job is stopped.
    """
    address(job, options.sites)
    log = _log_to(run)
    target = run / "workspace" / SERVER
    server = Server(Path(options.startup_kit), options.username, options.wait)
    running = None
    try:
        server.await_sites(options.sites)
        job_id = running = server.submit(job)
        print(f"the server has the job, {running}; Ctrl-C stops it", flush=True)
        seen, told = 0, False

        def look() -> None:
            nonlocal seen, told
            text = server.log(job_id)
            if text is None:
                if not told:
                    print(f"{options.username} may not see the server's log: the rounds show at the end", flush=True)
                    told = True
                return
            with log.open("a", encoding="utf-8") as stream:
                stream.write(text[seen:])
            for site in re.findall(r"Client (\S+) is deemed disconnected", text[seen:]):
                print(f"{site} is lost: it does not answer; the job goes on while more than half are left", flush=True)
            for site in re.findall(r"Client (\S+) is reconnected", text[seen:]):
                print(f"{site} is back", flush=True)
            follow(text[seen:], _rounds_in(text))
            seen = len(text)

        status = server.watch(job_id, look)
        running = None
        server.bring_home(job_id, target)
        shutil.copy(target / "log.txt", log)
        # Where a site was lost on the way, NVFlare calls the job failed, even if the server has done all of it.
        if status != COMPLETED and not (target / REPORT).exists():
            raise RunFailed(_failed_sites(target / "log.txt") or f"NVFlare ended the job with {status}")
    finally:
        if running:
            with contextlib.suppress(Exception):
                server.session.abort_job(running)
        server.close()


def address(job: Path, sites: list[str]) -> None:
    """Send an exported job to these sites and no others, and go on without one while more than half are there.

    NVFlare's recipe sends it to whoever is connected, and chooses among them at random.
    """
    meta = json.loads((job / "meta.json").read_text(encoding="utf-8"))
    meta["deploy_map"] = {app: ["server", *sites] for app in meta["deploy_map"]}
    meta["min_clients"] = len(sites) // 2 + 1
    (job / "meta.json").write_text(json.dumps(meta, indent=4), encoding="utf-8")


# ---- a POC


def _provision_poc(home: Path, sites: list[str]) -> Path:
    """Make keys, certificates and start-up kits as deploy/project.yml says, but for this machine and these sites."""
    project = yaml.safe_load(PROVISION.read_text(encoding="utf-8"))
    client = next(participant for participant in project["participants"] if participant["type"] == "client")
    project["participants"] = [
        {"name": "server", "type": "server", "org": client["org"], "fed_learn_port": _free_port()},
        *({**client, "name": site} for site in sites),
        {"name": POC_ADMIN, "type": "admin", "org": client["org"], "role": "project_admin"},
    ]
    home.mkdir()
    project_file = home / "poc.yml"
    project_file.write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    prepare_poc_provision([], len(sites), str(home), docker_image="", project_conf_path=str(project_file))
    return Path(get_prod_dir(str(home), project["name"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(
    kit: Path, stream: IO[str], options: argparse.Namespace, number: int | None = None
) -> subprocess.Popen[bytes]:
    """Start the server, or site `number`, with the script of its start-up kit."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the script's python3 is this one
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")
        or str(1 if number is None else threads_per_client(options.n_clients)),
    }
    if number is not None and options.gpu and torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    return subprocess.Popen(
        ["bash", str(kit / "startup" / "sub_start.sh"), "--once"],
        cwd=kit,  # not the project's folder: a site sees the job's files alone
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for job.py, which ends the whole family
    )


def _lay_out(run: Path, kits: Path, sites: list[str], job_id: str) -> Path:
    """Link what server and sites write to where the simulator would write it."""
    workspace = run / "workspace"
    (workspace / SERVER).parent.mkdir(parents=True)
    links = {workspace / SERVER: kits / "server" / job_id}
    links |= {workspace / site: kits / site / job_id for site in sites}
    for link, folder in links.items():
        link.symlink_to(os.path.relpath(folder, link.parent.resolve()))
    return workspace


# ---- the server, through NVFlare's FLARE API


class Server:
    """A session with the server; it logs in again where the connection was lost.

    Args:
        kit: the submitter's start-up kit.
        username: who that is.
        patience: how long to wait, in seconds, for a server that does not answer and for sites that are not there.
        check: called while waiting; raises where there is nothing left to wait for.

    Raises:
        RunFailed: no answer in that time, or the server refuses.
    """

    def __init__(self, kit: Path, username: str, patience: float, check: Callable[[], None] = lambda: None):
        self.kit, self.username, self.patience, self.check = kit, username, patience, check
        self.session: Session = None  # until it has logged in
        self.was_away = False
        deadline = time.monotonic() + patience
        while not self._log_in():
            check()
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"no connection to the server within {patience:.0f} s: it does not run, cannot be reached, "
                    f"or does not know the start-up kit {kit}"
                )

    def _log_in(self) -> bool:
        try:
            with contextlib.redirect_stdout(None):  # "Connecting to FLARE ..."
                self.session = new_secure_session(self.username, str(self.kit), timeout=LOGIN_S)
            return True
        except api_spec.NoConnection:
            return False
        except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
            raise RunFailed(f"the server refuses {self.username}: {error}") from None

    def ask(self, command: str, *arguments: str) -> Any:
        """Call a method of the session; where the server does not answer, wait for it and call again."""
        deadline, told = time.monotonic() + self.patience, False
        while True:
            try:
                return getattr(self.session, command)(*arguments)
            except LOST as error:
                self.check()
                if time.monotonic() > deadline:
                    raise RunFailed(f"the server is lost: no answer for {self.patience:.0f} s ({error})") from None
                if not told:
                    print(f"the server does not answer; waiting up to {self.patience:.0f} s", flush=True)
                    told = self.was_away = True
                time.sleep(POLL_S)
                self.close()
                self._log_in()

    def await_sites(self, sites: list[str]) -> None:
        """Wait until all sites are connected.

        Raises:
            RunFailed: some did not come; it says which.
        """
        deadline, told = time.monotonic() + self.patience, False
        while missing := sorted(set(sites) - {client.name for client in self.ask("get_connected_client_list")}):
            self.check()
            if time.monotonic() > deadline:
                raise RunFailed(f"{', '.join(missing)} did not connect within {self.patience:.0f} s")
            if not told and self.patience > POLL_S:
                print(f"waiting up to {self.patience:.0f} s for {', '.join(missing)}", flush=True)
                told = True
            time.sleep(POLL_S)

    def submit(self, job: Path) -> str:
        """Hand over an exported job and return its ID."""
        try:
            return self.session.submit_job(str(job.resolve()))
        except api_spec.AuthorizationError:
            raise RunFailed(f"{self.username} has no right to submit a job with code of its own") from None

    def watch(self, job_id: str, look: Callable[[], None]) -> str:
        """Call `look` about once a second until the job has ended, and return its status.

        Raises:
            RunFailed: the server was started anew. NVFlare then keeps the job's status, but runs it no more.
        """
        started = self.ask("get_system_info").server_info.start_time
        while True:
            status = self.ask("get_job_meta", job_id)["status"]
            look()
            if self.was_away and self.ask("get_system_info").server_info.start_time != started:
                raise RunFailed(f"the server was started anew, which ended the job {job_id}: submit it again")
            self.was_away = False
            if status.startswith("FINISHED"):
                return status
            self.check()
            time.sleep(POLL_S)

    def log(self, job_id: str) -> str | None:
        """The server's log of a job, so far. None for who may not see it: by NVFlare's rules, all but project_admin."""
        try:
            return self.ask("get_job_logs", job_id, "server")["logs"].get("server", "")
        except api_spec.AuthorizationError:
            return None

    def bring_home(self, job_id: str, target: Path) -> None:
        """Put what the server wrote for a job to `target`."""
        with contextlib.redirect_stdout(None):
            downloaded = Path(self.ask("download_job_result", job_id))
        if target.is_symlink():  # while it ran
            target.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(downloaded / "workspace", target)
        shutil.rmtree(downloaded)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.session.close()


def _log_to(run: Path) -> Path:
    """The run's log; what NVFlare's API has to say goes there and not to the screen."""
    log = run / "log.txt"
    logging.getLogger().addHandler(logging.FileHandler(log))
    return log


def _failed_sites(log: Path) -> str:
    """What a server's log tells of sites that failed. The reasons are in their own logs, and do not leave them."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    failed = set(re.findall(r"[Rr]esult from (\S+) (?:is bad|at round)", text))
    lost = set(re.findall(r"Client (\S+) is deemed disconnected", text))
    return "; ".join(
        [f"{site} failed: its own log says why" for site in sorted(failed)]
        + [f"{site} was lost" for site in sorted(lost - failed)]
    )


def _rounds_in(log: str) -> list[dict[str, Any]]:
    """What a server's log tells of its rounds: the same records as NVFlare's, but without metrics."""
    return [{"round": int(number), "aggregated_metrics": []} for number in re.findall(r"Round (\d+) started", log)[:-1]]
