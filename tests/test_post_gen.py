"""The hook that sets a project up: every branch with faked processes, and all of it for real on a tiny project."""

import contextlib
import http.server
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from conftest import ANSWERS, PROJECT, TEMPLATE, as_typed, checked

HOOK = TEMPLATE / "hooks" / "post_gen_project.py"
OWN = ".venv/bin/python"
DEFAULTS = {
    "project_name": "Eyes",
    "project_slug": "eyes",
    "dataset": "cifar10",
    "num_clients": "2",
    "rounds": "2",
    "use_gpu": False,
    "setup": "full",
}


class Hook:
    """The hook's functions before it is rendered, in a project, with processes that are not started but written down.

    `fails` says which of them fail: {part of the command: reason}.
    """

    def __init__(self, monkeypatch, capfd):
        self.names = runpy.run_path(str(HOOK))
        self.globals = self.names["main"].__globals__
        self.monkeypatch, self.capfd = monkeypatch, capfd
        self.real_run, self.commands, self.fails, self.variables = self.globals["run"], [], {}, {}
        self.on_path, self.cpu_index, self.not_met = None, True, []
        self.replace(
            run=self.fake_run,
            has_answer=lambda address: self.cpu_index,
            lacking=lambda: self.not_met,
            shutil=self.Shutil(self),
        )
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        self.replace(terminal_for_us=contextlib.nullcontext)  # the terminal stays with pytest
        monkeypatch.setattr(sys, "platform", "linux")

    class Shutil:
        def __init__(self, hook):
            self.which, self.rmtree = lambda name: hook.on_path, shutil.rmtree

    def replace(self, **functions) -> None:
        for name, function in functions.items():
            self.monkeypatch.setitem(self.globals, name, function)

    def fake_run(self, command, quiet=False, **variables) -> str:
        line = shlex.join(command).replace(sys.executable, "PYTHON").replace(str(HOOK), "HOOK")
        self.commands.append(line)
        self.variables[line] = variables
        if "-m venv" in line or " venv " in line:
            Path(OWN).parent.mkdir(parents=True, exist_ok=True)
            Path(OWN).touch()
        reason = next((reason for part, reason in self.fails.items() if part in line), "")
        if isinstance(reason, BaseException):
            raise reason
        return reason

    def __call__(self, **answers) -> tuple[int, str]:
        """Run the hook; return its exit code and what it says."""
        code = self.globals["main"]({**DEFAULTS, **answers})
        return code, self.capfd.readouterr().out


