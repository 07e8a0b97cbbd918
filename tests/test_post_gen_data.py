"""Setting up a real project with failing mirrors, and with Ctrl-C. Without a network."""

import hashlib
import http.server
import io
import os
import pickle
import pty
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from template import PROJECT, TEMPLATE, command, run, surroundings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="other processes are visible only on Linux"),
]

ARCHIVE = "cifar-10-python.tar.gz"
FAKE_UV = "#!/bin/sh\necho uv is waiting\nexec sleep 600\n"
SHORT_CHECK = "import sys\nif '--check' in sys.argv:\n    sys.exit(print('checked', *sys.argv[2:]))\n"

# Python runs this first in every process. It replaces the archive and its mirrors by fakes on this machine.
SITE = """
import dataclasses, importlib.machinery, sys

def patch(module):
    if module.__name__ == "federation.site.catalog":
        source = dataclasses.replace(module.SOURCES["cifar10"], files=(({archive!r}, {md5!r}),), mirrors={mirrors!r})
        module.SOURCES["cifar10"], sys.modules["federation.site.fetch"].READ_S = source, 0.5
    else:
        lists = [module.CIFAR10.train_list, module.CIFAR10.test_list, [module.CIFAR10.meta]]
        for entry in sum(lists, []):
            if isinstance(entry, list):
                entry[1] = {inner!r}[entry[0]]
        module.CIFAR10.meta["md5"] = {inner!r}["batches.meta"]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("federation.site.catalog", "torchvision.datasets.cifar"):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), patch(module))
            return spec

sys.meta_path.insert(0, Finder())
"""


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def make_cifar10() -> tuple[bytes, dict[str, str]]:
    """Return an archive in CIFAR-10's layout, 240 random images, and the checksums of the files in it."""
    random = np.random.RandomState(0)
    batches: dict[str, dict] = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batches[name] = {"data": random.randint(0, 256, (40, 3072), np.uint8), "labels": [i % 10 for i in range(40)]}
    files = {name: pickle.dumps(batch) for name, batch in batches.items()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue(), {name: md5(content) for name, content in files.items()}


class Mirrors(http.server.ThreadingHTTPServer):
    """Web server whose folders are mirrors: /whole/ works, /half/ breaks off, /wrong/ is corrupt, /silent/ hangs."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.archive, self.inner = make_cifar10()
        self.asked: list[str] = []
        self.over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        server: "Mirrors"

        def do_GET(self):
            kind, archive = self.path.split("/")[1], self.server.archive
            self.server.asked.append(kind)
            if kind == "silent":
                self.server.over.wait()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()
            self.wfile.write({"half": archive[: len(archive) // 2], "wrong": archive[::-1]}.get(kind, archive))

        def log_message(self, *arguments):
            pass

    def site(self, folder: Path, *kinds: str) -> Path:
        """Write the module that sets these mirrors, in this order."""
        mirrors = tuple(f"http://127.0.0.1:{self.server_port}/{kind}/" for kind in kinds)
        text = SITE.format(archive=ARCHIVE, md5=md5(self.archive), mirrors=mirrors, inner=self.inner)
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
        return folder


@pytest.fixture
def mirrors():
    with Mirrors() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def template(tmp_path) -> Path:
    copy = tmp_path / "template"
    shutil.copytree(TEMPLATE, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "build"))
    return copy


@pytest.fixture
def shorten_check(template):
    """Make the check only print its arguments."""
    job = template / PROJECT.name / "job.py"
    job.write_text(SHORT_CHECK + job.read_text(encoding="utf-8"), encoding="utf-8")


@pytest.fixture
def cookiecutter(template, tmp_path, mirrors):
    """The command and environment that render the template into tmp_path: `cookiecutter("half", "whole")`."""

    def cookiecutter(*kinds: str, **answers) -> tuple[list[str], Path, dict[str, str]]:
        site = mirrors.site(tmp_path / f"site-{'-'.join(kinds)}", *kinds)
        answers = {"dataset": "cifar10", "setup": "full", **answers, "project_slug": "eyes"}
        return command(template, **answers), tmp_path, surroundings(tmp_path, PYTHONPATH=str(site))

    return cookiecutter


def cached(tmp_path: Path) -> list[str]:
    """The names in the data cache, without locks."""
    return sorted(path.name for path in (tmp_path / "cache").glob("fl-lightning/*") if path.suffix != ".lock")


@pytest.mark.federation
def test_after_a_broken_and_a_corrupt_mirror_the_next_one_is_used(cookiecutter, mirrors, tmp_path):
    arguments, cwd, env = cookiecutter("half", "wrong", "whole")
    code, said = run(arguments, cwd, {**env, "FL_TEMPLATE_STRICT": "1"})
    assert code == 0, said
    assert re.search(r"^CHECK PASSED in \d+ s: one round, 2 sites, cifar10$", said, re.M), said
    assert mirrors.asked == ["half", "wrong", "whole"]
    assert "\r" not in said and "\x1b" not in said
    assert cached(tmp_path) == [ARCHIVE, "cifar10-32px"]
    assert (tmp_path / "cache" / "fl-lightning" / ARCHIVE).read_bytes() == mirrors.archive


@pytest.mark.usefixtures("shorten_check")
def test_if_no_mirror_works_each_is_tried_once_and_the_check_uses_digits(cookiecutter, mirrors, tmp_path):
    code, said = run(*cookiecutter("silent", "wrong"))
    assert code == 0 and (tmp_path / "eyes" / "job.py").exists()
    assert mirrors.asked == ["silent", "wrong"], said
    assert "checked --dataset digits" in said and "cannot be downloaded" in said
    assert cached(tmp_path) == []


@pytest.mark.usefixtures("shorten_check")
def test_two_concurrent_renderings_download_once(cookiecutter, mirrors, tmp_path):
    arguments, cwd, env = cookiecutter("whole")
    nothing: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    slugs = [[], ["project_slug=ears"]]
    processes = [subprocess.Popen([*arguments, *slug], cwd=cwd, env=env, **nothing) for slug in slugs]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "eyes" / "job.py").exists() and (tmp_path / "ears" / "job.py").exists()
    assert mirrors.asked == ["whole"]


class Terminal:
    """A shell on a terminal that runs one command and then waits for a line, like a prompt."""

    def __init__(self, args: list[str], cwd: Path, env: dict[str, str]):
        self.said = ""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            shell = 'trap : INT; "$@"; echo "exit code $?"; echo "[ready]"; read line'
            os.execve("/bin/sh", ["sh", "-c", shell, "sh", *args], env)

    def read_until(self, text: str) -> None:
        while text not in self.said:
            assert "[ready]" not in self.said, self.said  # the command has ended without printing it
            try:
                self.said += os.read(self.screen, 4096).decode(errors="replace")
            except OSError:  # the last process on this terminal has ended
                raise AssertionError(self.said) from None

    def press(self, key: str) -> None:
        os.write(self.screen, key.encode())

    def close(self) -> None:
        self.press("\n")
        os.waitpid(self.pid, 0)
        os.close(self.screen)


def processes_of(folder: Path) -> list[str]:
    """The command lines of all processes that run in a folder or below it, or name it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.parametrize(
    ("step", "marker"), [("environment", "uv is waiting"), ("data", "Fetching"), ("check", "FedAvg, sites: 2")]
)
def test_ctrl_c_at_a_terminal(cookiecutter, template, tmp_path, step, marker):
    arguments, cwd, env = cookiecutter("silent", dataset="digits" if step == "check" else "cifar10")
    if step == "environment":
        with open(template / PROJECT.name / "requirements.txt", "a", encoding="utf-8") as requirements:
            requirements.write("no-such-package>=1\n")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "uv").write_text(FAKE_UV, encoding="utf-8")
        (tmp_path / "bin" / "uv").chmod(0o755)
        env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    terminal = Terminal(arguments, cwd, env)
    terminal.read_until(marker)
    terminal.press("\x03")
    terminal.read_until("[ready]")
    said = terminal.said
    for text in ("NOT VERIFIED", "interrupted", "To try again", "exit code 0"):  # all before the shell's prompt
        assert text in said, said
    terminal.close()
    project = tmp_path / "eyes"
    assert (project / "job.py").exists() and (project / "federation" / "site" / "catalog.py").exists(), said
    assert not (project / ".venv").exists()
    assert processes_of(project) == [], said
    assert cached(tmp_path) == {"environment": [], "data": [], "check": ["digits-32px"]}[step]
    assert "Traceback" not in said, said
