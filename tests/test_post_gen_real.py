"""Setting up a real project: a federation, an interpreter without packages, and cruft. Without a network."""

import os
import re
import shutil
import sys
import venv
from pathlib import Path

import pytest

from template import PROJECT, TEMPLATE, command, run, surroundings

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
VARIABLES = [f"{kind}_proxy" for kind in ("http", "https", "all")]
PROXIES = dict.fromkeys([*VARIABLES, *map(str.upper, VARIABLES)], NOWHERE)


@pytest.fixture
def offline(tmp_path):
    """Run a command without a network; return its exit code and output."""

    def offline(*words: str, cwd: Path = tmp_path, **variables: str) -> tuple[int, str]:
        return run([*words], cwd, surroundings(tmp_path, **PROXIES, **variables))

    return offline


@pytest.mark.federation
def test_cookiecutter_ends_with_a_project_that_has_run(offline, tmp_path):
    answers = {"project_slug": "eyes", "dataset": "digits", "setup": "full"}
    code, said = offline(*command(TEMPLATE, **answers), FL_TEMPLATE_STRICT="1")
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
    answers = '\'{"dataset": "digits", "setup": "full"}\''
    hook.write_text(text.replace("{{cookiecutter | tojson | tojson}}", answers), encoding="utf-8")
    project = tmp_path / "eyes"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("__pycache__", "runs", ".venv", ".*_cache"))
    (project / "settings.py").write_text("class Options:\n    gpu = False\n", encoding="utf-8")
    code, said = offline(str(bare / "bin" / "python"), str(hook), cwd=project, PATH="/usr/bin:/bin", PIP_RETRIES="0")
    assert code == 0, said
    assert "No answer: using the default build" in said
    assert "NOT VERIFIED: the environment was not set up: exit code 1, see above" in said
    assert not (project / ".venv").exists() and (project / "job.py").exists()
    assert "2/3" not in said


# For the renderings that cruft only compares, the hook does nothing. Here, job.py only leaves a trace.


@pytest.fixture
def cruft(offline, tmp_path):
    template = tmp_path / "template"
    template.mkdir()
    shutil.copy(TEMPLATE / "cookiecutter.json", template)
    shutil.copytree(TEMPLATE / "hooks", template / "hooks", ignore=shutil.ignore_patterns("__pycache__"))
    project = template / PROJECT.name
    project.mkdir()
    shutil.copy(PROJECT / "install.py", project)
    shutil.copy(PROJECT / "prepare_data.sh", project)
    (project / ".gitignore").write_text("trace\n", encoding="utf-8")
    (project / "requirements.txt").write_text("pytest>=8\n", encoding="utf-8")
    (project / "job.py").write_text("print('job.py ran')\nopen('trace', 'a').write('ran ')\n", encoding="utf-8")
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    class Cruft:
        def __init__(self):
            self.template = template

        def __call__(self, *words: str, cwd: Path = tmp_path) -> tuple[int, str]:
            return offline(*words, cwd=cwd, **identity)

        def commit(self, folder: Path) -> None:
            for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "x"]):
                code, said = self("git", *words, cwd=folder)
                assert code == 0, said

    cruft = Cruft()
    cruft.commit(template)
    return cruft


def test_cruft_create_sets_up_and_check_diff_and_update_do_not(cruft, tmp_path):
    program = [sys.executable, "-m", "cruft"]
    extra = '{"project_slug": "eyes", "dataset": "cifar10", "setup": "full"}'
    code, said = cruft(*program, "create", str(cruft.template), "--no-input", "--extra-context", extra)
    assert code == 0 and said.count("job.py ran") == 2, said
    project = tmp_path / "eyes"
    cruft.commit(project)
    assert "up to date" in cruft(*program, "check", cwd=project)[1]

    (cruft.template / PROJECT.name / "NEW.md").write_text("new\n", encoding="utf-8")
    cruft.commit(cruft.template)
    before = set(os.listdir(project))
    for task in (["check"], ["diff"], ["update", "--skip-apply-ask"]):
        said = cruft(*program, *task, cwd=project)[1]
        assert "job.py" not in said and "environment" not in said and "Next" not in said, said
    assert set(os.listdir(project)) - before == {"NEW.md"}
    assert (project / "trace").read_text(encoding="utf-8") == "ran ran "
