"""What all tests share: no network, no surroundings of the user's, a cache folder of their own."""

import dataclasses
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from federation.errors import UserError
from federation.site import catalog
from mirrors import Mirror, StandIn, make_bloodmnist, make_cifar10, make_fashion_mnist, md5
from settings import Options

signal.signal(signal.SIGINT, signal.default_int_handler)  # else what a background job starts ignores Ctrl-C

PROJECT = Path(__file__).resolve().parent.parent
SURROUNDINGS = ("FL_DATA_ROOT", "FL_SHARE_COUNTS", "FL_DATA_MIRROR", "FL_DATA_TIMEOUT")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """A cache folder for all tests together, so that digits are converted once."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    """What the user has set for real runs does not reach a test, nor does what one test opened reach the next."""
    for name in (*SURROUNDINGS, *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    yield
    if "data" in sys.modules:  # it keeps open what it has opened
        for value in vars(sys.modules["data"]).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder for this test alone, and the folder in it that will hold the data."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return catalog.cache_folder()


@pytest.fixture
def permissions_bind(tmp_path) -> None:
    """Skips a test where every file may be read, whatever its permissions: as root, and on Windows."""
    (tmp_path / "locked").mkdir(mode=0)
    if os.access(tmp_path / "locked", os.R_OK):
        pytest.skip("this user may read and write everything")


@pytest.fixture
def options():
    """Makes the options of a run: small defaults, and what a test changes."""

    def make(**changes) -> Options:
        classes = list("0123456789") if changes.get("dataset", "digits") == "digits" else []
        return Options(**{"dataset": "digits", "n_clients": 2, "gpu": False, "classes": classes, **changes})

    return make


class Project:
    """A copy of the project, to run its programs in as a user does, without touching the user's own runs."""

    def __init__(self, folder: Path):
        self.folder = folder
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


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def data_error(function: Callable, *arguments) -> str:
    """The one line that the user is told where data cannot be used."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="session")
def stand_ins() -> dict[str, StandIn]:
    return {"cifar10": make_cifar10(), "fashion_mnist": make_fashion_mnist(), "bloodmnist": make_bloodmnist()}


@pytest.fixture
def publish(stand_ins, monkeypatch):
    """publish(dataset, *mirrors): from now on the data set is its stand-in, and comes from these mirrors."""

    def replace(dataset: str, *mirrors: str) -> StandIn:
        stand_in = stand_ins[dataset]
        files = tuple((name, md5(content)) for name, content in stand_in.files.items())
        source = dataclasses.replace(catalog.SOURCES[dataset], files=files, mirrors=mirrors)
        monkeypatch.setitem(catalog.SOURCES, dataset, source)
        if dataset == "cifar10":
            from torchvision.datasets import CIFAR10

            inner = stand_in.inner_md5
            monkeypatch.setattr(CIFAR10, "train_list", [[n, inner[n]] for n in inner if n.startswith("data_batch")])
            monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", inner["test_batch"]]])
            monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": inner["batches.meta"]})
        return stand_in

    return replace


@pytest.fixture
def mirror(stand_ins):
    """mirror(behave): a running mirror of all stand-ins that behaves like this."""
    started = []
    files = {name: content for stand_in in stand_ins.values() for name, content in stand_in.files.items()}

    def start(behave) -> Mirror:
        server = Mirror(behave, files)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.test_is_over.set()
        server.shutdown()
        server.server_close()
