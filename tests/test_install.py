"""install.py as a user runs it, with tiny packages, a fake uv, and indexes on this machine."""

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest

from template import PROJECT, TEMPLATE, run, surroundings

INDEX = "https://download.pytorch.org/whl/cpu"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
# Logs its arguments. `venv` makes a working environment; `pip install` fails, waits or does nothing.
UV = """#!/bin/sh
echo "${{UV_TORCH_BACKEND:+PyTorch for $UV_TORCH_BACKEND: }}$*" >> "{log}"
case "$*" in *"$UV_WAITS_IN"*) if [ -n "$UV_WAITS_IN" ]; then echo waiting; exec sleep 600; fi;; esac
if [ "$1" = venv ]; then for folder; do :; done; mkdir -p "$folder/bin"; ln -s {python} "$folder/bin/python"; fi
case "$*" in *"$UV_FAILS_IN"*) if [ -n "$UV_FAILS_IN" ]; then exit 2; fi;; esac
"""


class Project:
    """A folder with install.py, requirements that this Python does not meet, and a fake uv."""

    def __init__(self, path: Path):
        self.path, self.venv, self.log = path / "eyes", path / "eyes" / ".venv", path / "uv.log"
        self.path.mkdir()
        self.script = (PROJECT / "install.py").read_text(encoding="utf-8")
        self.index(NOWHERE)
        self.require("tiny>=1")
        (self.path / "settings.py").write_text("class Options:\n    gpu = False\n", encoding="utf-8")
        (path / "bin").mkdir()
        (path / "bin" / "uv").write_text(UV.format(log=self.log, python=sys.executable), encoding="utf-8")
        (path / "bin" / "uv").chmod(0o755)
        self.variables = surroundings(path, PATH=f"{path / 'bin'}:/usr/bin:/bin")

    def index(self, address: str, answer_s: float = 5) -> None:
        """Replace the URL of PyTorch's index."""
        assert self.script.count(f'"{INDEX}"') == self.script.count("\nINDEX_TIMEOUT_S = 5 ") == 1
        script = self.script.replace(INDEX, address).replace(
            "\nINDEX_TIMEOUT_S = 5 ", f"\nINDEX_TIMEOUT_S = {answer_s} "
        )
        (self.path / "install.py").write_text(script, encoding="utf-8")

    def require(self, *requirements: str) -> None:
        (self.path / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")

    def install(self, *options: str, **variables: str) -> tuple[int, str]:
        """Run it; return its exit code and output."""
        return run([sys.executable, "install.py", *options], self.path, {**self.variables, **variables})

    def asked_of_uv(self) -> list[str]:
        """The arguments of uv's calls, with shortened paths."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [
            line.replace(str(self.path), ".").replace(sys.executable, "PYTHON").replace("./.venv", ".venv")
            for line in lines
        ]

    def make_venv(self) -> Path:
        """Make a .venv with this Python, and return a user's file in it."""
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "python").symlink_to(sys.executable)
        (self.venv / "mine").touch()
        return self.venv / "mine"


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


MAKE = "venv --quiet --python PYTHON .venv"
ADD = "pip install --python .venv/bin/python --quiet"


def test_a_python_with_all_packages_is_used_as_is(project):
    project.require("pytest>=8  # a comment", "", "# another", "hypothesis>=6,<1000")
    assert project.install() == (0, f"{sys.executable} has all required packages\n")
    assert not project.venv.exists() and project.asked_of_uv() == []


def test_uv_creates_the_environment_if_it_is_on_the_path(project):
    code, said = project.install()
    assert code == 0 and said.endswith(f"{project.venv}/bin/python has all required packages\n"), said
    assert project.asked_of_uv() == [MAKE, f"{ADD} -r ./requirements.txt"]


def test_an_incomplete_venv_is_updated(project):
    mine = project.make_venv()
    assert project.install()[0] == 0
    assert project.asked_of_uv() == [f"{ADD} -r ./requirements.txt"] and mine.exists()


def test_a_complete_venv_is_left_alone(project):
    mine = project.make_venv()
    project.require("pytest>=8")
    assert project.install() == (0, f"{project.venv}/bin/python has all required packages\n")
    assert project.asked_of_uv() == [] and mine.exists()