@pytest.fixture
def hook(monkeypatch, capfd, tmp_path) -> Hook:
    project = tmp_path / "eyes"
    project.mkdir()
    shutil.copy(PROJECT / "requirements.txt", project)
    monkeypatch.chdir(project)
    for name in ("FL_TEMPLATE_STRICT", "FL_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return Hook(monkeypatch, capfd)


def make_venv() -> None:
    Path(OWN).parent.mkdir(parents=True)
    Path(OWN).write_text("the user's", encoding="utf-8")


def last_commands(said: str) -> list[str]:
    """Return the indented lines at the end: commands to type."""
    lines = said.rstrip().splitlines()
    return [line.strip() for line in lines[max(i for i, line in enumerate(lines) if not line.startswith("  ")) + 1 :]]


def test_skip_starts_nothing_and_prints_the_commands_for_each_step(hook):
    code, said = hook(setup="skip")
    assert code == 0 and hook.commands == []
    assert last_commands(said) == [
        f"cd {Path.cwd()}",
        "python3 -m venv .venv",
        ".venv/bin/pip install --index-url https://download.pytorch.org/whl/cpu/ torch torchvision  # saves about 4 GB",
        ".venv/bin/pip install -r requirements.txt",
        "sh prepare_data.sh",
        ".venv/bin/python job.py --check",
    ]


def test_skip_with_a_gpu_installs_the_default_wheels(hook):
    assert "index-url" not in hook(setup="skip", use_gpu=True)[1]


def test_an_interpreter_that_has_all_is_used_and_nothing_is_installed(hook):
    code, said = hook()
    assert code == 0
    assert hook.commands == ["sh prepare_data.sh", "PYTHON job.py --check"]
    assert hook.variables["sh prepare_data.sh"] == {"PYTHON": sys.executable}
    assert f"1. environment: {sys.executable} has all it needs" in said
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{sys.executable} job.py"]


def test_the_plan_comes_first_and_each_step_tells_its_time(hook):
    hook.not_met = ["torch>=2.4"]
    said = hook()[1]
    order = ["about 6 GB, about 4 GB less", "170 MB", "3. check", "== 1/3 environment\n", "== 2/3 data\n", "== 3/3"]
    assert [said.index(text) for text in order] == sorted(said.index(text) for text in order)
    assert said.count("done (0 s)") == 3


@pytest.mark.parametrize(
    ("dataset", "size"),
    [("cifar10", "170 MB"), ("fashion_mnist", "30 MB"), ("bloodmnist", "35 MB"), ("digits", "no download")],
)
def test_the_plan_says_how_much_is_downloaded_as_the_question_does(hook, dataset, size):
    assert f"2. data: {dataset}, {size}" in hook(dataset=dataset)[1]
    assert size in ANSWERS["__prompts__"]["dataset"][dataset]


def test_venv_and_pip_make_the_environment_with_cpu_wheels_first(hook):
    hook.not_met = ["torch>=2.4"]
    code, said = hook()
    assert code == 0
    assert hook.commands == [
        "PYTHON -m venv .venv",
        f"{OWN} -m pip install --index-url https://download.pytorch.org/whl/cpu/ 'torch>=2.4' 'torchvision>=0.19'",
        f"{OWN} -m pip install -r requirements.txt",
        "sh prepare_data.sh",
        f"{OWN} job.py --check",
    ]
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{OWN} job.py"]


def test_uv_makes_it_where_it_is_on_the_path(hook):
    hook.not_met, hook.on_path = ["torch>=2.4"], "/bin/uv"
    said = hook()[1]
    assert "into .venv with uv" in said
    assert hook.commands[0] == "/bin/uv venv --python PYTHON .venv"
    assert hook.commands[1].startswith(f"/bin/uv pip install --python {OWN} --index-url https://download.pytorch.org/")
    assert hook.commands[2] == f"/bin/uv pip install --python {OWN} -r requirements.txt"


@pytest.mark.parametrize("why", ["no answer", "gpu", "macOS"])
def test_the_default_wheels_are_taken(hook, monkeypatch, why):
    hook.not_met, hook.cpu_index = ["torch>=2.4"], why != "no answer"
    monkeypatch.setattr(sys, "platform", "darwin" if why == "macOS" else "linux")
    code, said = hook(use_gpu=why == "gpu")
    assert code == 0
    assert hook.commands[:2] == ["PYTHON -m venv .venv", f"{OWN} -m pip install -r requirements.txt"]
    assert ("at most 5 seconds" in said) == (why == "no answer")


def test_the_default_wheels_are_taken_where_cpu_wheels_do_not_install(hook):
    hook.not_met, hook.fails = ["torch>=2.4"], {"--index-url": "no such wheel"}
    code, said = hook()
    assert code == 0 and "no such wheel: taking the default ones" in said
    assert f"{OWN} job.py --check" in hook.commands


def test_a_working_venv_is_used_again(hook):
    make_venv()
    assert hook()[0] == 0
    assert hook.commands == [f"{OWN} -c ''", f"{OWN} HOOK lacking", "sh prepare_data.sh", f"{OWN} job.py --check"]
    assert Path(OWN).read_text(encoding="utf-8") == "the user's"


def test_a_venv_that_lacks_packages_is_completed_not_replaced(hook):
    make_venv()
    hook.fails = {"lacking": "exit code 1"}
    assert hook()[0] == 0
    assert not any("-m venv" in command for command in hook.commands)
    assert f"{OWN} -m pip install -r requirements.txt" in hook.commands
    assert Path(OWN).read_text(encoding="utf-8") == "the user's"


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_broken_venv_is_replaced(hook, kind):
    if kind == "folder":
        make_venv()
    elif kind == "file":
        Path(".venv").touch()
    else:
        Path(".venv").symlink_to("nowhere")
    hook.not_met, hook.fails = ["torch>=2.4"], {"-c ''": "cannot run"}
    code, said = hook()
    assert code == 0 and "broken" in said
    assert hook.commands[1] == "PYTHON -m venv .venv"
    assert Path(OWN).read_text(encoding="utf-8") == ""


def test_a_broken_venv_is_only_removed_where_the_interpreter_has_all(hook):
    make_venv()
    hook.fails = {"-c ''": "cannot run"}
    assert hook()[0] == 0
    assert not Path(".venv").exists()
    assert hook.commands[-1] == "PYTHON job.py --check"


@pytest.mark.parametrize(
    ("part", "venv_stays"), [("-m venv", False), ("-r requirements.txt", True)], ids=["no venv module", "pip fails"]
)
def test_without_an_environment_the_other_steps_are_not_tried(hook, part, venv_stays):
    hook.not_met, hook.fails = ["torch>=2.4"], {part: "it ended with exit code 1"}
    code, said = hook()
    assert code == 0
    assert not any("job.py" in command or "prepare_data" in command for command in hook.commands)
    assert "NOT VERIFIED: there is no environment: it ended with exit code 1" in said
    assert last_commands(said) == last_commands(hook(setup="skip")[1])
    assert Path(".venv").exists() == venv_stays


def test_data_that_cannot_be_fetched_do_not_stop_the_check(hook):
    hook.fails = {"prepare_data": "it ended with exit code 2"}
    code, said = hook()
    check = "PYTHON job.py --check --dataset digits"  # it would ask every mirror again for what is missing
    assert code == 0 and hook.commands[-1] == check and hook.variables[check] == {"FL_DATA_ROOT": ""}
    assert "The data could not be fetched: it ended with exit code 2" in said
    assert f"  PYTHON={sys.executable} sh prepare_data.sh" in said
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{sys.executable} job.py"]


def test_own_images_are_prepared_only_where_they_are_known(hook, monkeypatch):
    said = hook(dataset="image_folder")[1]
    assert "2/3 data: skipped" in said and "FL_DATA_ROOT" in said
    assert hook.commands == ["PYTHON job.py --check"]
    monkeypatch.setenv("FL_DATA_ROOT", "/images")
    hook(dataset="image_folder")
    assert hook.commands[1:] == ["sh prepare_data.sh", "PYTHON job.py --check"]


def test_a_failed_check_is_not_verified_and_tells_how_to_try_again(hook):
    hook.fails = {"--check": "it ended with exit code 1"}
    code, said = hook()
    assert code == 0
    assert "NOT VERIFIED: it ended with exit code 1; what it says is above" in said
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{sys.executable} job.py --check"]


@pytest.mark.parametrize("part", ["-m venv", "-r requirements.txt", "--index-url", "prepare_data", "--check"])
@pytest.mark.parametrize("strict", [False, True])
def test_any_failed_step_is_an_error_only_if_strict(hook, monkeypatch, part, strict):
    if strict:
        monkeypatch.setenv("FL_TEMPLATE_STRICT", "1")
    hook.not_met, hook.fails = ["torch>=2.4"], {part: "failed"}
    assert hook()[0] == (strict and part != "--index-url")


def test_strict_is_content_where_nothing_fails(hook, monkeypatch):
    monkeypatch.setenv("FL_TEMPLATE_STRICT", "1")
    assert hook()[0] == 0
    assert hook(dataset="image_folder")[0] == 0
    assert hook(setup="skip")[0] == 0


@pytest.mark.parametrize("part", ["-m venv", "--index-url", "-r requirements.txt", "prepare_data", "--check"])
def test_nothing_is_started_after_an_interruption(hook, part):
    hook.not_met, hook.fails = ["torch>=2.4"], {part: "interrupted"}
    code, said = hook()
    assert code == 0 and part in hook.commands[-1]
    assert "NOT VERIFIED: " in said and "interrupted" in said
    assert last_commands(said)[0] == f"cd {Path.cwd()}"


def test_an_interruption_of_a_venv_that_is_tried_does_not_remove_it(hook):
    make_venv()
    hook.fails = {"-c ''": "interrupted"}
    code, said = hook()
    assert code == 0 and "NOT VERIFIED: interrupted" in said
    assert Path(OWN).exists() and len(hook.commands) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_of_the_hook_itself_does_not_cost_the_project(hook, error):
    hook.fails = {"prepare_data": error}
    code, said = hook()
    assert code == 0
    assert f"NOT VERIFIED: {'interrupted' if isinstance(error, KeyboardInterrupt) else 'OSError: [Errno 28]'}" in said


def test_nothing_is_installed_where_nvflare_cannot_run(hook, monkeypatch, tmp_path):
    (tmp_path / "my projects").mkdir()
    monkeypatch.chdir(tmp_path / "my projects")
    code, said = hook()
    assert code == 0 and hook.commands == []
    assert "NOT VERIFIED: NVFlare cannot run in a folder whose path has spaces" in said
    assert f"  cd '{Path.cwd()}'" in said


def test_nothing_at_all_is_done_for_a_comparison(hook, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(Path.cwd().parent))
    for folder, compared in [("tmpab_c1xyz", True), ("tmp.ab_c1xyz", False), ("projects", False)]:
        project = Path(tempfile.tempdir, folder, "eyes")
        project.mkdir(parents=True)
        monkeypatch.chdir(project)
        assert (hook(setup="skip", _commit="abc")[1] == "") == compared
        assert hook(setup="skip")[1] != ""  # not by cruft: someone's own project in a temporary folder


@pytest.mark.parametrize(
    ("version", "fits"),
    [(None, False), ("2.8.9", False), ("2.9", True), ("2.9.0", True), ("2.9.2+cpu", True), ("2.10.0", False)],
)
def test_versions_are_compared_as_numbers(hook, monkeypatch, version, fits):
    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    metadata = hook.globals["importlib"].metadata
    monkeypatch.setattr(metadata, "version", installed)
    Path("requirements.txt").write_text("# a comment\nnvflare>=2.9,<2.10  # why\n\n", encoding="utf-8")
    assert hook.names["lacking"]() == ([] if fits else ["nvflare>=2.9,<2.10"])


def test_every_line_of_the_projects_requirements_is_understood(hook):
    for requirement in hook.names["requirements"]():
        assert re.fullmatch(r"[a-z-]+>=[\d.]+(,<[\d.]+)?", requirement)


def test_it_tells_an_interpreter_from_one_that_has_all(hook):
    """The hook runs under .venv's interpreter before it is rendered and after."""
    for requirement, code in [("pytest>=8", 0), ("pytest>=1000", 1), ("no-such-package>=1", 1)]:
        Path("requirements.txt").write_text(requirement, encoding="utf-8")
        done = subprocess.run([sys.executable, HOOK, "lacking"], capture_output=True, text=True)
        assert (done.returncode, done.stderr.strip()) == (code, requirement if code else "")


def test_ctrl_c_while_a_process_is_being_started_leaves_none(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)  # before the caller has got the process

    run = runpy.run_path(str(HOOK))["run"]
    monkeypatch.setattr(subprocess, "Popen", Popen)
    assert run(["sleep", "600"]) == "interrupted"
    assert started[0].poll() is not None


def test_a_command_fails_in_words(hook):
    assert hook.real_run([sys.executable, "-c", ""]) == ""
    assert hook.real_run(["false"]) == "false ended with exit code 1"
    assert hook.real_run(["no-such-command"]) == "cannot run no-such-command: No such file or directory"
    assert hook.real_run(["/"]) == "cannot run /: Permission denied"


def test_a_command_gets_its_variables_and_no_terminal(hook, monkeypatch):
    program = "import os, sys; print(os.environ['A'], os.environ['PIP_RETRIES'], sys.stdin.read() == '', os.getsid(0))"
    monkeypatch.setenv("PIP_RETRIES", "7")
    assert hook.real_run([sys.executable, "-c", program], A="é b") == ""
    assert hook.real_run([sys.executable, "-c", program], quiet=True, A="quiet") == ""
    [line] = hook.capfd.readouterr().out.splitlines()
    assert line.startswith("é b 7 True ") and not line.endswith(f" {os.getsid(0)}")


@pytest.fixture
def server():
    """A web server on this machine that answers each address with the number in it: its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_index_is_asked_whether_it_answers(hook, server):
    has_answer = hook.names["has_answer"]
    assert has_answer(f"{server}/200")
    assert not has_answer(f"{server}/403")
    assert not has_answer("http://127.0.0.1:1/")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not has_answer(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.05)


# The whole hook for real, as cookiecutter runs it: on a project whose job.py only tells what it is told.

JOB = """
import os, pathlib, signal, subprocess, sys
print("job.py", *sys.argv[1:], flush=True)
wait = os.environ.get("WAIT_IN")
if wait and wait in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    pathlib.Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    print("waiting", flush=True)
    signal.pause()
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture(scope="module")
def tiny_template(tmp_path_factory) -> Path:
    template = tmp_path_factory.mktemp("template")
    shutil.copy(TEMPLATE / "cookiecutter.json", template)
    shutil.copytree(TEMPLATE / "hooks", template / "hooks", ignore=shutil.ignore_patterns("__pycache__"))
    project = template / PROJECT.name
    project.mkdir()
    shutil.copy(PROJECT / "prepare_data.sh", project)
    (project / "prepare_data.sh").chmod(0o644)  # as it comes out of a ZIP archive
    (project / "job.py").write_text(JOB, encoding="utf-8")
    (project / "requirements.txt").write_text("pytest>=8\n", encoding="utf-8")
    return template


@pytest.fixture
def start(tiny_template, tmp_path):
    """Start cookiecutter on the tiny template, in a session of its own, as in a terminal: `start(rounds="3")`."""
    started = []

    def start(*options: str, variables=None, **answers) -> subprocess.Popen:
        overrides = [f"{name}={answer}" for name, answer in checked({"setup": "full", **answers}).items()]
        environment = {name: text for name, text in os.environ.items() if not name.startswith("FL_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "cookiecutter", str(tiny_template), "--no-input", *options, *overrides],
            cwd=tmp_path,
            env={**environment, "HOME": str(tmp_path), "PIDS": str(tmp_path / "pids"), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_real_run_does_all_steps_in_plain_lines(start, tmp_path):
    process = start(project_slug="eyes", dataset="digits")
    said = process.communicate()[0]
    assert process.returncode == 0
    jobs = [line for line in said.splitlines() if line.startswith("job.py")]
    assert jobs == ["job.py --prepare_only", "job.py --check"]
    assert last_commands(said) == [f"cd {tmp_path / 'eyes'}", f"{sys.executable} job.py"]
    assert "\r" not in said and "\x1b" not in said


def test_answers_are_data(start):
    name = "\"'\\ {{ 7*7 }} {% raw %} ${HOME} '''\"\"\" é 😀"
    process = start(project_name=as_typed(name), project_slug="eyes")
    said = process.communicate()[0]
    assert process.returncode == 0 and "job.py --check" in said, said


def test_a_failure_keeps_the_project_and_strict_tells_cookiecutter(start, tmp_path):
    process = start(project_slug="kept", variables={"CODE": "1"})
    assert "NOT VERIFIED" in process.communicate()[0]
    assert process.returncode == 0 and (tmp_path / "kept" / "job.py").exists()
    process = start(project_slug="strict", variables={"CODE": "1", "FL_TEMPLATE_STRICT": "1"})
    assert "NOT VERIFIED" in process.communicate()[0]
    assert process.returncode != 0 and not (tmp_path / "strict").exists()


def test_a_path_that_the_terminal_cannot_show_is_no_fault(start, tmp_path):
    process = start("--output-dir", "médias", project_slug="eyes", variables={"PYTHONIOENCODING": "ascii"})
    assert "NOT VERIFIED" not in process.communicate()[0]
    assert process.returncode == 0 and (tmp_path / "médias" / "eyes" / "job.py").exists()


def test_a_reader_that_goes_away_is_no_fault(start, tmp_path):
    process = start(project_slug="eyes")
    process.stdout.close()
    assert process.wait() == 0
    assert (tmp_path / "eyes" / "job.py").exists()


def test_a_second_rendering_over_the_first(start, tmp_path):
    for _ in range(2):
        process = start("--overwrite-if-exists", project_slug="eyes")
        assert "job.py --check" in process.communicate()[0]
        assert process.returncode == 0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("signals", ["terminal", "SIGTERM to the hook"])
@pytest.mark.parametrize("wait_in", ["--prepare_only", "--check"])
def test_ctrl_c_keeps_the_project_and_leaves_no_process(start, tmp_path, wait_in, signals):
    process = start(project_slug="eyes", variables={"WAIT_IN": wait_in})
    for line in process.stdout:
        if line == "waiting\n":
            break
    pids = [int(pid) for pid in (tmp_path / "pids").read_text(encoding="utf-8").split()]
    assert all(is_running(pid) for pid in pids)
    if signals == "terminal":
        os.killpg(process.pid, signal.SIGINT)  # cookiecutter and the hook, not what the hook has started
    else:
        [hook] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(hook), signal.SIGTERM)
    said = process.stdout.read()  # until all that write into it have ended
    assert (process.wait() == 0) == (signals != "terminal")
    assert "NOT VERIFIED: interrupted" in said
    assert (tmp_path / "eyes" / "job.py").exists()
    assert not any(is_running(pid) for pid in pids)
