"""Every command in both READMEs is run as written, or listed here with the reason why not.

A new command fails a test until it is in one of the lists.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from template import PROJECT, TEMPLATE, BakedProject, run, surroundings

JOB, RESULTS, PREDICT = "python job.py", "python results.py", "python predict.py"

RUN_IN_TEMPLATE = ["make demo", "make lint"]
NOT_RUN_IN_TEMPLATE = {
    "uvx cookiecutter gh:OWNER/fl-lightning-template": "needs a network; test_post_gen_real.py renders this copy",
    "make test": "runs this test",
}

RUN_IN_PROJECT = {  # command -> flags added to keep the test short
    "python3 install.py": "",
    ". .venv/bin/activate": "",
    JOB: "",
    f"{JOB} --model LitNet": "--check",
    f"{JOB} --debug site-2": "",
    f"for rate in 0.003 0.01 0.03; do {JOB} --learning_rate $rate --name rate-$rate; done": "",
    f"{RESULTS} 'rate-*'": "",
    f"{JOB} --resume rate-0.01 --num_rounds 2": "",
    f"{JOB} --n_clients 1000 --sites_per_round 50 --num_rounds 20 --evaluate_sites 100": (
        "--n_clients 60 --num_rounds 2 --evaluate_sites 9"
    ),
    RESULTS: "",
    f"{RESULTS} --list": "",
    f"{RESULTS} first second": "",
    f"{RESULTS} 'f*' --test": "",
    f"{RESULTS} first --html": "",
    f"{RESULTS} first second --html": "",
    f"{PREDICT} latest /path/to/image.jpg": "",
    f"{PREDICT} latest /path/to/images --csv": "",
    "python ledger.py runs/first/ledger/site-1.jsonl": "",
    "python compare.py": "",
    f"{JOB} --dataset image_folder --data_root /path/to/images": "--prepare_only",
    f"{JOB} --dataset image_folder --data_root '/path/to/{{site}}/images'": "--prepare_only",
    "make test": "",
    "make lint": "",
}
NOT_RUN_IN_PROJECT = {
    f"{PREDICT} latest --export model.onnx": "needs two packages more; tests/project/test_predict.py runs it",
    f"{JOB} --env poc": "a minute; tests/project/test_sites.py runs it",
    f"{JOB} --dp_epsilon 8": "needs Opacus, which is optional; tests/project/test_dp.py runs it",
    f"{JOB} --env prod --startup_kit KIT --classes classes.txt": "tests/project/test_real_sites.py runs it",
}


def commands(readme: Path) -> list[str]:
    """The commands in ```sh blocks, one per line, without comments."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S):
        assert language in ("sh", "python", "json", ""), f"{readme}: commands belong in ```sh blocks, not {language}"
        if language == "sh":
            lines = block.replace("\\\n", "").splitlines()
            found += [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]
    return found


def commands_of(project: Path) -> list[str]:
    return commands(project / "README.md") + commands(project / "REFERENCE.md")


def environment_in(folder: Path) -> None:
    """Create a .venv of links to the environment of this test, which removing it would not touch."""
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    ready = folder / ".venv" / "ready"  # for make; a file of its own
    ready.unlink(missing_ok=True)
    ready.touch()


def as_typed_in(folder: Path, command: str) -> None:
    """Run a command in a folder as a user would; fail if it fails."""
    home = folder.parent / "home"
    nothing_fetched = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}"}
    code, said = run(["sh", "-c", command], folder, surroundings(home, **nothing_fetched))
    assert code == 0, f"{command}\n{said}"


@pytest.fixture
def project(bake) -> BakedProject:
    return bake(dataset="digits")


def test_every_command_of_the_template_is_run_or_has_a_reason():
    assert set(commands(TEMPLATE / "README.md")) == {*RUN_IN_TEMPLATE, *NOT_RUN_IN_TEMPLATE}


def test_every_command_of_the_project_is_run_or_has_a_reason(project):
    assert set(commands_of(project.path)) == {*RUN_IN_PROJECT, *NOT_RUN_IN_PROJECT}


def test_every_flag_exists(project):
    """Including those of commands that no test runs."""
    helps = {}
    for command in commands_of(project.path):
        program, *words = shlex.split(command)[1:]
        if not program.endswith(".py"):
            continue
        if program not in helps:
            show = [sys.executable, program, "--help"]
            helps[program] = subprocess.check_output(show, cwd=project.path, encoding="utf-8")
        for flag in filter(re.compile("-").match, words):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[program]), command


def test_contributing_lists_every_module_of_the_project():
    text = (TEMPLATE / "CONTRIBUTING.md").read_text(encoding="utf-8")
    programs = [path.relative_to(PROJECT) for path in PROJECT.rglob("*.py")]
    missing = [path for path in programs if path.parts[0] not in ("tests", "deploy") and f"{path.name}`" not in text]
    assert missing == []


def test_every_target_exists():
    makefile = (TEMPLATE / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for command in commands(TEMPLATE / "README.md") if (words := command.split())[0] == "make"]
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.mark.parametrize("folder", [TEMPLATE, PROJECT], ids=["template", "project"])
def test_make_lists_its_targets_in_80_columns(folder):
    listed = subprocess.check_output(["make", "--no-print-directory"], cwd=folder, encoding="utf-8").splitlines()
    assert "make help" in listed[0]
    assert [line for line in listed if len(line) > 80] == []


@pytest.mark.slow
def test_the_commands_of_the_template_work(tmp_path):
    left_behind = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".*_cache")
    template = shutil.copytree(TEMPLATE, tmp_path / "template", ignore=left_behind)
    environment_in(template)
    for command in RUN_IN_TEMPLATE:
        as_typed_in(template, command)


@pytest.mark.slow
def test_the_commands_of_the_project_work(project):
    environment_in(project.path)
    for site in ("site-1", "site-2"):
        for number in range(20):
            image = project.path / site / "images" / "train" / f"class-{number % 2}" / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(image)
    for command, added in RUN_IN_PROJECT.items():  # in this order: results.py shows what job.py made
        command = command.replace("/path/to/images", "site-1/images").replace("/path/to/{site}", "{site}")
        command = command.replace("/path/to/image.jpg", "site-1/images/train/class-0/0.png")
        as_typed_in(project.path, f"{command} {added}")
        if command == JOB:
            newest = (project.path / "runs" / "latest").resolve()
            for name in ("first", "second"):
                shutil.copytree(newest, newest.parent / name)
    assert (project.path / "runs" / "first" / "report.html").exists()
    assert (project.path / "runs" / "comparison.html").exists()


@pytest.mark.slow
def test_commands_work_without_a_venv_if_the_current_python_has_everything(project, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in ("python3 install.py", "make check", "python job.py --check"):
        code, said = run(["sh", "-c", command], project.path, surroundings(tmp_path, PIP_NO_INDEX="1", PATH=path))
        assert code == 0, f"{command}\n{said}"
    assert not (project.path / ".venv").exists()
