"""The hook that sets a project up: every branch with fake processes, and all of it for real on a tiny project."""

import ast
import contextlib
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from template import ANSWERS, PROJECT, QUESTIONS, TEMPLATE, as_typed, command, surroundings

HOOK = TEMPLATE / "hooks" / "post_gen_project.py"
VENV_PYTHON = ".venv/bin/python"
DEFAULTS = {
    "project_name": "Eyes",
    "project_slug": "eyes",
    "dataset": "cifar10",
    "num_clients": "2",
    "rounds": "2",
    "use_gpu": False,
    "setup": "full",
}
PLAN, INSTALL, FETCH, CHECK = "PYTHON install.py --plan", "PYTHON install.py", "sh prepare_data.sh", "job.py --check"


class Hook:
    """The hook's functions before it is rendered, in a project, with processes that are recorded instead of started.

    `fails` says which of them fail: {end of the command: reason}; `interrupted_in` is where Ctrl-C is pressed.
    """

    def __init__(self, monkeypatch, capfd):
        names = runpy.run_path(str(HOOK))
        self.run, self.globals = names["run"], names["main"].__globals__
        self.capfd, self.commands, self.options = capfd, [], {}
        self.fails, self.interrupted_in, self.makes_venv = {}, None, False
        monkeypatch.setitem(self.globals, "run", self.fake_run)
        monkeypatch.setitem(self.globals, "terminal_for_us", contextlib.nullcontext)  # it stays with pytest
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def fake_run(self, *words: str, **options) -> str:
        line = shlex.join(words).replace(sys.executable, "PYTHON")
        self.commands.append(line)
        self.options[line] = options
        if line == INSTALL and self.makes_venv:
            Path(VENV_PYTHON).parent.mkdir(parents=True)
            Path(VENV_PYTHON).touch()
        if self.interrupted_in and line.endswith(self.interrupted_in):
            self.globals["received"].append(True)
            return "interrupted"
        return next((reason for end, reason in self.fails.items() if line.endswith(end)), "")

    def __call__(self, **answers) -> tuple[int, str]:
        """Run the hook; return its exit code and output."""
        code = self.globals["main"]({**DEFAULTS, **answers})
        return code, self.capfd.readouterr().out


