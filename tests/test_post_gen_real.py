"""Setting a project up, for real: a federation, an interpreter without the packages, and cruft. Without a network."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from conftest import PROJECT, TEMPLATE, checked

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
VARIABLES = [f"{kind}_proxy" for kind in ("http", "https", "all")]
PROXIES = dict.fromkeys([*VARIABLES, *map(str.upper, VARIABLES)], NOWHERE)


@pytest.fixture
def offline(tmp_path):
    """Run a command without a network; return its exit code and what it says."""

    def offline(*command: str, cwd: Path = tmp_path, **variables: str) -> tuple[int, str]:
        kept = {name: text for name, text in os.environ.items() if not re.match("FL_|PIP_|UV_|NO_PROXY", name, re.I)}
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**kept, **PROXIES, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        return done.returncode, done.stdout

    return offline


def overrides(**answers) -> list[str]:
    return [f"{name}={answer}" for name, answer in checked(answers).items()]


@pytest.mark.federation
def test_cookiecutter_ends_with_a_project_that_has_run(offline, tmp_path):
    answers = overrides(project_slug="eyes", dataset="digits", setup="full")
    code, said = offline(
        sys.executable, "-m", "cookiecutter", str(TEMPLATE), "--no-input", *answers, FL_TEMPLATE_STRICT="1"
    )
    assert code == 0, said
    assert re.search(r"^CHECK PASSED in \d+ s: one round, 2 sites, digits$", said, re.M), said
    assert "\r" not in said and "\x1b" not in said
    assert said.splitlines()[-2:] == [f"  cd {tmp_path / 'eyes'}", f"  {sys.executable} job.py"]
    assert not (tmp_path / "eyes" / ".venv").exists()


def test_offline_without_the_packages_says_why_and_keeps_the_project(offline, tmp_path):
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    hook = tmp_path / "hook.py"
    text = (TEMPLATE / "hooks" / "post_gen_project.py").read_text(encoding="utf-8")
    answers = '\'{"dataset": "digits", "use_gpu": false, "setup": "full"}\''
    hook.write_text(text.replace("{{cookiecutter | tojson | tojson}}", answers), encoding="utf-8")
    project = tmp_path / "eyes"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("__pycache__", "runs", ".venv", ".*_cache"))
    code, said = offline(str(bare / "bin" / "python"), str(hook), cwd=project, PATH="/usr/bin:/bin", PIP_RETRIES="0")
    assert code == 0, said
    assert "No answer: taking the default ones" in said
    assert "NOT VERIFIED: there is no environment: .venv/bin/python -m pip install -r requirements.txt" in said
    assert (project / ".venv" / "bin" / "python").exists()
    assert "2/3" not in said


# What cruft renders to compare is no project: the hook does nothing there. job.py here is one line that leaves a trace.


@pytest.fixture
def cruft(offline, tmp_path):
    pytest.importorskip("cruft")
    template = tmp_path / "template"
    template.mkdir()
    shutil.copy(TEMPLATE / "cookiecutter.json", template)
    shutil.copytree(TEMPLATE / "hooks", template / "hooks", ignore=shutil.ignore_patterns("__pycache__"))
    project = template / PROJECT.name
    project.mkdir()
    shutil.copy(PROJECT / "prepare_data.sh", project)
    (project / ".gitignore").write_text("trace\n", encoding="utf-8")
    (project / "requirements.txt").write_text("pytest>=8\n", encoding="utf-8")
    (project / "job.py").write_text("print('job.py ran')\nopen('trace', 'a').write('ran ')\n", encoding="utf-8")
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def run(*command: str, cwd: Path = tmp_path) -> tuple[int, str]:
        return offline(*command, cwd=cwd, **identity)

    def commit(folder: Path) -> None:
        for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "x"]):
            code, said = run("git", *command, cwd=folder)
            assert code == 0, said

    run.commit, run.template = commit, template
    commit(template)
    return run


def test_cruft_create_sets_up_and_check_diff_and_update_do_not(cruft, tmp_path):
    command = [sys.executable, "-m", "cruft"]
    extra = '{"project_slug": "eyes", "dataset": "digits", "setup": "full"}'
    code, said = cruft(*command, "create", str(cruft.template), "--no-input", "--extra-context", extra)
    assert code == 0 and said.count("job.py ran") == 2, said
    project = tmp_path / "eyes"
    cruft.commit(project)
    assert "up to date" in cruft(*command, "check", cwd=project)[1]

    (cruft.template / PROJECT.name / "NEW.md").write_text("new\n", encoding="utf-8")
    cruft.commit(cruft.template)
    before = set(os.listdir(project))
    for task in (["check"], ["diff"], ["update", "--skip-apply-ask"]):
        said = cruft(*command, *task, cwd=project)[1]
        assert "job.py" not in said and "environment" not in said and "Next" not in said, said
    assert set(os.listdir(project)) - before == {"NEW.md"}
    assert (project / "trace").read_text(encoding="utf-8") == "ran ran "
