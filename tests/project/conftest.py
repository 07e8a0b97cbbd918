"""What the tests of a rendered project share: the project itself, no network, and none of the user's settings.

The project is rendered as these tests are collected, and its modules are imported from there.
"""

import dataclasses
import os
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from mirrors import Mirror, StandIn, make_bloodmnist, make_cifar10, make_fashion_mnist, md5
from template import TEMPLATE, command, run, surroundings

rendered = tempfile.TemporaryDirectory(prefix="fl-project-")  # removed when Python exits
RENDER = command(
    TEMPLATE, "--accept-hooks", "no", "--output-dir", rendered.name, project_slug="project", dataset="digits"
)
code, said = run(RENDER, Path(rendered.name), surroundings(Path(rendered.name)))
assert code == 0, said
sys.path.insert(0, f"{rendered.name}/project")

from federation.site import catalog  # noqa: E402
from programs import Project  # noqa: E402
from settings import Options  # noqa: E402

SURROUNDINGS = ("FL_DATA_ROOT", "FL_SHARE_COUNTS", "FL_SKIP_UNREADABLE", "FL_DATA_MIRROR", "FL_DATA_TIMEOUT")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A home for all tests together, so that the digits are converted once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", autouse=True)
def shared_cache(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    """What the user has set for real runs does not reach a test, nor does what one test opened reach the next."""
    for name in (*SURROUNDINGS, *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    yield
    if "data" in sys.modules:  # it keeps open what it has opened
        for value in vars(sys.modules["data"]).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder for this test alone, and the folder in it that will hold the data."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return catalog.cache_folder()


@pytest.fixture
def permissions_bind(tmp_path) -> None:
    """Skips a test where every file may be read, whatever its permissions: as root, and on Windows."""
    (tmp_path / "locked").mkdir(mode=0)
    if os.access(tmp_path / "locked", os.R_OK):
        pytest.skip("this user may read and write everything")


@pytest.fixture
def options():
    """Makes the options of a run: small defaults, and what a test changes."""

    def make(**changes) -> Options:
        classes = list("0123456789") if changes.get("dataset", "digits") == "digits" else []
        return Options(**{"dataset": "digits", "n_clients": 2, "gpu": False, "classes": classes, **changes})

    return make


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def stand_ins() -> dict[str, StandIn]:
    return {"cifar10": make_cifar10(), "fashion_mnist": make_fashion_mnist(), "bloodmnist": make_bloodmnist()}


@pytest.fixture
def publish(stand_ins, monkeypatch):
    """publish(dataset, *mirrors): from now on the data set is its stand-in, and comes from these mirrors."""

    def replace(dataset: str, *mirrors: str) -> StandIn:
        stand_in = stand_ins[dataset]
        files = tuple((name, md5(content)) for name, content in stand_in.files.items())
        source = dataclasses.replace(catalog.SOURCES[dataset], files=files, mirrors=mirrors)
        monkeypatch.setitem(catalog.SOURCES, dataset, source)
        if dataset == "cifar10":
            from torchvision.datasets import CIFAR10

            inner = stand_in.inner_md5
            monkeypatch.setattr(CIFAR10, "train_list", [[n, inner[n]] for n in inner if n.startswith("data_batch")])
            monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", inner["test_batch"]]])
            monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": inner["batches.meta"]})
        return stand_in

    return replace


@pytest.fixture
def mirror(stand_ins):
    """mirror(behave): a running mirror of all stand-ins that behaves like this."""
    started = []
    files = {name: content for stand_in in stand_ins.values() for name, content in stand_in.files.items()}

    def start(behave) -> Mirror:
        server = Mirror(behave, files)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.test_is_over.set()
        server.shutdown()
        server.server_close()