@pytest.fixture(params=["no interpreter", "file", "dangling link", "too old", "interpreter is gone"])
def broken(request, project) -> Path:
    """An unusable .venv."""
    if request.param == "file":
        project.venv.touch()
    elif request.param == "dangling link":
        project.venv.symlink_to("nowhere")
    else:
        (project.venv / "bin").mkdir(parents=True)
        (project.venv / "pyvenv.cfg").touch()
        if request.param == "too old":
            (project.venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
            (project.venv / "bin" / "python").chmod(0o755)
        elif request.param == "interpreter is gone":
            (project.venv / "bin" / "python").symlink_to("/nowhere/python")
    return project.venv


def test_a_broken_venv_is_replaced(project, broken):
    assert project.install()[0] == 0
    assert project.asked_of_uv()[0] == MAKE
    assert (broken / "bin" / "python").resolve() == Path(sys.executable).resolve()


def test_a_broken_venv_is_removed_even_if_this_python_has_all_packages(project, broken):
    project.require("pytest>=8")
    assert project.install()[0] == 0
    assert not os.path.lexists(broken) and project.asked_of_uv() == []


def test_a_folder_that_is_not_an_environment_is_never_removed(project):
    (project.path / "mine").mkdir()
    (project.path / "mine" / "thesis.tex").touch()
    code, said = project.install("--venv", "mine")
    assert (code, said.count("\n")) == (1, 1) and "is not a virtual environment" in said
    assert (project.path / "mine" / "thesis.tex").exists() and project.asked_of_uv() == []


def test_another_folder_and_other_requirements_are_used_whatever_this_python_has(project):
    (project.path / "more.txt").write_text("pytest>=8\n", encoding="utf-8")
    code, said = project.install("--venv", "other", "-r", "more.txt", "-r", "requirements.txt")
    assert code == 0, said
    assert project.asked_of_uv() == [
        "venv --quiet --python PYTHON ./other",
        "pip install --python ./other/bin/python --quiet -r more.txt -r requirements.txt",
    ]


@pytest.mark.parametrize("part", ["venv", "pip install"])
def test_a_new_venv_is_removed_if_a_command_fails(project, part):
    code, said = project.install(UV_FAILS_IN=part)
    assert code == 1 and not project.venv.exists()
    last = said.splitlines()[-1]
    assert last.startswith("install.py: ") and part in last and last.endswith(" failed with exit code 2")
    assert "Traceback" not in said


def test_an_existing_venv_is_kept_if_a_command_fails(project):
    mine = project.make_venv()
    assert project.install(UV_FAILS_IN="pip install")[0] == 1
    assert mine.exists()


def test_requirements_that_cannot_be_read_change_nothing(project, broken):
    code, said = project.install("--venv", ".venv", "-r", "absent.txt")
    assert (code, said.count("\n")) == (1, 1) and "absent.txt" in said
    assert os.path.lexists(broken) and project.asked_of_uv() == []


def test_ctrl_c_leaves_nothing_unfinished(project):
    process = subprocess.Popen(
        [sys.executable, "install.py"],
        cwd=project.path,
        env={**project.variables, "UV_WAITS_IN": "pip install"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )
    while process.stdout and process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[0] == "install.py: stopped\n"  # the pipe closes when no process is left
    assert process.returncode == 130 and not project.venv.exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("nothing", "create .venv with uv, about 1.5 GB (6 GB without CPU wheels)\n"),
        ("no uv", "create .venv with pip, about 1.5 GB (6 GB without CPU wheels)\n"),
        ("gpu", "create .venv with uv, about 6 GB\n"),
        (
            "incomplete",
            "update .venv with uv, about 1.5 GB (6 GB without CPU wheels)\n",
        ),
        ("broken", "create .venv with uv, about 1.5 GB (6 GB without CPU wheels)\n"),
        ("all is there", f"{sys.executable} has all required packages\n"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the sizes are Linux's")
def test_a_plan_says_what_would_be_done_and_changes_nothing(project, state, said):
    variables = {"PATH": "/usr/bin:/bin"} if state == "no uv" else {}
    if state == "incomplete":
        project.make_venv()
    elif state == "broken":
        project.venv.touch()
    elif state == "all is there":
        project.venv.touch()
        project.require("pytest>=8")
    assert state == "all is there" or len(f"  1. environment: {said.rstrip()}") <= 80  # as the hook prints it
    before = sorted(project.path.rglob("*"))
    assert project.install("--plan", *(["--gpu"] if state == "gpu" else []), **variables) == (0, said)
    assert sorted(project.path.rglob("*")) == before and project.asked_of_uv() == []


def pretend_installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")


ONLY_PIP_CAN_JUDGE = ["has_4[extra]", "has_4; python_version < '4'", "has_4 @ file:///nowhere", "-r other.txt"]


@pytest.mark.parametrize(
    "lacking",
    ["", "has_29>=2.10", "has_29>=2.8,<2.9.2", "has_214<2.9", "has_30>=3", "absent", "broken", *ONLY_PIP_CAN_JUDGE],
)
def test_a_python_has_all_packages_if_it_meets_each_requirement(project, tmp_path, lacking):
    for name, version in {"has_29": "2.9.2", "has_214": "2.14.1+cpu", "has_30": "3.0rc1", "has_4": "4"}.items():
        pretend_installed(tmp_path / "packages", name, version)
    (tmp_path / "packages" / "broken-1.dist-info").mkdir()
    met = ["has_29>=2.9,<2.10", "has-29~=2.9", "Has.29", "has_214>=2.4", "has_214==2.14.1", "has_30>=2", "has_4>=4.0"]
    project.require(*met, lacking)
    code, said = project.install("--plan", PYTHONPATH=str(tmp_path / "packages"))
    assert (code, said == f"{sys.executable} has all required packages\n") == (0, not lacking)


def test_every_requirement_of_the_project_is_understood(project, tmp_path):
    """Otherwise, .venv would be created when it is not needed."""
    requirements = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    (project.path / "requirements.txt").write_text(requirements, encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in requirements.splitlines()]
    for name, _, bounds in (line.partition(">=") for line in lines if line):
        pretend_installed(tmp_path / "packages", name.replace("-", "_"), bounds.partition(",")[0])
    code, said = project.install("--plan", PYTHONPATH=str(tmp_path / "packages"))
    assert (code, said) == (0, f"{sys.executable} has all required packages\n")


def test_a_python_that_is_too_old_is_reported_in_one_line(project):
    program = "import runpy, sys; sys.version_info = (3, 9); runpy.run_path('install.py', run_name='__main__')"
    code, said = run([sys.executable, "-c", program], project.path, project.variables)
    assert code == 1 and len(said.splitlines()) == 1
    assert said.startswith("install.py: needs Python 3.10 or newer")


def test_without_a_venv_module_nothing_is_left(project, tmp_path):
    (tmp_path / "venv.py").write_text("raise SystemExit('ensurepip is not available')\n", encoding="utf-8")
    code, said = project.install(PATH="/usr/bin:/bin", PYTHONPATH=str(tmp_path))
    assert code == 1 and not project.venv.exists()
    assert "ensurepip is not available" in said and "-m venv" in said.splitlines()[-1]


@pytest.fixture
def index(tmp_path):
    """The URL of a web server that serves tmp_path/index as a package index."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/no-http/"):
                self.wfile.write(b"not HTTP at all\r\n")
            else:
                super().do_GET()

        def log_message(self, *arguments):
            pass

    handler = partial(Handler, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def make_wheel(folder: Path, name: str, version: str, size: int = 0) -> None:
    """Write a package with one module of `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "#" * size)
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, PyTorch has no CUDA")


@linux
def test_uv_uses_cpu_only_pytorch_if_the_index_of_cpu_wheels_answers(project, index, tmp_path):
    (tmp_path / "index" / "torch").mkdir(parents=True)
    project.index(index)
    code, said = project.install()
    assert code == 0 and f"CPU-only PyTorch: trying {index}/torch/ (max 5 s)" in said, said
    assert project.asked_of_uv() == [MAKE, f"PyTorch for cpu: {ADD} -r ./requirements.txt"]


@pytest.mark.parametrize("why", ["refused", "not found", "silent", "no HTTP", "gpu", "settings", "macOS"])
def test_the_default_pytorch_is_used_if_that_index_does_not_answer_or_is_not_wanted(project, index, why):
    command = [sys.executable, "install.py"]
    if why == "not found":
        project.index(index)
    elif why == "no HTTP":
        project.index(f"{index}/no-http")
    elif why == "gpu":
        command.append("--gpu")
    elif why == "settings":
        (project.path / "settings.py").write_text("class Options:\n    gpu = True\n", encoding="utf-8")
    elif why == "macOS":
        pretend = "import runpy, sys; sys.platform = 'darwin'"
        command = [sys.executable, "-c", f"{pretend}; runpy.run_path('install.py', run_name='__main__')"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if why == "silent":
            project.index(f"http://127.0.0.1:{silent.getsockname()[1]}", answer_s=0.1)
        code, said = run(command, project.path, project.variables)
    assert code == 0 and "Traceback" not in said, said
    assert project.asked_of_uv() == [MAKE, f"{ADD} -r ./requirements.txt"]
    asks = sys.platform == "linux" and why in ("refused", "not found", "silent", "no HTTP")
    assert ("trying" in said, "No answer: using the default build" in said) == (asks, asks)


def test_the_templates_makefile_uses_it(project, tmp_path):
    template = tmp_path / "template"
    (template / PROJECT.name).mkdir(parents=True)
    for path in (TEMPLATE / "Makefile", TEMPLATE / "requirements-dev.txt"):
        shutil.copy(path, template)
    for name in ("install.py", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(PROJECT / name, template / PROJECT.name)
    no_network = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), NOWHERE)
    command = ["make", f"PYTHON={sys.executable}", ".venv/ready"]
    code, said = run(command, template, {**project.variables, **no_network})
    assert code == 0 and (template / ".venv" / "ready").exists(), said
    assert project.asked_of_uv()[-1].endswith(
        "/template/.venv/bin/python --quiet -r requirements-dev.txt -r {{cookiecutter.__folder}}/requirements.txt"
        " -r {{cookiecutter.__folder}}/requirements-dev.txt"
    )


@pytest.mark.slow
@linux
def test_venv_and_pip_create_update_and_replace_the_environment(project, index, tmp_path):
    make_wheel(tmp_path / "index" / "cpu" / "torch", "torch", "2.9.1+cpu")
    make_wheel(tmp_path / "index" / "default" / "torch", "torch", "2.9.1")
    make_wheel(tmp_path / "index" / "default" / "tiny", "tiny", "1.2")
    make_wheel(tmp_path / "index" / "default" / "more", "more", "1.0")
    project.index(f"{index}/cpu")
    project.require("tiny>=1", "torch>=2.4")
    pip = {"PATH": "/usr/bin:/bin", "PIP_INDEX_URL": f"{index}/default"}

    def installed() -> list[str]:
        return sorted(path.name for path in project.venv.glob("lib/python*/site-packages/[mt]*.dist-info"))

    code, said = project.install(**pip)
    assert code == 0 and installed() == ["tiny-1.2.dist-info", "torch-2.9.1+cpu.dist-info"], said
    assert "\r" not in said and "Collecting" not in said

    project.require("tiny>=1", "torch>=2.4", "more")
    shutil.rmtree(tmp_path / "index" / "cpu" / "torch")
    (tmp_path / "index" / "cpu" / "torch").mkdir()  # it answers but is empty
    code, said = project.install(**pip)
    assert code == 0 and installed() == ["more-1.0.dist-info", "tiny-1.2.dist-info", "torch-2.9.1+cpu.dist-info"], said
    (project.venv / "bin" / "python").unlink()
    code, said = project.install(**pip)
    assert code == 0 and installed() == ["more-1.0.dist-info", "tiny-1.2.dist-info", "torch-2.9.1.dist-info"], said


@pytest.mark.slow
@pytest.mark.parametrize("why", ["no such package", "disk full"])
def test_nothing_is_left_if_pip_fails(project, tmp_path, why):
    if why == "disk full":
        make_wheel(tmp_path / "wheels", "tiny", "1.2", size=20_000_000)
    pip = {"PATH": "/usr/bin:/bin", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_NO_INDEX": "1"}
    limit = "ulimit -f 16384" if why == "disk full" else ":"  # no file over 16 MB can be written, as on a full disk
    command = ["bash", "-c", f'{limit}; exec "$@"', "bash", sys.executable, "install.py"]
    code, said = run(command, project.path, {**project.variables, **pip})
    assert code == 1 and not project.venv.exists()
    assert ("No matching distribution" if why == "no such package" else "File too large") in said
    assert said.splitlines()[-1].endswith("failed with exit code 1")
