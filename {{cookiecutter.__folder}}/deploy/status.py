"""What does this site do? `python deploy/status.py WORKSPACE`: which jobs ran and run here, what they sent, what to do.

For the site's own staff: it reads the site's workspace, which is the startup kit's folder unless NVFL_WORKSPACE is set,
and looks at this machine's processes. It needs no server and sends nothing.
"""

import argparse
import contextlib
import io
import json
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import psutil  # noqa: E402

from deploy import healthy  # noqa: E402
from federation.errors import UserError, exit_code  # noqa: E402
from federation.launch.nvflare_log import commands, root_cause  # noqa: E402
from federation.protocol import EVALUATING, PROGRESS, TRAINING, WAITING, read_json_lines  # noqa: E402
from federation.site.ledger import place, read  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser("status.py", description="Show what this site does and did. Needs no server.")
    parser.add_argument("workspace", type=Path, help="the startup kit's folder, or NVFL_WORKSPACE")
    workspace = parser.parse_args().workspace.resolve()
    try:
        config = json.loads((workspace / "startup" / "fed_client.json").read_text(encoding="utf-8"))
        name = config["client"]["fqsn"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{workspace} is not a site's workspace ({error!r}): expected a folder with startup/") from None
    processes = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    running = any("client_train" in words and str(workspace) in words for words in processes)
    todo = f"start the site with {workspace}/startup/start.sh"
    print(f"{name}: {'running' if running else 'not running'}", end="")
    if running:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            connected = healthy.main(workspace) == 0
        print(", connected" if connected else f", but {said.getvalue().strip()}")
        todo = "nothing: this site is ready for jobs"
        if not connected:
            todo = f"find out why with python deploy/doctor.py --startup_kit {workspace} --data_root DIR"
    else:
        print()

    jobs = []
    for file in workspace.glob("*/meta.json"):
        with contextlib.suppress(OSError, ValueError):
            jobs.append((json.loads(file.read_text(encoding="utf-8")), file.parent))
    jobs.sort(key=lambda job: job[0].get("submit_time", 0))
    for meta, folder in jobs:
        busy = any(folder.name in words for words in processes)
        print(f"\njob {folder.name}, submitted by {meta.get('submitter_name')} at {as_time(meta.get('submit_time'))}")
        for line in describe(workspace, folder, busy):
            print(f"  {line}")
        if busy:
            todo = "nothing: a job is running"
    if jobs and not busy and root_cause(workspace, jobs[-1][1].name):
        todo = f"read {jobs[-1][1]}/log.txt; {todo}"

    ledger = place(workspace, name, None)
    try:
        print(f"\nledger {ledger}: {len(read(ledger))} records, chain intact")
    except UserError as error:
        print(f"\nledger: {error}")
        todo = f"find out who changed the ledger; {todo}"

    asked = Counter((user, topic) for _, user, topic in commands(workspace / "audit.log"))
    print("\nadministrators' commands here:" if asked else "\nno administrator's command was executed here")
    for (user, topic), times in sorted(asked.items()):
        print(f"  {user}: {topic}{' (read files or listed folders)' if topic == 'sys.shell' else ''}, {times} x")
    print(f"\nto do: {todo}")
    return 0


def describe(workspace: Path, folder: Path, busy: bool) -> list[str]:
    """Lines about a job: its state, and the answers it sent.

    Args:
        workspace: of the site.
        folder: the job's, in it.
        busy: whether the job has a process.
    """
    records = read_json_lines(folder / PROGRESS)
    phases = [(record["phase"], record["time"]) for record in records if "phase" in record]
    tasks, task = [], ""
    for phase, _ in phases:
        task = phase if phase in (TRAINING, EVALUATING) else task
        if phase == WAITING:  # the task is over
            tasks.append(task)
            task = ""
    if busy:
        state = f"running; {phases[-1][0]} since {as_time(phases[-1][1])}" if phases else "running; about to start"
    elif error := root_cause(workspace, folder.name):
        state = error.splitlines()[0]
        tasks = tasks[:-1]  # an error, not an answer
    else:
        state = f"ended; last active at {as_time(phases[-1][1])}" if phases else "ended before it did anything"
    answers = f"answers: {tasks.count(TRAINING)} after training (weights, metrics, numbers of images)"
    return [state, f"{answers}, {tasks.count(EVALUATING)} after an evaluation (metrics, numbers of images)"]


def as_time(seconds: Any) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}" if seconds else "an unknown time"


if __name__ == "__main__":
    sys.exit(exit_code("status.py", main))
