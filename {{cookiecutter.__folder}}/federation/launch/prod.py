"""Run a federation with `--env prod`: on a server and at sites that are already running elsewhere."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from federation.errors import RunError
from federation.launch.display import Follow
from federation.launch.nvflare_log import failed_sites, report_lost_sites, started_rounds
from federation.launch.session import COMPLETED, Server
from federation.protocol import EVALUATION
from federation.run.folder import RunFolder
from settings import Options


def submit(run: RunFolder, options: Options, environment: dict[str, str], follow: Follow) -> None:
    """Run the job on a federation that is running elsewhere. The arguments are those of `simulate`.

    `environment` is not used: server and sites have their own. Only the server's log is available.

    Raises:
        RunError: the server cannot be reached or refuses the job, a site did not connect, or the job failed.
        KeyboardInterrupt: passed on after the job is stopped.
    """
    assert options.startup_kit and options.username
    late: set[str] = set()
    rounds: list[dict[str, Any]] = []  # as the server records them, without metrics; the last one is running

    def poll() -> None:
        new = server.new_log(job_id)
        if new is None:
            return
        with run.log.open("a", encoding="utf-8") as stream:
            stream.write(new)
        report_lost_sites(new, late)
        rounds.extend({"round": number, "metrics": {}, "sites": {}} for number in started_rounds(new))
        follow(new, rounds[:-1])

    with contextlib.closing(Server(run, Path(options.startup_kit), options.username, options.wait)) as server:
        job_id = server.submit(options.site_names)
        try:
            print(f"submitted job {job_id}; press Ctrl-C to stop it", flush=True)
            status = server.wait_for_job(job_id, poll)
        except BaseException:
            with contextlib.suppress(Exception):
                server.session.abort_job(job_id)
            raise
        server.collect(job_id)
    shutil.copy(run.server / "log.txt", run.log)
    # If a site was lost during the job, NVFlare reports a failure even if the server has finished.
    if status != COMPLETED and not (run.server / EVALUATION).exists():
        raise RunError(failed_sites(run.server / "log.txt") or f"NVFlare ended the job with {status}")
