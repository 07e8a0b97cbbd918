"""Where a federation runs with `--env poc`: server and sites as processes of this machine, with certificates and TLS.

They get the job that the simulator would run. What they write is linked to, and at the end brought home to, where the
simulator would have left it, in the run's `workspace`.
"""

import argparse
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
from federation.launch.options import PROJECT
from federation.launch.prod import SiteNews, address
from federation.launch.session import COMPLETED, Server, log_to
from federation.launch.simulator import threads_per_client
from federation.launch.watchdog import POC_FOLDER, guard
from federation.run.workspace import SERVER, Follow, read_rounds, root_cause

PROVISION = PROJECT / "deploy" / "project.yml"
POC_SERVER = "localhost"  # NVFlare's server listens where its name leads to: to this machine, and to nobody else
POC_ADMIN = "admin@nvidia.com"  # the name that NVFlare's POC gives to whoever submits
POC_WAIT_S = 60.0  # for its server to answer and its sites to connect


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
        RunError: a site failed, died or never came.
        KeyboardInterrupt: passed on, once no process is left.
    """
    sites = [f"site-{i}" for i in range(1, options.n_clients + 1)]
    address(job, sites)
    log = log_to(run)
    with guard(run) as started:
        with log.open("a", encoding="utf-8") as stream:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                kits = provision((run / POC_FOLDER).resolve(), sites)
            processes = {"server": _start(kits / POC_SERVER, stream, options)}
            started(processes["server"].pid)
            for number, site in enumerate(sites):
                processes[site] = _start(kits / site, stream, options, number)
                started(processes[site].pid)

        def stop_if_one_died() -> None:
            if died := [name for name, process in processes.items() if process.poll() is not None]:
                raise RunError(f"{', '.join(died)} died: its process is gone")

        with contextlib.closing(Server(kits / POC_ADMIN, POC_ADMIN, POC_WAIT_S, stop_if_one_died)) as server:
            server.await_sites(sites)
            job_id = server.submit(job)
            workspace = _lay_out(run, kits, sites, job_id)
            with log.open(encoding="utf-8", errors="replace") as lines:
                tell_of_sites = SiteNews()

                def look() -> None:
                    new = lines.read()
                    tell_of_sites(new)
                    follow(new, read_rounds(workspace))

                status = server.watch(job_id, look)
            if status != COMPLETED:
                raise RunError(root_cause(workspace) or f"NVFlare ended the job with {status}")
            server.bring_home(job_id, workspace / SERVER)
        shutil.copy(workspace / SERVER / "log.txt", workspace / "server")  # where the simulator writes it


def provision(home: Path, sites: list[str]) -> Path:
    """Make keys, certificates and start-up kits as deploy/project.yml says, but for this machine and these sites.

    They are in the new folder `home`, for nobody but this user to read, whatever the umask. Returns the kits' folder.
    """
    project = yaml.safe_load(PROVISION.read_text(encoding="utf-8"))
    client = next(participant for participant in project["participants"] if participant["type"] == "client")
    project["participants"] = [
        {"name": POC_SERVER, "type": "server", "org": client["org"], "fed_learn_port": _free_port()},
        *({**client, "name": site} for site in sites),
        {"name": POC_ADMIN, "type": "admin", "org": client["org"], "role": "project_admin"},
    ]
    home.mkdir(mode=0o700)  # before there is a key in it
    project_file = home / "poc.yml"
    project_file.write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    prepare_poc_provision([], len(sites), str(home), docker_image="", project_conf_path=str(project_file))
    for path in home.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
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
        start_new_session=True,  # Ctrl-C is for job.py, which ends the whole process tree
        umask=0o077,
    )


def _lay_out(run: Path, kits: Path, sites: list[str], job_id: str) -> Path:
    """Link what server and sites write to where the simulator would write it."""
    workspace = run / "workspace"
    (workspace / SERVER).parent.mkdir(parents=True)
    links = {workspace / SERVER: kits / POC_SERVER / job_id}
    links |= {workspace / site: kits / site / job_id for site in sites}
    for link, folder in links.items():
        link.symlink_to(os.path.relpath(folder, link.parent.resolve()))
    return workspace
