"""deploy/status.py: a site's own view of its jobs, from its workspace."""

import json
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from federation.site import ledger

JOB = "91c0bacf-4717-4538-9194-8a7867fa2f03"
TASKS = [
    "starting",
    "validating",
    "training",
    "testing",
    "predicting",
    "waiting",
    "evaluating",
    "evaluating",
    "waiting",
]
BEGAN = 1_700_000_000

TRACEBACK = """2026-11-28 10:24:27,961 - SiteHost - ERROR - [identity=north] - north: Traceback (most recent call last):
  File "/kit/job/app_north/custom/data.py", line 12, in setup
    raise UserError("no images")
federation.errors.UserError: no images
"""
AUDIT_LOG = """[E:c281][R:f36e][T:2026-11-28 10:20:26.504008][U:ops@example.com][A:sys.shell]
[E:c282][R:f36f][T:2026-11-28 10:20:27.504008][U:ops@example.com][A:sys.shell]
[E:b469][T:2026-11-28 10:24:13.813903][U:lead@example.com][A:train.deploy]
[E:51aa][T:2026-11-28 10:24:13.897544][U:][A:train.start_job]
"""


@pytest.fixture
def server():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


@pytest.fixture
def workspace(tmp_path, server) -> Path:
    """A site's workspace before its first job."""
    folder = tmp_path / "north"
    (folder / "startup").mkdir(parents=True)
    service = {"target": f"localhost:{server.getsockname()[1]}"}
    config = {"client": {"fqsn": "north"}, "servers": [{"service": service}]}
    (folder / "startup" / "fed_client.json").write_text(json.dumps(config))
    return folder


def add_job(workspace: Path, phases: list[str], log: str = "", job: str = JOB) -> None:
    (workspace / job).mkdir()
    meta = {"submitter_name": "lead@example.com", "submit_time": BEGAN}
    (workspace / job / "meta.json").write_text(json.dumps(meta))
    lines = (json.dumps({"time": BEGAN + i, "phase": phase}) for i, phase in enumerate(phases))
    (workspace / job / "progress.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (workspace / job / "log.txt").write_text(log)


@pytest.fixture
def status(project, workspace):
    def run() -> str:
        done = project.run("deploy/status.py", str(workspace))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


@pytest.fixture
def process(workspace):
    """process(words): a process with these words on its command line."""
    started = []

    def start(*words: str) -> None:
        command = [sys.executable, "-c", "input()", *words, str(workspace)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL))

    yield start
    for each in started:
        each.communicate(b"\n")


def test_a_site_that_does_not_run_is_told_how_to_start(status, workspace):
    assert status() == (
        f"north: not running\n\nledger {workspace}/ledger/north.jsonl: 0 records, chain intact\n\n"
        "no administrator's command was executed here\n\n"
        f"to do: start the site with {workspace}/startup/start.sh\n"
    )


def test_a_running_site_is_connected_or_told_to_call_the_doctor(status, process, server):
    process("client_train", "-m")
    assert "north: running, but not connected to localhost:" in status()
    assert "deploy/doctor.py --startup_kit" in status()
    if psutil.LINUX:  # elsewhere, only root sees all connections
        with socket.create_connection(server.getsockname()):
            assert "north: running, connected\n" in status()
            assert "to do: nothing: this site is ready for jobs" in status()


def test_a_job_is_listed_with_its_submitter_and_its_answers(status, workspace):
    add_job(workspace, [*TASKS[:6], *TASKS[1:], "validating", "waiting"])  # the last task was aborted
    shown = status()
    at = f"{datetime.fromtimestamp(BEGAN):%Y-%m-%d %H:%M:%S}"
    assert f"job {JOB}, submitted by lead@example.com at {at}" in shown
    assert "ended; last active at" in shown
    assert "answers: 2 after training" in shown and ", 1 after an evaluation" in shown


def test_a_running_job_is_shown_with_its_phase(status, workspace, process):
    add_job(workspace, TASKS[:3])
    process("client_train", "-m")
    process("worker_process", "-n", JOB)
    shown = status()
    at = f"{datetime.fromtimestamp(BEGAN + 2):%Y-%m-%d %H:%M:%S}"
    assert f"running; training since {at}" in shown and "answers: 0 after training" in shown


def test_a_failed_job_shows_the_error_which_does_not_count_as_an_answer(status, workspace):
    add_job(workspace, [*TASKS[:6], "validating", "training", "waiting"], TRACEBACK)
    shown = status()
    assert "north failed: federation.errors.UserError: no images (data.py, line 12)" in shown
    assert "answers: 1 after training" in shown
    assert f"to do: read {workspace}/{JOB}/log.txt; start the site" in shown


def test_jobs_are_in_the_order_of_their_submission(status, workspace):
    for number, job in enumerate(("zebra", "aardvark")):
        add_job(workspace, TASKS, job=job)
        meta = {"submitter_name": "ann", "submit_time": BEGAN + number}
        (workspace / job / "meta.json").write_text(json.dumps(meta))
    assert status().index("job zebra") < status().index("job aardvark")


def test_what_administrators_did_is_counted(status, workspace):
    (workspace / "audit.log").write_text(AUDIT_LOG)
    shown = status()
    assert "ops@example.com: sys.shell (read files or listed folders), 2 x" in shown
    assert "lead@example.com: train.deploy, 1 x" in shown and "start_job" not in shown


def test_a_ledger_is_counted_and_verified(status, workspace):
    file = workspace / "ledger" / "north.jsonl"
    for task in ("train", "validate"):
        ledger.append(file, {"task": task}, durable=False)
    assert f"ledger {file}: 2 records, chain intact\n" in status()
    file.write_text(file.read_text().replace("train", "paint"))
    shown = status()
    assert f"ledger: {file}, line 2: the chain is broken" in shown and "to do: find out who changed the ledger" in shown


def test_another_folder_is_one_line(project, tmp_path):
    run = project.run("deploy/status.py", str(tmp_path))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "is not a site's workspace" in run.stderr
