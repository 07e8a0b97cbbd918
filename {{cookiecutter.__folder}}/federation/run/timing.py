"""Where a run's time went, from the phases that the server and the sites record in their progress files."""

from itertools import pairwise
from pathlib import Path

from federation.protocol import DONE, PROGRESS, STARTING, TRAINING, WAITING, read_json_lines
from federation.run.folder import RunFolder

KINDS = ("start", "computing", "evaluating", "waiting")
KIND_OF = {STARTING: "start", TRAINING: "computing", WAITING: "waiting"}  # any other phase: evaluating


def phases(run: RunFolder) -> dict[str, list[tuple[float, float, str]]]:
    """What every site was doing throughout a run.

    Returns:
        site -> (start, end, kind), without gaps, in seconds from the server's start to its end; a kind is one of
        `KINDS`. Empty if the records of the server or of a site are incomplete.
    """
    server = _announced(run.server / PROGRESS)
    names = {file.parents[1].name for file in run.workspace.glob(f"*/*/{PROGRESS}")} - {"server"}
    sites = {site: _announced(run.progress(site)) for site in sorted(names, key=lambda name: (len(name), name))}
    if not server:
        return {}
    first, last = server[0][0], server[-1][0]
    if server[-1][1] != DONE:
        last = max(time for announced in (server, *sites.values()) for time, _ in announced)
    found = {}
    for site, announced in sites.items():
        begins = [(0.0, "start")]
        for time, phase in announced:
            kind = KIND_OF.get(phase, "evaluating")
            if kind != begins[-1][1]:
                begins.append((round(min(max(time, first), last) - first, 3), kind))  # clocks may differ
        if begins[-1][1] != "waiting":  # a complete record ends with waiting for the other sites
            return {}
        begins.append((round(last - first, 3), ""))
        found[site] = [(start, end, kind) for (start, kind), (end, _) in pairwise(begins)]
    return found


def totals(found: dict[str, list[tuple[float, float, str]]]) -> dict[str, dict[str, float]] | None:
    """Site -> kind -> seconds; None if `phases` found nothing."""
    sums = {
        site: {kind: round(sum(end - start for start, end, k in spans if k == kind), 3) for kind in KINDS}
        for site, spans in found.items()
    }
    return sums or None


def _announced(file: Path) -> list[tuple[float, str]]:
    return [(record["time"], record["phase"]) for record in read_json_lines(file) if "phase" in record]