@pytest.fixture
def hook(monkeypatch, capfd, tmp_path) -> Hook:
    (tmp_path / "eyes").mkdir()
    monkeypatch.chdir(tmp_path / "eyes")
    for name in ("FL_TEMPLATE_STRICT", "FL_DATA_ROOT", "FL_DATA_TIMEOUT", "FL_CHECK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return Hook(monkeypatch, capfd)


def last_commands(said: str) -> list[str]:
    """Return the indented lines at the end: commands to type, the first one a cd into the project."""
    lines = said.rstrip().splitlines()
    return [line.strip() for line in lines[max(i for i, line in enumerate(lines) if not line.startswith("  ")) + 1 :]]


def test_skip_starts_nothing_and_prints_the_commands_for_each_step(hook):
    code, said = hook(setup="skip")
    assert code == 0 and hook.commands == []
    assert last_commands(said) == [
        f"cd {Path.cwd()}",
        "python3 install.py",
        "sh prepare_data.sh",
        ".venv/bin/python job.py --check  # python3 if no .venv",
    ]


def test_the_steps_are_the_projects_own_commands(hook):
    code, said = hook()
    assert code == 0
    assert hook.commands == [PLAN, INSTALL, FETCH, f"PYTHON {CHECK}"]
    assert hook.options[FETCH] == {"PYTHON": sys.executable}
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{sys.executable} job.py"]


def test_the_projects_own_interpreter_is_used_if_there_is_one(hook):
    hook.makes_venv = True
    code, said = hook()
    assert code == 0
    assert hook.commands == [PLAN, INSTALL, FETCH, f"{VENV_PYTHON} {CHECK}"]
    assert hook.options[FETCH] == {"PYTHON": VENV_PYTHON}
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{VENV_PYTHON} job.py"]


def test_the_plan_comes_first_and_each_step_prints_its_time(hook):
    said = hook()[1]
    order = ["1. environment: ", "170 MB", "3. check", "== 1/3 environment: ", "== 2/3 data: ", "== 3/3 check: "]
    assert [said.index(text) for text in order] == sorted(said.index(text) for text in order)
    assert said.count("done (0 s)") == 3


@pytest.mark.parametrize(
    ("dataset", "size"),
    [("cifar10", "170 MB"), ("fashion_mnist", "30 MB"), ("bloodmnist", "35 MB"), ("digits", "no download")],
)
def test_the_plan_and_the_question_agree_on_the_download_size(hook, dataset, size):
    assert f"2. data: {dataset}, {size}" in hook(dataset=dataset)[1]
    assert size in ANSWERS["__prompts__"]["dataset"][dataset]


@pytest.mark.parametrize("setup", ["full", "skip"])
@pytest.mark.parametrize("fails", ["nothing", "install.py", FETCH, CHECK])
@pytest.mark.parametrize("dataset", QUESTIONS["dataset"])
def test_the_output_fits_80_columns_except_for_paths(hook, dataset, fails, setup):
    hook.makes_venv, hook.fails = True, {fails: "exit code 1"}
    said = hook(dataset=dataset, setup=setup)[1]
    said = said.replace("1. environment: ", "\n")  # the plan follows, which is not run here
    said = said.replace(str(Path.cwd()), "eyes").replace(sys.executable, "python3")
    assert [line for line in said.splitlines() if len(line) > 80] == []


def test_the_plan_has_the_time_limits_and_how_to_set_them(hook, monkeypatch):
    said = hook()[1]
    assert "at most 600 s (FL_DATA_TIMEOUT)" in said and "at most 300 s (FL_CHECK_TIMEOUT)" in said
    assert hook.options[f"PYTHON {CHECK}"] == {"limit": 300}
    monkeypatch.setenv("FL_DATA_TIMEOUT", "60")
    monkeypatch.setenv("FL_CHECK_TIMEOUT", "90")
    said = hook()[1]
    assert "at most 60 s (FL_DATA_TIMEOUT)" in said and "at most 90 s (FL_CHECK_TIMEOUT)" in said
    assert hook.options[f"PYTHON {CHECK}"] == {"limit": 90}


def test_a_limit_that_is_not_a_number_is_reported_before_anything_starts(hook, monkeypatch):
    monkeypatch.setenv("FL_CHECK_TIMEOUT", "soon")
    code, said = hook()
    assert code == 0 and hook.commands == []
    assert "NOT VERIFIED: FL_CHECK_TIMEOUT must be a whole number of seconds, not 'soon'" in said


def test_for_digits_nothing_is_fetched(hook):
    said = hook(dataset="digits")[1]
    assert "2/3 data: nothing to fetch" in said
    assert hook.commands == [PLAN, INSTALL, f"PYTHON {CHECK}"]


def test_own_images_are_prepared_only_if_their_folder_is_known(hook, monkeypatch):
    said = hook(dataset="image_folder")[1]
    assert "2/3 data: skipped" in said and "FL_DATA_ROOT" in said
    assert hook.commands[2:] == [f"PYTHON {CHECK} --dataset digits"]
    assert last_commands(said)[1].startswith(f"{sys.executable} job.py --data_root FOLDER")
    monkeypatch.setenv("FL_DATA_ROOT", "/images")
    hook(dataset="image_folder")
    assert hook.commands[5:] == [FETCH, f"PYTHON {CHECK}"]


def test_without_an_environment_the_other_steps_are_not_tried(hook):
    hook.fails = {"install.py": "exit code 1"}
    code, said = hook()
    assert code == 0 and hook.commands == [PLAN, INSTALL]
    assert "NOT VERIFIED: the environment was not set up: exit code 1, see above" in said
    assert last_commands(said) == last_commands(hook(setup="skip")[1])


@pytest.mark.parametrize("makes_venv", [False, True])
def test_a_failed_download_does_not_stop_the_check(hook, makes_venv):
    hook.fails, hook.makes_venv = {FETCH: "exit code 2"}, makes_venv
    code, said = hook()
    check = f"{VENV_PYTHON if makes_venv else 'PYTHON'} {CHECK} --dataset digits"  # it would ask every mirror again
    assert code == 0 and hook.commands[-1] == check and hook.options[check]["FL_DATA_ROOT"] == ""
    assert "cifar10 could not be fetched: exit code 2, see above" in said and "NOT VERIFIED" not in said
    assert last_commands(said)[1:] == [FETCH if makes_venv else f"PYTHON={sys.executable} {FETCH}"]


def test_a_failed_check_is_not_verified_and_says_how_to_try_again(hook):
    hook.fails = {CHECK: "exit code 1"}
    code, said = hook()
    assert code == 0
    assert "NOT VERIFIED: exit code 1, see above" in said
    assert last_commands(said) == [f"cd {Path.cwd()}", f"{sys.executable} job.py --check"]


@pytest.mark.parametrize("end", ["install.py", FETCH, "--check"])
@pytest.mark.parametrize("strict", [False, True])
def test_any_failed_step_is_an_error_only_if_strict(hook, monkeypatch, end, strict):
    if strict:
        monkeypatch.setenv("FL_TEMPLATE_STRICT", "1")
    hook.fails = {end: "failed"}
    assert hook()[0] == strict


def test_strict_passes_if_nothing_fails(hook, monkeypatch):
    monkeypatch.setenv("FL_TEMPLATE_STRICT", "1")
    assert hook()[0] == 0
    assert hook(dataset="image_folder")[0] == 0
    assert hook(setup="skip")[0] == 0


@pytest.mark.parametrize("end", ["--plan", "install.py", FETCH, "--check"])
def test_nothing_is_started_after_an_interruption(hook, end):
    hook.interrupted_in = end
    code, said = hook()
    assert code == 0 and hook.commands[-1].endswith(end)
    assert "NOT VERIFIED: " in said and "interrupted" in said
    assert last_commands(said)[0] == f"cd {Path.cwd()}" and "--check" in last_commands(said)[-1]


@pytest.mark.parametrize("name", ["my projects", "my\tprojects", "Ann's", 'so "called"', "back\\slash", "#1"])
def test_nothing_is_installed_in_a_path_that_nvflare_does_not_support(hook, monkeypatch, tmp_path, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    code, said = hook()
    assert code == 0 and hook.commands == []
    assert "NOT VERIFIED: NVFlare does not run in paths with spaces, quotes, \\ or #\nMove the project first." in said
    assert f"  cd {shlex.quote(str(Path.cwd()))}" in said


def test_the_hook_rejects_the_same_paths_as_the_project(hook):
    code = ast.parse((PROJECT / "federation" / "launch" / "options.py").read_text(encoding="utf-8"))
    rules = {ast.unparse(node.targets[0]): node.value for node in code.body if isinstance(node, ast.Assign)}
    assert hook.globals["UNSUPPORTED_PATH"] == ast.literal_eval(rules["UNSUPPORTED_PATH"])


def test_nothing_is_done_for_a_comparison_by_cruft(hook, monkeypatch):
    temporary = Path.cwd().parent
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for folder, compared in [("tmpab_c1xyz", True), ("tmp.ab_c1xyz", False), ("projects", False)]:
        project = temporary / folder / "eyes"
        project.mkdir(parents=True)
        monkeypatch.chdir(project)
        assert (hook(setup="skip", _commit="abc")[1] == "") == compared
        assert hook(setup="skip")[1] != ""  # not by cruft: a user's project in a temporary folder


def test_ctrl_c_while_a_process_starts_leaves_none(hook, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            hook.globals["received"].append(True)  # before the caller has the process

    monkeypatch.setattr(subprocess, "Popen", Popen)
    assert hook.run("sleep", "600") == "interrupted"
    assert started[0].poll() is not None


def test_a_failed_command_has_a_readable_reason(hook):
    assert hook.run(sys.executable, "-c", "") == ""
    assert hook.run("false") == "exit code 1"
    assert hook.run("no-such-command") == "cannot run no-such-command: No such file or directory"
    assert hook.run("/") == "cannot run /: Permission denied"


def test_a_command_gets_its_variables_and_no_terminal(hook):
    program = "import os, sys; print(os.environ['A'], sys.stdin.read() == '', os.getsid(0) == os.getpid())"
    assert hook.run(sys.executable, "-c", program, A="é b") == ""
    assert hook.capfd.readouterr().out == "é b True True\n"


# The whole hook for real, as cookiecutter runs it, on a project whose job.py only prints its arguments.

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
    shutil.copy(PROJECT / "install.py", project)
    shutil.copy(PROJECT / "prepare_data.sh", project)
    (project / "prepare_data.sh").chmod(0o644)  # as it comes out of a ZIP archive
    (project / "job.py").write_text(JOB, encoding="utf-8")
    (project / "requirements.txt").write_text("pytest>=8\n", encoding="utf-8")
    return template


@pytest.fixture
def start(tiny_template, tmp_path):
    """Start cookiecutter on the tiny template in a new session, as in a terminal: `start(rounds="3")`."""
    started = []

    def start(*options: str, variables=None, **answers) -> subprocess.Popen:
        process = subprocess.Popen(
            command(tiny_template, *options, **{"setup": "full", **answers}),
            cwd=tmp_path,
            env=surroundings(tmp_path, PIDS=str(tmp_path / "pids"), **(variables or {})),
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
        if process.stdout:
            process.stdout.close()


def test_a_real_run_does_all_steps_without_control_characters(start, tmp_path):
    process = start(project_slug="eyes")
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


def test_a_failure_keeps_the_project_unless_strict(start, tmp_path):
    process = start(project_slug="kept", variables={"CODE": "1"})
    assert "NOT VERIFIED" in process.communicate()[0]
    assert process.returncode == 0 and (tmp_path / "kept" / "job.py").exists()
    process = start(project_slug="strict", variables={"CODE": "1", "FL_TEMPLATE_STRICT": "1"})
    assert "NOT VERIFIED" in process.communicate()[0]
    assert process.returncode != 0 and not (tmp_path / "strict").exists()


def test_a_path_that_the_terminal_cannot_show_is_not_an_error(start, tmp_path):
    process = start("--output-dir", "médias", project_slug="eyes", variables={"PYTHONIOENCODING": "ascii"})
    assert "NOT VERIFIED" not in process.communicate()[0]
    assert process.returncode == 0 and (tmp_path / "médias" / "eyes" / "job.py").exists()


def test_a_closed_pipe_is_not_an_error(start, tmp_path):
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
        os.killpg(process.pid, signal.SIGINT)  # cookiecutter and the hook, not the processes of the hook
    else:
        [hook] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(hook), signal.SIGTERM)
    said = process.stdout.read()  # until all its writers have ended
    assert (process.wait() == 0) == (signals != "terminal")
    assert "NOT VERIFIED: interrupted" in said
    assert (tmp_path / "eyes" / "job.py").exists()
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_check_that_hangs_is_ended(start, tmp_path):
    process = start(project_slug="eyes", variables={"WAIT_IN": "--check", "FL_CHECK_TIMEOUT": "1"})
    said = process.communicate()[0]
    assert process.returncode == 0 and "waiting" in said
    assert "NOT VERIFIED: timed out after 1 s" in said
    pids = (tmp_path / "pids").read_text(encoding="utf-8").split()
    assert len(pids) == 2 and not any(is_running(int(pid)) for pid in pids)
