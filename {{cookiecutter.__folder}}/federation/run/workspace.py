"""What server and sites write while they work on a run, in its `workspace` folder, and what it tells."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation.protocol import ROUNDS, read_json_lines

SERVER = Path("server", "simulate_job")  # the server's own results, within the workspace
# Called a few times a second: with what the log has got since, and the records of all rounds so far.
Follow = Callable[[str, list[dict[str, Any]]], None]


def read_rounds(workspace: Path) -> list[dict[str, Any]]:
    """The records of the rounds so far, as federation/server/evaluation.py describes them."""
    return read_json_lines(workspace / SERVER / ROUNDS)


def root_cause(workspace: Path) -> str:
    """The error that came first at any site: the exception and the line of the project's file, then the lines that led
    there. Empty if there is none, or only that with which the server ended the run.
    """
    errors = []
    for log in workspace.glob("*/log.txt"):
        text = log.read_text(encoding="utf-8", errors="replace")
        for time, traceback, error in re.findall(
            r"^(\d{4}-\S+ \S+) .*Traceback .*:\n((?:[ \t].*\n|\n)+)(\S.*)\n", text, re.MULTILINE
        ):
            if "RunError" in error:
                continue
            frames = re.findall(r'File ".*/custom/(.*)", line (\d+), in (\S+)\n *(.*)', traceback)
            where = "".join(f"\n  {file}, line {line}, in {name}: {code}" for file, line, name, code in frames)
            place = " ({}, line {})".format(*frames[-1][:2]) if frames else ""
            errors.append((log.parent.name == "server", time, f"{log.parent.name} failed: {error}{place}{where}"))
    return min(errors)[2] if errors else ""  # the server only fails after its sites
