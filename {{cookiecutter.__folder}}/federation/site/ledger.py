"""The site's own ledger: what left this site, written at the site before it leaves.

One line of JSON per answer to a task, kept across jobs. Each line has the hash of the line before it, so that changing,
removing or inserting a line breaks the chain. It has names, types and sizes, never values. `python ledger.py` verifies
and prints it.
"""

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.protocol import LEDGER_VARIABLE, finite

START = "0" * 64  # the first line's hash of the line before it


def place(workspace: Path, site: str, data_root: str | None) -> Path:
    """The ledger's file: `<site>.jsonl` in the folder `FL_LEDGER`, by default `ledger` in the site's NVFlare workspace.

    Raises:
        UserError: it would be among the site's images.
    """
    file = Path(os.environ.get(LEDGER_VARIABLE) or workspace / "ledger").resolve() / f"{site}.jsonl"
    if data_root and Path(data_root).resolve() in file.parents:
        raise UserError(f"the ledger {file} is inside the data folder {data_root}: set {LEDGER_VARIABLE}")
    return file


def append(file: Path, record: dict[str, Any], durable: bool) -> None:
    """Add a record with the time and the hash of the line before it.

    Args:
        file: the ledger, created if necessary. Several jobs may write to it at the same time.
        record: its content.
        durable: whether to wait until the line would survive a power failure.

    Raises:
        UserError: the last line is incomplete.
        OSError: the line cannot be written; the file is as before.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(file, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        written = stream.readall()
        if written and not written.endswith(b"\n"):
            raise UserError(f"the last line of the ledger {file} is incomplete: keep it under another name")
        before = digest(written[:-1].rpartition(b"\n")[2]) if written else START
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps(finite({"time": now, **record, "previous": before}), allow_nan=False).encode() + b"\n"
        try:
            if stream.write(line) < len(line):
                raise OSError(f"{file}: no space left for a line of the ledger")
            if durable:
                os.fsync(stream.fileno())
        except OSError:
            stream.truncate(len(written))
            raise


def read(file: Path) -> list[dict[str, Any]]:
    """All records of a ledger whose chain is intact; empty if there is no file.

    Raises:
        UserError: the chain is broken, and at which line.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    records, before = [], START
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            intact = record["previous"] == before
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise UserError(f"{file}, line {number}: the chain is broken: this line or one before it was changed")
        records.append(record)
        before = digest(line)
    if lines[-1]:
        raise UserError(f"{file}, line {len(lines)}: the line is incomplete")
    return records


def digest(line: bytes) -> str:
    """A line's hash: SHA-256 of its bytes, without the line break."""
    return hashlib.sha256(line).hexdigest()


def code_hash(app: Path) -> str:
    """SHA-256 of all files that a job brought: code, configuration, options, initial weights.

    For the folder `app` of an exported job, it is what this command prints, in a POSIX shell with coreutils:
    `cd app && find * -type f ! -name '*.pyc' | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    """
    names = sorted(path.relative_to(app).as_posix() for path in app.rglob("*") if path.is_file())
    visible = [name for name in names if not name.startswith(".") and not name.endswith(".pyc")]  # . : signatures
    lines = (f"{hashlib.sha256((app / name).read_bytes()).hexdigest()}  {name}\n" for name in visible)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
