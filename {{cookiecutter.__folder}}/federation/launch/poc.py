"""Run a federation with `--env poc`: server and sites as processes on this machine, with keys and TLS."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import torch
import yaml
from nvflare.tool.poc.poc_commands import get_prod_dir, prepare_poc_provision

from federation.errors import RunError
from federation.launch.display import Follow
from federation.launch.nvflare_log import report_lost_sites, root_cause
from federation.launch.session import COMPLETED, Server
from federation.launch.watchdog import guard
from federation.run import outcome
from federation.run.folder import PROJECT, RunFolder
from federation.site.partition import hosts
from settings import Options

PROVISION = PROJECT / "deploy" / "project.yml"
POC_SERVER = "localhost"  # NVFlare's server listens on the address of its name, so on this machine only
POC_ADMIN = "admin@nvidia.com"  # NVFlare's name for a POC's submitter
POC_TIMEOUT_S = 60.0  # for the server to answer and the sites to connect


def run_poc(run: RunFolder, options: Options, environment: dict[str, str], follow: Follow) -> None:
    """Run the job in a new NVFlare POC. The arguments are those of `simulate`.

    Server and sites have their own keys and certificates and talk over mutual TLS on a free port, so that other POCs
    are not affected. They write only to `federation` in the run's folder, with links from where the simulator would
    write.

    Raises:
        RunError: a site failed, died or did not connect.
        KeyboardInterrupt: passed on after all processes have ended.
    """
    sites = [*hosts(options)]
    gpus = torch.cuda.device_count() if options.gpu else 0
    processes: dict[str, subprocess.Popen[bytes]] = {}
    late: set[str] = set()

    def stop_if_one_died() -> None:
        if died := [name for name, process in processes.items() if process.poll() is not None]:
            raise RunError("; ".join(outcome.death(run, name) for name in died))

    def poll() -> None:
        new = log.read()
        report_lost_sites(new, late)
        follow(new, run.rounds())

    with (
        guard(run) as started,
        run.log.open("a", encoding="utf-8") as stream,
        run.log.open(encoding="utf-8", errors="replace") as log,
    ):
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            kits = provision(run.poc.resolve(), sites)
        for number, name in enumerate(["server", *sites]):
            kit, variables = kits / POC_SERVER, {"OMP_NUM_THREADS": "1"}
            if name in sites:
                kit, variables = kits / name, {"OMP_NUM_THREADS": str(options.threads)}
                if gpus:
                    variables["CUDA_VISIBLE_DEVICES"] = str((number - 1) % gpus)
            processes[name] = _start(kit, stream, {**environment, **variables})
            started(processes[name].pid)
        with contextlib.closing(Server(run, kits / POC_ADMIN, POC_ADMIN, POC_TIMEOUT_S, stop_if_one_died)) as server:
            job_id = server.submit(sites)
            _link(run.server, kits / POC_SERVER / job_id)
            for site in sites:
                _link(run.progress(site).parent, kits / site / job_id)
                _link(run.site_log(site), kits / site / job_id / "log.txt")
            status = server.wait_for_job(job_id, poll)
            if status != COMPLETED:
                died = outcome.first_death(run, sites)
                raise RunError(root_cause(run.workspace) or died or f"NVFlare ended the job with {status}")
            server.collect(job_id)
        shutil.copy(run.server / "log.txt", run.site_log("server"))  # where the simulator writes it


def provision(home: Path, sites: list[str]) -> Path:
    """Create start-up kits with keys according to deploy/project.yml, but for this machine and these sites.

    They are in the new folder `home`, readable only by this user regardless of the umask. Returns the kits' folder.
    """
    project = yaml.safe_load(PROVISION.read_text(encoding="utf-8"))
    client = next(participant for participant in project["participants"] if participant["type"] == "client")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port = probe.getsockname()[1]
    project["participants"] = [
        {"name": POC_SERVER, "type": "server", "org": client["org"], "fed_learn_port": free_port},
        *({**client, "name": site} for site in sites),
        {"name": POC_ADMIN, "type": "admin", "org": client["org"], "role": "project_admin"},
    ]
    home.mkdir(mode=0o700)  # before any key is written
    (home / "poc.yml").write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    prepare_poc_provision([], len(sites), str(home), docker_image="", project_conf_path=str(home / "poc.yml"))
    for path in home.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    return Path(get_prod_dir(str(home), project["name"]))


def _start(kit: Path, stream: IO[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # so that the script's python3 is this one
    return subprocess.Popen(
        ["bash", str(kit / "startup" / "sub_start.sh"), "--once"],
        cwd=kit,  # not the project's folder: a site sees only the job's files
        env={**os.environ, "PATH": path, **environment},
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for job.py, which ends the whole process tree
        umask=0o077,
    )


def _link(link: Path, folder: Path) -> None:
    """Link from where the simulator would write to where the server or a site of a POC writes."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent.resolve()))
