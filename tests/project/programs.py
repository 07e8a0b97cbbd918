"""The programs of the rendered project, run as a user runs them, and what such tests look at."""

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer  # type: ignore[import-untyped]

import settings
from federation.errors import UserError

PROJECT = Path(settings.__file__).parent


class Project:
    """A copy of the project, to run its programs in as a user does, without touching the user's own runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.result: dict = {}  # for a fixture that runs a federation: its results.json,
        self.screen, self.errors = "", ""  # and what it said
        shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("runs", ".venv", "tests", ".*", "__pycache__"))

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start one of its programs, with the interpreter that runs the tests."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",  # where a test reads some lines and then communicates, a character can be cut in two
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text(encoding="utf-8")
        assert old in text
        (self.folder / name).write_text(text.replace(old, new), encoding="utf-8")

    def processes(self) -> list[str]:
        """The command lines of all processes that run in its folders."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
            if any(str(self.folder.resolve()) in word for word in words):
                found.append(" ".join(words))
        return found


HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"  # what a program sends to a terminal about its cursor


def on_a_terminal(command: list[str], folder: Path, interrupt_at: bytes = b"") -> tuple[int, bytes]:
    """Run a program on a terminal of 80 x 24: its exit code, and all that it sent.

    Args:
        command: its words.
        folder: to run it in.
        interrupt_at: what to await before Ctrl-C; nothing: no Ctrl-C.
    """
    terminal, programs_side = pty.openpty()
    surroundings = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    program = subprocess.Popen(command, cwd=folder, env=surroundings, stdout=programs_side, stderr=programs_side)
    os.close(programs_side)
    sent, interrupted = b"", not interrupt_at
    while True:
        try:
            new = os.read(terminal, 4096)
        except OSError:  # Linux says so where the program has closed its side
            new = b""
        if not new:
            break
        sent += new
        if not interrupted and interrupt_at in sent:
            program.send_signal(signal.SIGINT)
            interrupted = True
    os.close(terminal)
    return program.wait(timeout=60), sent


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def data_error(function: Callable, *arguments, **named) -> str:
    """The one line that the user is told where data cannot be used."""
    with pytest.raises(UserError) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_events(folder: Path) -> dict:
    """TensorBoard's own view of a folder: run -> tag -> (step, value)s."""
    events = EventMultiplexer().AddRunsFromDirectory(str(folder))
    events.Reload()
    return {
        run: {tag: [(event.step, event.value) for event in events.Scalars(run, tag)] for tag in kinds["scalars"]}
        for run, kinds in events.Runs().items()
    }
