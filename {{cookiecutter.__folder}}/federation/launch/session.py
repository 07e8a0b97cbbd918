"""A session with the server of a POC or of real sites, through NVFlare's FLARE API."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from federation.errors import RunError

LOGIN_S = 5.0  # for one attempt to reach the server
POLL_S = 1.0
COMPLETED = "FINISHED:COMPLETED"
LOST = (api_spec.NoConnection, api_spec.NoReply, api_spec.SessionClosed, api_spec.SessionExpired)


class Server:
    """A session with the server; it logs in again where the connection was lost.

    Args:
        kit: the submitter's start-up kit.
        username: who that is.
        patience: how long to wait, in seconds, for a server that does not answer and for sites that are not there.
        check: called while waiting; raises where there is nothing left to wait for.

    Raises:
        RunError: no answer in that time, or the server refuses.
    """

    def __init__(self, kit: Path, username: str, patience: float, check: Callable[[], None] = lambda: None):
        self.kit, self.username, self.patience, self.check = kit, username, patience, check
        self.session: Session = None  # until it has logged in
        self.was_away = False
        deadline = time.monotonic() + patience
        while not self._log_in():
            check()
            if time.monotonic() > deadline:
                raise RunError(
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
            raise RunError(f"the server refuses {self.username}: {error}") from None

    def ask(self, command: str, *arguments: Any) -> Any:
        """Call a method of the session; where the server does not answer, wait for it and call again."""
        deadline, told = time.monotonic() + self.patience, False
        while True:
            try:
                return getattr(self.session, command)(*arguments)
            except LOST as error:
                self.check()
                if time.monotonic() > deadline:
                    raise RunError(f"the server is lost: no answer for {self.patience:.0f} s ({error})") from None
                if not told:
                    print(f"the server does not answer; waiting up to {self.patience:.0f} s", flush=True)
                    told = self.was_away = True
                time.sleep(POLL_S)
                self.close()
                self._log_in()

    def await_sites(self, sites: list[str]) -> None:
        """Wait until all sites are connected.

        Raises:
            RunError: some did not come; it says which.
        """
        deadline, told = time.monotonic() + self.patience, False
        while missing := sorted(set(sites) - {client.name for client in self.ask("get_connected_client_list")}):
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"{', '.join(missing)} did not connect within {self.patience:.0f} s")
            if not told and self.patience > POLL_S:
                print(f"waiting up to {self.patience:.0f} s for {', '.join(missing)}", flush=True)
                told = True
            time.sleep(POLL_S)

    def submit(self, job: Path) -> str:
        """Hand over an exported job and return its ID."""
        try:
            return self.session.submit_job(str(job.resolve()))
        except api_spec.AuthorizationError:
            raise RunError(f"{self.username} has no right to submit a job with code of its own") from None

    def watch(self, job_id: str, look: Callable[[], None]) -> str:
        """Call `look` about once a second until the job has ended, and return its status.

        Raises:
            RunError: the server was started anew. NVFlare then keeps the job's status, but runs it no more.
        """
        started = self.ask("get_system_info").server_info.start_time
        while True:
            status = self.ask("get_job_meta", job_id)["status"]
            look()
            if self.was_away and self.ask("get_system_info").server_info.start_time != started:
                raise RunError(f"the server was started anew, which ended the job {job_id}: submit it again")
            self.was_away = False
            if status.startswith("FINISHED"):
                return status
            self.check()
            time.sleep(POLL_S)

    def log(self, job_id: str, seen: int) -> str | None:
        """What the server's log of a job has got after its first `seen` bytes, in whole lines.

        None for who may not see it: by NVFlare's rules, all but a project_admin and leads of the server's organization.
        """
        # NVFlare's get_job_logs sends 5 MiB each time, and never more than the last 5 MiB. Its tail_target refuses a +.
        try:
            reply = self.ask("_do_command", f"tail server -c +{seen + 1} {job_id}/log.txt", False)
        except api_spec.AuthorizationError:
            return None
        except (api_spec.InternalError, RuntimeError):  # such as a character of which half is written
            return ""
        text = self.session._get_string_data(reply)
        return "" if text.startswith("tail: ") else text[: text.rfind("\n") + 1]  # before the job runs, and after it

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


def log_to(run: Path) -> Path:
    """The run's log; what NVFlare's API has to say goes there and not to the screen."""
    log = run / "log.txt"
    logging.getLogger().addHandler(logging.FileHandler(log))
    return log
