"""Where a run's time went, as the sites' logs tell: NVFlare puts the time before each line that client.py prints."""

import re
from datetime import datetime
from pathlib import Path

KINDS = ("start", "computing", "evaluating", "waiting")
BEGINS = {  # what a site does from this line of its log on
    "ClientTaskWorker started to run": "start",  # NVFlare's; its imports and the data follow
    "--- train new model ---": "computing",
    "--- validate global model ---": "evaluating",
    "--- evaluate global model ---": "evaluating",
    "--- test new model ---": "evaluating",
    "--- prediction with new model ---": "evaluating",
    "--- wait for the server ---": "waiting",
}
LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (.*)", re.MULTILINE)


def phases(workspace: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Follow every site through a run.

    Args:
        workspace: the run's, with a folder for the server and one for each site, and a log.txt in each.

    Returns:
        site -> (start, end, kind), in seconds after the server's first line, without gaps up to its last line; a kind
        is one of `KINDS`. Empty where a log is missing or does not say.
    """
    server = _lines(workspace / "server" / "log.txt")
    if not server:
        return {}
    first, last = server[0][0], server[-1][0]
    found = {}
    for log in sorted(workspace.glob("*/log.txt"), key=lambda log: (len(log.parent.name), log.parent.name)):
        if log.parent.name == "server":
            continue
        begins = [(first, "start")]
        for time, text in _lines(log):
            kind = next((kind for mark, kind in BEGINS.items() if text.endswith(mark)), None)
            if kind and kind != begins[-1][1]:
                begins.append((min(max(time, first), last), kind))
        if begins[-1][1] != "waiting":  # a site's last act is to wait for the others
            return {}
        ends = [time for time, _ in begins[1:]] + [last]
        found[log.parent.name] = [
            ((begin - first).total_seconds(), (end - first).total_seconds(), kind)
            for (begin, kind), end in zip(begins, ends, strict=True)
        ]
    return found


def totals(found: dict[str, list[tuple[float, float, str]]]) -> dict[str, dict[str, float]] | None:
    """Site -> kind -> seconds; None where `phases` found nothing."""
    sums = {
        site: {kind: round(sum(end - start for start, end, k in spans if k == kind), 3) for kind in KINDS}
        for site, spans in found.items()
    }
    return sums or None


def _lines(log: Path) -> list[tuple[datetime, str]]:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [(datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f"), line.rstrip()) for time, line in LINE.findall(text)]
