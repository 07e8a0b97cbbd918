"""What NVFlare's logs say: the only module that relies on their wording, which is that of NVFlare 2.9."""

import re
from pathlib import Path

from federation.protocol import BACK, LATE

CONTINUES = "the job continues without it, while more than half of the sites are left"
DISCONNECTED = r"Client (?P<disconnected>\S+) is deemed disconnected"
RECONNECTED = r"Client (?P<reconnected>\S+) is reconnected"
TIMED_OUT = LATE.replace("{}", r"(?P<late>\S+)").replace("{:.0f}", r"\d+")  # this and the next: the heartbeat monitor's
RECOVERED = BACK.replace("{}", r"(?P<back>\S+)")
SITE_EVENTS = "|".join([DISCONNECTED, RECONNECTED, TIMED_OUT, RECOVERED])


def report_lost_sites(text: str, late: set[str]) -> None:
    """Print which sites are lost or back.

    Args:
        text: what the server's log has got since the last call.
        late: those that the heartbeat monitor gave up, kept here; NVFlare calls them lost and back all the time.
    """
    for found in re.finditer(SITE_EVENTS, text):
        kind = found.lastgroup or ""
        site = found[kind]
        if kind == "late":
            late.add(site)
            print(f"{found[0]}; {CONTINUES}", flush=True)
        elif kind == "disconnected" and site not in late:
            print(f"{site} is lost: it does not answer; {CONTINUES}", flush=True)
        elif kind == "back" or (kind == "reconnected" and site not in late):
            late.discard(site)
            print(f"{site} is back", flush=True)


def started_rounds(text: str) -> list[int]:
    """The rounds that have started, by a server's log."""
    return [int(number) for number in re.findall(r"Round (\d+) started", text)]


def has_stopped(server_log: Path) -> bool:
    """Whether the workflows on the server are over. What NVFlare's simulator does after that is to wait, for 4 s."""
    return "Server app stopped" in _text(server_log)


def dead_client(error_log: Path) -> str | None:
    """A simulated client whose process has vanished: NVFlare's server notes it, and waits forever."""
    found = re.search(r"(?:Subprocess died for|Communication error with) client ([^\s:,]+)", _text(error_log))
    return found[1] if found else None


def failed_sites(server_log: Path) -> str:
    """The sites that failed, by a server's log. The reasons are in their own logs, which do not leave them."""
    text = _text(server_log)
    failed = set(re.findall(r"[Rr]esult from (\S+) (?:is bad|at round)", text))
    reasons = [f"{site} failed: its own log says why" for site in sorted(failed)]
    return "; ".join(reasons + [f"{site} was lost" for site in sorted(set(re.findall(DISCONNECTED, text)) - failed)])


def root_cause(workspace: Path) -> str:
    """The error that came first at any site of a run: the exception, its line in the project, and how it came there.

    Empty if there is none, or only that with which the server ended the run.
    """
    errors = []
    for log in workspace.glob("*/log.txt"):
        for time, traceback, error in re.findall(
            r"^(\d{4}-\S+ \S+) .*Traceback .*:\n((?:[ \t].*\n|\n)+)(\S.*)\n", _text(log), re.MULTILINE
        ):
            if "RunError" in error:
                continue
            frames = re.findall(r'File ".*/custom/(.*)", line (\d+), in (\S+)\n *(.*)', traceback)
            where = "".join(f"\n  {file}, line {line}, in {name}: {code}" for file, line, name, code in frames)
            place = " ({}, line {})".format(*frames[-1][:2]) if frames else ""
            errors.append((log.parent.name == "server", time, f"{log.parent.name} failed: {error}{place}{where}"))
    return min(errors)[2] if errors else ""  # the server only fails after its sites


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
