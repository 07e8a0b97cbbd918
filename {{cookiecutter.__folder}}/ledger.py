"""Verify a site's own ledger and print what left the site: `python ledger.py FILE`; FILE may be a folder of ledgers."""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import json
import sys
from pathlib import Path
from typing import Any

import click

from federation.errors import UserError, exit_code
from federation.launch.options import Command, read_arguments
from federation.protocol import DP
from federation.site.budget import spent
from federation.site.ledger import digest, read
from results import print_table

UNIQUE = ("time", "round", "previous", DP)  # not compared when equal answers share a row
LIMITS = """
The ledger lists the answers to all tasks, and which curves were sent to a tracker. It does not list NVFlare's other
messages, such as heartbeats, nor what administrators read at this site. A job's code runs as the user who owns this
file: the chain shows a later change only to those who have noted a hash elsewhere, or if the file is append-only."""


def page(file: Path) -> None:
    """Print a ledger: one table per job, one row per kind of answer.

    Raises:
        UserError: there is no such file, or its chain is broken.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: expected a ledger, or a folder of ledgers")
    records = read(file)
    last = digest(file.read_bytes().splitlines()[-1]) if records else "none"
    print(f"{file}: {len(records):,} answers, chain intact; hash of the last line:\n{last}")
    lists: dict[str, str] = {}  # the tensors of an answer -> their label
    jobs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        kind = json.dumps({key: value for key, value in record.items() if key not in UNIQUE})
        jobs.setdefault(f"{record['job']} {record['code']}", {}).setdefault(kind, []).append(record)
    for kinds in jobs.values():
        rows = [["task", "rounds", "answers", "tensors", "bytes", "metrics", "also", "curves"]]
        for answers in kinds.values():
            first, end = answers[0], answers[-1]
            rounds = [record["round"] + 1 for record in answers if record["round"] is not None]
            tensors = "none"
            if first["tensors"]:
                label = lists.setdefault(json.dumps(first["tensors"]), f"list {len(lists) + 1}")
                tensors = f"{len(first['tensors'])} ({label})"
            rows.append(
                [
                    first["task"],
                    "-" if not rounds else f"{min(rounds)}" if len(rounds) == 1 else f"{min(rounds)}-{max(rounds)}",
                    f"{len(answers):,}",
                    tensors,
                    f"{sum(tensor['bytes'] for record in answers for tensor in record['tensors']):,}",
                    *(", ".join(first[key]) or "none" for key in ("metrics", "meta", "curves")),
                ]
            )
        who = first["submitter"] or "this machine"
        print_table(f"Job {first['job']} of {who}, until {end['time']}, code {first['code']}", rows)
    for text, label in lists.items():
        sizes = [[t["name"], str(t["shape"]), t["dtype"], f"{t['bytes']:,}"] for t in json.loads(text)]
        print_table(f"Tensors, {label}", [["name", "shape", "type", "bytes"], *sizes])
    if spent(records) is None:
        print("\nWeights have left this site without differential privacy.")
    elif plans := [record[DP] for record in records if record[DP]]:
        of_all = f"ε = {plans[-1]['epsilon']:.2f} at δ = {plans[-1]['delta']:.1e}"
        limit = ", but simulated: no guarantee" if any(plan["seeded"] for plan in plans) else ""
        print(f"\nDifferential privacy of single images in all weights that have left: {of_all}{limit}.")


def main() -> None:
    flags: list[click.Parameter] = [click.Argument(["files"], nargs=-1, required=True, metavar="FILE")]
    purpose = "Verify a site's own ledger and print what left the site. FILE may be a folder of ledgers."
    given = map(Path, read_arguments(Command("ledger.py", params=flags, help=purpose)).params["files"])
    files = [file for path in given for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    for file in files:
        page(file)
    print(LIMITS)


if __name__ == "__main__":
    sys.exit(exit_code("ledger.py", main))
