"""Where sites are real: NVFlare's POC on this machine (`--env poc`), or a running federation (`--env prod`).

Both hand the job that the simulator would run to a server, through NVFlare's FLARE API, follow it, and bring what the
server wrote home to where the simulator would have left it: `workspace/server/simulate_job` in the run's folder.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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

PROVISION = PROJECT / "deploy" / "project.yml"
POC_ADMIN = "admin@nvidia.com"  # the name that NVFlare's POC gives to whoever submits
LOGIN_S = 5.0  # for one attempt to reach the server
START_S = 60.0  # for the server of a POC to answer
SITES_S = 60.0  # for the sites of a POC to connect
POLL_S = 1.0
Follow = Callable[[str, list[dict]], None]


def rehearse(job: Path, run: Path, options, follow: Follow) -> None:
    """Run an exported job in an NVFlare POC of its own: a server and sites as processes of this machine.

    They have keys and certificates of their own, talk over mutual TLS, and listen at a free port, so that another
    POC is never in the way nor in danger. All that it writes is in `run/federation`.

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
    log = run / "log.txt"
    address(job, sites)
    session = None
    try:
        with log.open("a", encoding="utf-8") as stream:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                kits = _provision_poc((run / "federation").resolve(), sites)
            processes = {"server": _start(kits / "server", stream, options)}
            for number, site in enumerate(sites):
                processes[site] = _start(kits / site, stream, options, number)
        with log.open(encoding="utf-8", errors="replace") as lines:
            session = _log_in(kits / POC_ADMIN, POC_ADMIN, START_S, processes["server"])
            _await_sites(session, sites, SITES_S)
            job_id = session.submit_job(str(job.resolve()))
            workspace = _lay_out(run, kits, sites, job_id)

            def look(meta: dict) -> None:
                follow(lines.read(), read_rounds(workspace))
                if died := [name for name, process in processes.items() if process.poll() is not None]:
                    raise RunFailed(root_cause(workspace) or f"{', '.join(died)} died: its process is gone")

            status = _watch(session, job_id, look)
            look({})
            if status != "FINISHED:COMPLETED":
                raise RunFailed(root_cause(workspace) or f"NVFlare ended the job with {status}")
            _bring_workspace_home(session, job_id, workspace / SERVER)
    finally:
        if session:
            _close(session)
        end_family(run.resolve() / "federation")


def submit(job: Path, run: Path, options, follow: Follow) -> None:
    """Run an exported job on a federation that is running elsewhere.

    Args:
        job, run, follow: as for `rehearse`; of the log, the server's part is seen.
        options: the command line's; `startup_kit`, `username`, `sites` and `wait` are used.

    Raises:
        RunFailed: the server cannot be reached or refuses, a site never came, or the job failed.
        KeyboardInterrupt: passed on, once the job is stopped.
    """
    address(job, options.sites)
    log, workspace = run / "log.txt", run / "workspace"
    session, job_id, ended = None, None, False
    try:
        session = _log_in(Path(options.startup_kit), options.username, options.wait)
        _await_sites(session, options.sites, options.wait)
        job_id = _submit(session, job)
        print(f"job {job_id} is with the server; Ctrl-C stops it", flush=True)
        seen = 0

        def look(meta: dict) -> None:
            nonlocal seen
            text = _server_log(session, job_id)
            with log.open("a", encoding="utf-8") as stream:
                stream.write(text[seen:])
            follow(text[seen:], _rounds_in(text))
            seen = len(text)

        log.touch()
        status = _watch(session, job_id, look, options.wait)
        ended = True
        _bring_workspace_home(session, job_id, workspace / SERVER)
        if status != "FINISHED:COMPLETED":
            raise RunFailed(_failed_sites(workspace / SERVER / "log.txt") or f"NVFlare ended the job with {status}")
    finally:
        if session:
            if job_id and not ended:
                with contextlib.suppress(Exception):
                    session.abort_job(job_id)
            _close(session)


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


def _start(kit: Path, stream, options, number: int | None = None) -> subprocess.Popen:
    """Start the server, or site `number`, with the script of its start-up kit."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the script's python3 is this one
        "OMP_NUM_THREADS": str(1 if number is None else threads_per_client(options.n_clients)),
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


def _log_in(kit: Path, username: str, patience: float, server: subprocess.Popen | None = None) -> Session:
    """Log in, again and again until `patience` seconds are over or the server's process has ended."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                return new_secure_session(username, str(kit), timeout=LOGIN_S)
        except api_spec.NoConnection as error:
            if server and server.poll() is not None:
                raise RunFailed(f"the server ended with code {server.returncode} at once") from None
            if time.monotonic() > deadline:
                raise RunFailed(f"the server does not answer within {patience:.0f} s: {error}") from None
        except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
            raise RunFailed(f"the server refuses {username}: {error}") from None


def _await_sites(session: Session, sites: list[str], patience: float) -> None:
    """Wait until all sites are connected.

    Raises:
        RunFailed: some did not come; it says which.
    """
    deadline, told = time.monotonic() + patience, False
    while missing := sorted(set(sites) - {client.name for client in session.get_connected_client_list()}):
        if time.monotonic() > deadline:
            raise RunFailed(f"{', '.join(missing)} did not connect within {patience:.0f} s")
        if not told:
            print(f"waiting up to {patience:.0f} s for {', '.join(missing)}", flush=True)
            told = True
        time.sleep(POLL_S)


def _submit(session: Session, job: Path) -> str:
    try:
        return session.submit_job(str(job.resolve()))
    except api_spec.AuthorizationError:
        raise RunFailed(f"{session.username} has no right to submit a job with code of its own") from None


def _watch(session: Session, job_id: str, look: Callable[[dict], None], patience: float = 0.0) -> str:
    """Look at a job about once a second until it has ended, and return its status.

    A server that does not answer for `patience` seconds is given up.
    """
    lost_since = None
    while True:
        try:
            meta = session.get_job_meta(job_id)
            look(meta)
            lost_since = None
            if meta["status"].startswith("FINISHED"):
                return meta["status"]
        except api_spec.NoConnection:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > patience:
                raise RunFailed(f"the server is lost: no answer for {patience:.0f} s") from None
        time.sleep(POLL_S)


def _server_log(session: Session, job_id: str) -> str:
    return session.get_job_logs(job_id, "server")["logs"].get("server", "")


def _failed_sites(log: Path) -> str:
    """What a server's log tells of sites that failed. The reasons are in their own logs, and do not leave them."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    failed = set(re.findall(r"[Rr]esult from (\S+) (?:is bad|at round)", text))
    lost = set(re.findall(r"Client (\S+) is deemed disconnected", text))
    return "; ".join(
        [f"{site} failed: its own log says why" for site in sorted(failed)]
        + [f"{site} was lost" for site in sorted(lost - failed)]
    )


def _rounds_in(log: str) -> list[dict]:
    """What a server's log tells of its rounds: the same records as NVFlare's, but without metrics."""
    return [{"round": int(number), "aggregated_metrics": []} for number in re.findall(r"Round (\d+) started", log)[:-1]]


def _bring_workspace_home(session: Session, job_id: str, target: Path) -> None:
    """Put what the server wrote for a job to `target`."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        downloaded = Path(session.download_job_result(job_id))
    if target.is_symlink():
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(downloaded / "workspace", target)
    shutil.rmtree(downloaded)


def _close(session: Session) -> None:
    with contextlib.suppress(Exception):
        session.close()
