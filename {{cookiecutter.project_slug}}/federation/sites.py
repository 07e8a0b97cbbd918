"""Where a federation runs with `--env prod`: on a server and at sites that are running elsewhere.

They get the job that the simulator would run; what the server wrote is brought home to where the simulator would have
left it, in the run's `workspace`.
"""

import argparse
import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from federation.evaluation import REPORT
from federation.server import COMPLETED, Server, log_to
from federation.workspace import SERVER, Follow, RunFailed


def submit(job: Path, run: Path, options: argparse.Namespace, follow: Follow) -> None:
    """Run an exported job on a federation that is running elsewhere.

    Args:
        job, run, follow: as for `simulate`; of the log, the server's part is seen.
        options: the command line's; `startup_kit`, `username`, `sites` and `wait` are used.

    Raises:
        RunFailed: the server cannot be reached or refuses, a site never came, or the job failed.
        KeyboardInterrupt: passed on, once the job is stopped.
    """
    address(job, options.sites)
    log = log_to(run)
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
