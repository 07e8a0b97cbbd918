"""What all tests share: small options, a cache folder of their own, and none of the user's settings."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from settings import Options

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FL_DATA_ROOT", raising=False)
        yield


@pytest.fixture
def options():
    """options(**changes): the options of a run on the digits."""

    def make(**changes) -> Options:
        return Options(**{"dataset": "digits", "n_clients": 2, "gpu": False, "classes": list("0123456789"), **changes})

    return make


class Project:
    """A copy of the project, so that the runs of a test are not among yours."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("runs", ".*", "__pycache__"))

    def run(self, *command: str) -> str:
        """Run one of its programs to the end, which has to be a good one; return what it prints."""
        done = subprocess.run([sys.executable, *command], cwd=self.folder, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")
