"""Paths, questions and helpers for tests of the template and of rendered projects."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jinja2
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEMPLATE = Path(__file__).resolve().parent.parent
PROJECT = TEMPLATE / "{{cookiecutter.__folder}}"
ANSWERS = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
QUESTIONS = {name: default for name, default in ANSWERS.items() if not name.startswith("_")}


def files_of(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, except caches and runs."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    left_behind = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", ".venv", "runs"}
    return [path.as_posix() for path in paths if not left_behind & set(path.parts)]


def is_rendered(name: str) -> bool:
    """Whether a project file may depend on the answers. All others are the same in every project."""
    return name in ("settings.py", "README.md", "pyproject.toml") or (
        name.startswith("deploy/") and not name.endswith(".py")
    )


def as_typed(name: str) -> str:
    """Return a command-line override equivalent to typing `name` at the prompt.

    Cookiecutter renders overrides as templates, but not what is typed, so the name becomes a Jinja string literal.
    """
    return "{{ " + ascii(name) + " }}"


class BakedProject:
    """A rendered project."""

    def __init__(self, path: Path):
        self.path = path

    def files(self) -> list[str]:
        return files_of(self.path)

    def read(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")

    def settings(self) -> dict:
        """Return the project's name and the default of each of its options."""
        found = runpy.run_path(str(self.path / "settings.py"))
        return {"PROJECT_NAME": found["PROJECT_NAME"], **vars(found["Options"]())}

    def parse(self, name: str) -> None:
        """Raise if a file is not valid in its language, or of a type that this method does not know."""
        text, suffix = self.read(name), Path(name).suffix
        if suffix == ".py":
            compile(text, name, "exec", dont_inherit=True)
        elif suffix == ".toml":
            tomllib.loads(text)
        elif suffix in (".yml", ".yaml"):
            list(yaml.safe_load_all(text))
        elif suffix == ".json":
            json.loads(text)
        elif suffix == ".sh":
            subprocess.run(["bash", "-n", str(self.path / name)], check=True)
        elif name == "Makefile":
            subprocess.run(["make", "--dry-run"], cwd=self.path, check=True, stdout=subprocess.DEVNULL)
        elif suffix == ".j2":
            jinja2.Environment().parse(text)
        else:
            assert suffix in (".md", ".txt") or Path(name).name in (".gitignore", "Dockerfile"), f"what is {name}?"

    def ruff(self, *command: str) -> str:
        """Return what ruff reports under the project's own configuration; empty if nothing."""
        return self._report("ruff", *command, "--no-cache")

    def mypy(self) -> str:
        """Return what mypy reports under the project's own configuration; empty if nothing."""
        return self._report("mypy", "--cache-dir", os.devnull)

    def _report(self, tool: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", tool, *arguments], cwd=self.path, capture_output=True, encoding="utf-8"
        )
        return "" if done.returncode == 0 else done.stdout + done.stderr


def checked(answers: dict) -> dict:
    """Add defaults for tests. Fail for unknown questions, which cookiecutter would ignore."""
    assert answers.keys() <= QUESTIONS.keys(), f"no such question: {answers.keys() - QUESTIONS.keys()}"
    return {"setup": "skip", **answers}


def command(template: Path, *options: str, **answers) -> list[str]:
    """The command that renders a template."""
    overrides = [f"{name}={answer}" for name, answer in checked(answers).items()]
    return [sys.executable, "-m", "cookiecutter", str(template), "--no-input", *options, *overrides]


def surroundings(home: Path, **variables: str) -> dict[str, str]:
    """A clean environment: this one without variables that affect the template, with another home."""
    kept = {name: text for name, text in os.environ.items() if not re.search("^(FL|PIP|UV)_|_proxy$", name, re.I)}
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PIP_CONFIG_FILE": os.devnull}
    return {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1", **variables}


def run(command: list, cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run a command without a terminal. Return its exit code and its output, stderr included."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=-1, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    return done.returncode, done.stdout
