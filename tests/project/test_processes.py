"""However job.py ends, no process is left running and no key of a POC is left on disk."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from federation.launch.poc import provision
from programs import HIDE, PROJECT, SHOW, Project, on_a_terminal

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
LONG = ["--dataset", "digits", "--num_rounds", "50"]


# Stands in for job.py: forks a child that has a child in another session, prints their IDs, and waits.
PARENT = """
import os, pathlib, subprocess, sys
from federation.launch.watchdog import guard
from federation.run.folder import RunFolder
with guard(RunFolder(pathlib.Path(sys.argv[1]))) as started:
    child = os.fork()
    if not child:
        grandchild = subprocess.Popen(["sleep", "60"], start_new_session=True)
        print(os.getpid(), grandchild.pid, flush=True)
        grandchild.wait()
    started(child)
    input()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_only_children_and_keys_are_removed_with_their_parent(tmp_path, killed):
    kits = provision(tmp_path / "federation", ["site-1"])
    log = kits / "site-1" / "log.txt"
    log.write_text("what happened")
    bystander = subprocess.Popen(["tail", "-f", log], stdout=subprocess.DEVNULL)
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    watchdog = next(child for child in psutil.Process(parent.pid).children() if "watchdog.py" in child.cmdline()[1])
    if killed:
        parent.kill()
        parent.communicate()
    else:
        parent.communicate("\n")
    assert psutil.wait_procs([*children, watchdog], timeout=30)[1] == []
    assert keys_in(tmp_path) == []
    assert log.read_text() == "what happened"
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_poc_is_private_regardless_of_the_umask(tmp_path):
    before = os.umask(0)
    try:
        provision(tmp_path / "federation", ["site-1"])
    finally:
        os.umask(before)
    written = [tmp_path / "federation", *(tmp_path / "federation").rglob("*")]
    assert keys_in(tmp_path) != []
    assert [path for path in written if path.stat().st_mode & 0o077] == []


def keys_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]


def start_training(project: Project, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start a long federation; once a site is training, return it and all its processes."""
    process = project.start("job.py", *LONG, *flags)
    await_training(project, process)
    return process, psutil.Process(process.pid).children(recursive=True)


def await_training(project: Project, process: subprocess.Popen) -> None:
    progress = "runs/*/workspace/*/*/progress.jsonl"
    while not any("training" in path.read_text() for path in project.folder.glob(progress)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def assert_nothing_is_left(project: Project, process_tree: list[psutil.Process]) -> None:
    left = psutil.wait_procs(process_tree, timeout=60)[1]
    for process in left:
        process.kill()
    assert left == []
    assert project.processes() == []
    assert keys_in(project.folder / "runs") == []


@pytest.mark.slow
@pytest.mark.parametrize("env", ["sim", "poc"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_leaves_no_process_and_no_key(project, env, number):
    process, process_tree = start_training(project, "--env", env)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert error.endswith("job.py: stopped; no process is left\n")
        assert project.processes() == []
    assert_nothing_is_left(project, process_tree)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only root sees the sockets of all processes")
def test_a_poc_listens_on_this_machine_only(project):
    process, process_tree = start_training(project, "--env", "poc")
    sockets = [
        socket for socket in psutil.net_connections("tcp") if socket.pid in [child.pid for child in process_tree]
    ]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    listening = {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}  # gRPC listens on ::ffff:127.0.0.1, which is the same


@pytest.mark.slow
def test_nohup_lets_a_run_outlive_its_terminal(project):
    nohup = "import os, sys; os.execvp('nohup', ['nohup', sys.executable, *sys.argv[1:]])"
    process = project.start("-c", nohup, "job.py", "--dataset", "digits")
    await_training(project, process)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.mark.slow
def test_closing_the_terminal_leaves_no_process(project):
    terminal, programs_side = pty.openpty()
    # Make this the terminal of a session leader: only then does the kernel send it SIGHUP on closing.
    lead = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    program = subprocess.Popen(
        [sys.executable, "-c", lead, sys.executable, "job.py", *LONG],
        cwd=project.folder,
        start_new_session=True,
        stdin=programs_side,
        stdout=programs_side,
        stderr=programs_side,
    )
    os.close(programs_side)
    sent = b""
    while b"training" not in sent:
        sent += os.read(terminal, 4096)
    process_tree = psutil.Process(program.pid).children(recursive=True)
    os.close(terminal)
    program.wait(timeout=60)
    assert_nothing_is_left(project, process_tree)


@pytest.mark.slow
def test_a_simulator_that_is_killed_leaves_no_process(project):
    process, process_tree = start_training(project)
    simulator = next(child for child in psutil.Process(process.pid).children() if "job.py" in child.cmdline())
    simulator.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert_nothing_is_left(project, process_tree)


@pytest.mark.slow
def test_a_client_that_is_killed_ends_the_job(project):
    process, process_tree = start_training(project)
    for child in process_tree:
        if child.cwd().endswith("/site-2"):
            child.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "site-2 died" in error
    assert_nothing_is_left(project, process_tree)


@pytest.mark.slow
def test_ctrl_c_leaves_the_terminal_as_it_was(project):
    code, sent = on_a_terminal([sys.executable, "job.py", *LONG], project.folder, interrupt_at=b"training, step")
    assert code == 130
    assert sent.count(HIDE) == sent.count(SHOW) == 1
    last_words = sent[sent.index(SHOW) :].decode().splitlines()
    assert last_words[-1] == "job.py: stopped; no process is left"
    assert project.processes() == []


INTERRUPTED_FORK = """
import os, signal, sys
sent = []
def interrupt():
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.SIGINT)
os.register_at_fork(after_in_parent=interrupt)  # Python only prints exceptions raised there
import job
from federation.errors import exit_code
sys.exit(exit_code("job.py", job.main))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_ctrl_c_works_during_a_fork(project):
    run = project.run("-c", INTERRUPTED_FORK, "--dataset", "digits")
    assert run.returncode == 130
    assert run.stderr.endswith("job.py: stopped; no process is left\n")
    assert project.processes() == []
