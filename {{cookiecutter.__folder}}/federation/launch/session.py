"""A session with the server of a POC or of real sites, using NVFlare's FLARE API."""

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

LOGIN_TIMEOUT_S = 5.0  # for one attempt
POLL_S = 1.0
COMPLETED = "FINISHED:COMPLETED"
CONNECTION_ERRORS = (api_spec.NoConnection, api_spec.NoReply, api_spec.SessionClosed, api_spec.SessionExpired)


class Server:
    """A session with the server that logs in again after a lost connection. NVFlare's output goes to the run's log.

    Args:
        run: the run's folder, with the exported job.
        kit: the submitter's start-up kit.
        username: the submitter's name.
        patience: how long to wait, in seconds, for a server that does not answer or for sites that are not connected.
        check: called while waiting; raises if there is nothing left to wait for.

    Raises:
        RunError: no answer in that time, or the server refuses the login.
    """

    def __init__(
        self, run: RunFolder, kit: Path, username: str, patience: float, check: Callable[[], None] = lambda: None
    ):
        self.run, self.kit, self.username, self.patience, self.check = run, kit, username, patience, check
        self.session: Session = None  # until logged in
        self.reconnected, self.may_see_log = False, True
        self.log_position = 0  # in bytes
        logging.getLogger().addHandler(logging.FileHandler(run.log))
        for _ in self._attempts():
            with contextlib.suppress(api_spec.NoConnection):
                return self._log_in()
        why = f"it is down, cannot be reached, or does not know the start-up kit {kit}"
        raise RunError(f"no connection to the server within {patience:.0f} s: {why}")

    def _attempts(self) -> Iterator[bool]:
        """Yield about once a second until `patience` is over: True the first time, then False."""
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
        """Call a method of the session; if the server does not answer, wait and retry."""
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
        raise RunError(f"lost the connection to the server: no answer for {self.patience:.0f} s ({reason})")

    def submit(self, sites: list[str]) -> str:
        """Submit the run's job once all of its sites are connected, and return its ID.

        Raises:
            RunError: some sites, which it names, did not connect, or the user may not submit the job.
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
            raise RunError(f"{self.username} has no right to submit a job with custom code") from None

    def wait_for_job(self, job_id: str, poll: Callable[[], None]) -> str:
        """Call `poll` about once a second until the job has ended, and return its status.

        Raises:
            RunError: the server was restarted. NVFlare then keeps the job's status but no longer runs the job.
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
        """The new lines of the server's log of a job since the last call.

        None if the user may not read it: NVFlare allows only a project_admin and leads of the server's organization.
        """
        # NVFlare's get_job_logs sends the last 5 MiB every time and nothing before. Its tail_target rejects a +.
        command = f"tail server -c +{self.log_position + 1} {job_id}/log.txt"
        try:
            text = Session._get_string_data(self.ask("_do_command", command, False))
        except api_spec.AuthorizationError:
            if self.may_see_log:
                print(f"{self.username} may not read the server's log: rounds are shown at the end", flush=True)
            self.may_see_log = False
            return None
        except (api_spec.InternalError, RuntimeError):  # such as a partially written character
            return ""
        if text.startswith("tail: "):  # before and after the job
            return ""
        text = text[: text.rfind("\n") + 1]
        self.log_position += len(text.encode())
        return text

    def collect(self, job_id: str) -> None:
        """Download the server's files of a job to where the simulator would have left them."""
        with contextlib.redirect_stdout(None):
            downloaded = Path(self.ask("download_job_result", job_id))
        self.run.server.unlink(missing_ok=True)  # during a POC, this is a link
        self.run.server.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(downloaded / "workspace", self.run.server)
        shutil.rmtree(downloaded)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.session.close()


def set_target_sites(job: Path, sites: list[str]) -> None:
    """Make an exported job run at exactly these sites and continue as long as more than half of them are connected.

    NVFlare's recipe sends it to whichever sites are connected and chooses among them at random.
    """
    meta = json.loads((job / "meta.json").read_text(encoding="utf-8"))
    meta["deploy_map"] = {app: ["server", *sites] for app in meta["deploy_map"]}
    meta["min_clients"] = len(sites) // 2 + 1
    write_json(job / "meta.json", meta, indent=4)
