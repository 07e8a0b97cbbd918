"""A session with the server of a POC or of real sites, through NVFlare's FLARE API."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from federation.errors import RunError
from federation.protocol import write_json
from federation.run.folder import RunFolder

LOGIN_TIMEOUT_S = 5.0  # for one attempt to reach the server
POLL_S = 1.0
COMPLETED = "FINISHED:COMPLETED"
CONNECTION_ERRORS = (api_spec.NoConnection, api_spec.NoReply, api_spec.SessionClosed, api_spec.SessionExpired)


class Server:
    """A session with the server; it logs in again where the connection was lost. NVFlare's words go to the run's log.

    Args:
        run: the run's folder, with the exported job.
        kit: the submitter's start-up kit.
        username: who that is.
        patience: how long to wait, in seconds, for a server that does not answer and for sites that are not there.
        check: called while waiting; raises where there is nothing left to wait for.

    Raises:
        RunError: no answer in that time, or the server refuses.
    """

    def __init__(
        self, run: RunFolder, kit: Path, username: str, patience: float, check: Callable[[], None] = lambda: None
    ):
        self.run, self.kit, self.username, self.patience, self.check = run, kit, username, patience, check
        self.session: Session = None  # until it has logged in
        self.reconnected, self.may_see_log = False, True
        self.log_position = 0  # in bytes
        logging.getLogger().addHandler(logging.FileHandler(run.log))
        for _ in self._attempts():
            with contextlib.suppress(api_spec.NoConnection):
                return self._log_in()
        why = f"it does not run, cannot be reached, or does not know the start-up kit {kit}"
        raise RunError(f"no connection to the server within {patience:.0f} s: {why}")

    def _attempts(self) -> Iterator[bool]:
        """Yield about once a second until patience is over: True the first time."""
        deadline = time.monotonic() + self.patience
        yield True
        self.check()
        while time.monotonic() <= deadline:
            time.sleep(POLL_S)
            yield False
            self.check()

    def _log_in(self) -> None:
        try:
            with contextlib.redirect_stdout(None):  # "Connecting to FLARE ..."
                self.session = new_secure_session(self.username, str(self.kit), timeout=LOGIN_TIMEOUT_S)
        except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
            raise RunError(f"the server refuses {self.username}: {error}") from None

    def ask(self, command: str, *arguments: Any) -> Any:
        """Call a method of the session; where the server does not answer, wait for it and call again."""
        for first in self._attempts():
            try:
                if not first:
                    self.reconnected = True
                    self.close()
                    self._log_in()
                return getattr(self.session, command)(*arguments)
            except CONNECTION_ERRORS as error:
                reason = str(error)
            if first:
                print(f"the server does not answer; waiting up to {self.patience:.0f} s", flush=True)
        raise RunError(f"the server is lost: no answer for {self.patience:.0f} s ({reason})")

    def submit(self, sites: list[str]) -> str:
        """Hand over the run's job once all of its sites are connected, and return its ID.

        Raises:
            RunError: some did not come, and it says which; or the user may not submit it.
        """
        set_target_sites(self.run.job, sites)
        names, limit = "", f"{self.patience:.0f} s"
        for first in self._attempts():
            names = ", ".join(sorted(set(sites) - {client.name for client in self.ask("get_connected_client_list")}))
            if not names:
                break
            if first:
                print(f"waiting up to {limit} for {names}", flush=True)
        else:
            raise RunError(f"{names} did not connect within {limit}")
        try:
            return self.session.submit_job(str(self.run.job.resolve()))
        except api_spec.AuthorizationError:
            raise RunError(f"{self.username} has no right to submit a job with code of its own") from None

    def wait_for_job(self, job_id: str, poll: Callable[[], None]) -> str:
        """Call `poll` about once a second until the job has ended, and return its status.

        Raises:
            RunError: the server was restarted. NVFlare then keeps the job's status, but runs it no more.
        """
        started = self.ask("get_system_info").server_info.start_time
        while True:
            status = self.ask("get_job_meta", job_id)["status"]
            poll()
            if self.reconnected and self.ask("get_system_info").server_info.start_time != started:
                raise RunError(f"the server was restarted, which ended the job {job_id}: submit it again")
            self.reconnected = False
            if status.startswith("FINISHED"):
                return status
            self.check()
            time.sleep(POLL_S)

    def new_log(self, job_id: str) -> str | None:
        """What the server's log of a job has got since the last call, in whole lines.

        None for who may not see it: by NVFlare's rules, all but a project_admin and leads of the server's organization.
        """
        # NVFlare's get_job_logs sends 5 MiB each time, and never more than the last 5 MiB. Its tail_target refuses a +.
        command = f"tail server -c +{self.log_position + 1} {job_id}/log.txt"
        try:
            text = Session._get_string_data(self.ask("_do_command", command, False))
        except api_spec.AuthorizationError:
            if self.may_see_log:
                print(f"{self.username} may not see the server's log: the rounds show at the end", flush=True)
            self.may_see_log = False
            return None
        except (api_spec.InternalError, RuntimeError):  # such as a character of which half is written
            return ""
        if text.startswith("tail: "):  # before the job runs, and after it
            return ""
        text = text[: text.rfind("\n") + 1]
        self.log_position += len(text.encode())
        return text

    def collect(self, job_id: str) -> None:
        """Download what the server wrote for a job to where the simulator would have left it."""
        with contextlib.redirect_stdout(None):
            downloaded = Path(self.ask("download_job_result", job_id))
        self.run.server.unlink(missing_ok=True)  # a POC's is a link while it runs
        self.run.server.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(downloaded / "workspace", self.run.server)
        shutil.rmtree(downloaded)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.session.close()


def set_target_sites(job: Path, sites: list[str]) -> None:
    """Send an exported job to these sites and no others, and continue without one while more than half are there.

    NVFlare's recipe sends it to whoever is connected, and chooses among them at random.
    """
    meta = json.loads((job / "meta.json").read_text(encoding="utf-8"))
    meta["deploy_map"] = {app: ["server", *sites] for app in meta["deploy_map"]}
    meta["min_clients"] = len(sites) // 2 + 1
    write_json(job / "meta.json", meta, indent=4)
