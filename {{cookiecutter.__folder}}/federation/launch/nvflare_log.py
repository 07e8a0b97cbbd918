"""Parse NVFlare's logs: the only module that depends on their wording, that of NVFlare 2.9."""

import re
from pathlib import Path

from federation.protocol import BACK, LATE

CONTINUES = "continuing without it\n  (the job needs more than half of its sites)"
DISCONNECTED = r"Client (?P<disconnected>\S+) is deemed disconnected"
RECONNECTED = r"Client (?P<reconnected>\S+) is reconnected"
TIMED_OUT = LATE.replace("{}", r"(?P<late>\S+)").replace("{:.0f}", r"\d+")  # these two: from the heartbeat monitor
RECOVERED = BACK.replace("{}", r"(?P<back>\S+)")
SITE_EVENTS = "|".join([DISCONNECTED, RECONNECTED, TIMED_OUT, RECOVERED])


def report_lost_sites(text: str, late: set[str]) -> None:
    """Print which sites were lost or are back.

    Args:
        text: the new part of the server's log since the last call.
        late: sites that the heartbeat monitor reported as late; updated. NVFlare keeps reporting them as lost and back.
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
    """The rounds that have started, according to a server's log."""
    return [int(number) for number in re.findall(r"Round (\d+) started", text)]


def has_stopped(server_log: Path) -> bool:
    """Whether the server's workflows have ended and its components know. After that, NVFlare's simulator only waits."""
    return "Server runner finished" in _text(server_log)


def failed_sites(server_log: Path) -> str:
    """The sites that failed, according to a server's log. The reasons are only in their own logs, which stay there."""
    text = _text(server_log)
    failed = set(re.findall(r"[Rr]esult from (\S+) (?:is bad|at round)", text))
    reasons = [f"{site} failed: see its own log" for site in sorted(failed)]
    return "; ".join(reasons + [f"{site} was lost" for site in sorted(set(re.findall(DISCONNECTED, text)) - failed)])


def root_cause(workspace: Path, folder: str = "*") -> str:
    """The first error at any site of a run: the exception, its line in the project, and the call stack.

    Empty if there is none, or only the error with which the server ended the run.

    Args:
        workspace: NVFlare's.
        folder: the folders in it whose `log.txt` is read.
    """
    errors = []
    for log in workspace.glob(f"{folder}/log.txt"):
        for time, prefix, traceback, error in re.findall(
            r"^(\d{4}-\S+ \S+) (.*)Traceback .*:\n((?:[ \t].*\n|\n)+)(\S.*)\n", _text(log), re.MULTILINE
        ):
            if "RunError" in error:
                continue
            frames = re.findall(r'File ".*/custom/(.*)", line (\d+), in (\S+)\n *(.*)', traceback)
            frames = [frame for frame in frames if frame[0] != "federation/site/host.py"] or frames
            where = "".join(f"\n  {file}, line {line}, in {name}: {code}" for file, line, name, code in frames)
            place = " ({}, line {})".format(*frames[-1][:2]) if frames else ""
            site = re.search(r" ([\w.-]+): $", prefix)  # from site/host.py
            who = site[1] if site else log.parent.name
            errors.append((log.parent.name == "server", time, f"{who} failed: {error}{place}{where}"))
    return min(errors)[2] if errors else ""  # the server fails only after its sites


def commands(audit_log: Path) -> list[tuple[str, str, str]]:
    """The time, user and topic of each command of an administrator at a site, according to the site's `audit.log`."""
    return re.findall(r"\[T:(\S+ [\d:]+)\S*\]\[U:([^]]+)\]\[A:([^]]+)\]", _text(audit_log))


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
