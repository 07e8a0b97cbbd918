"""A rendered project passes its own tests."""

import subprocess
import sys

import pytest

TIERS = [pytest.param("not federation", id="fast"), pytest.param("federation", id="federation", marks=pytest.mark.slow)]


@pytest.mark.parametrize("tier", TIERS)
def test_its_own_tests_pass(bake, tier):
    project = bake(dataset="digits").path
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", tier], cwd=project, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
