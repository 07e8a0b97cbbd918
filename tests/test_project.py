"""A rendered project passes its own tests, and its task runner finds the project's environment."""

import subprocess
import sys

import pytest

TIERS = [pytest.param("not federation", id="fast"), pytest.param("federation", id="federation", marks=pytest.mark.slow)]
LINTERS = ("ruff check .", "ruff format --check .", "mypy")


@pytest.mark.parametrize("tier", TIERS)
def test_its_own_tests_pass(bake, tier):
    project = bake(dataset="digits").path
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", tier], cwd=project, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_uses_the_environment_that_the_setup_created_or_else_the_current_python(bake):
    project = bake().path

    def planned(*words: str) -> list[str]:
        make = ["make", "--dry-run", "--no-print-directory", *words]
        return subprocess.check_output(make, cwd=project, encoding="utf-8").splitlines()

    assert planned("run", "ARGS=--n_clients 5") == ["python3 job.py --n_clients 5"]
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").touch()
    assert planned("run") == [".venv/bin/python job.py "]
    assert planned("check") == [".venv/bin/python job.py --check "]
    install = ".venv/bin/python install.py -r requirements.txt -r requirements-dev.txt"
    assert planned("test") == [install, ".venv/bin/python -m pytest"]
    assert planned("lint") == [install, *(f".venv/bin/python -m {tool}" for tool in LINTERS)]
