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

from federation.errors import RunError
from federation.launch.session import COMPLETED, Server, log_to
from federation.protocol import BACK, EVALUATION, LATE
from federation.run.workspace import SERVER, Follow

WITHOUT = "the job goes on without it, while more than half of the sites are left"
NEWS = re.compile(
    "|".join(
        [
            LATE.replace("{}", r"(?P<late>\S+)", 1).replace("{:.0f}", r"\d+"),
            BACK.replace("{}", r"(?P<again>\S+)"),
            r"Client (?P<lost>\S+) is deemed disconnected",
            r"Client (?P<back>\S+) is reconnected",
        ]
    )
)


def submit(job: Path, run: Path, options: argparse.Namespace, follow: Follow) -> None:
    """Run an exported job on a federation that is running elsewhere.

    Args:
        job, run, follow: as for `simulate`; of the log, the server's part is seen.
        options: the command line's; `startup_kit`, `username`, `sites` and `wait` are used.

    Raises:
        RunError: the server cannot be reached or refuses, a site never came, or the job failed.
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
        seen, told, tell_of_sites = 0, False, SiteNews()
        rounds: list[dict[str, Any]] = []  # as the server records them, but without metrics; the last one is running

        def look() -> None:
            nonlocal seen, told
            new = server.log(job_id, seen)
            if new is None:
                if not told:
                    print(f"{options.username} may not see the server's log: the rounds show at the end", flush=True)
                    told = True
                return
            seen += len(new.encode())
            with log.open("a", encoding="utf-8") as stream:
                stream.write(new)
            tell_of_sites(new)
            started = re.findall(r"Round (\d+) started", new)
            rounds.extend({"round": int(number), "metrics": {}, "sites": {}} for number in started)
            follow(new, rounds[:-1])

        status = server.watch(job_id, look)
        running = None
        server.bring_home(job_id, target)
        shutil.copy(target / "log.txt", log)
        # Where a site was lost on the way, NVFlare calls the job failed, even if the server has done all of it.
        if status != COMPLETED and not (target / EVALUATION).exists():
            raise RunError(_failed_sites(target / "log.txt") or f"NVFlare ended the job with {status}")
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


class SiteNews:
    """Prints which sites the server gives up or has back, by its log: called with what the log has got since."""

    def __init__(self) -> None:
        self.late: set[str] = set()  # NVFlare calls them disconnected and reconnected all the time

    def __call__(self, log: str) -> None:
        for found in NEWS.finditer(log):
            kind, site = found.lastgroup, found[found.lastgroup or 0]
            if kind == "late":
                self.late.add(site)
                print(f"{found[0]}; {WITHOUT}", flush=True)
            elif kind == "lost" and site not in self.late:
                print(f"{site} is lost: it does not answer; {WITHOUT}", flush=True)
            elif kind == "again" or (kind == "back" and site not in self.late):
                self.late.discard(site)
                print(f"{site} is back", flush=True)


def _failed_sites(log: Path) -> str:
    """What a server's log tells of sites that failed. The reasons are in their own logs, and do not leave them."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    failed = set(re.findall(r"[Rr]esult from (\S+) (?:is bad|at round)", text))
    lost = set(re.findall(r"Client (\S+) is deemed disconnected", text))
    return "; ".join(
        [f"{site} failed: its own log says why" for site in sorted(failed)]
        + [f"{site} was lost" for site in sorted(lost - failed)]
    )
