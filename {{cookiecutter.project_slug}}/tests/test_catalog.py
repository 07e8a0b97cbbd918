"""Public data sets, from a server on this machine that has every fault a mirror can have.

The data sets are small stand-ins in the layout of the real ones, made of scikit-learn's digits.
"""

import dataclasses
import gzip
import hashlib
import io
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from federation import catalog, fetch
from federation.catalog import open_split, prepare
from federation.fetch import DataError

PROJECT = Path(__file__).parents[1]
ARCHIVE = "cifar-10-python.tar.gz"


# ---- stand-ins for the public data sets


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def drawings(start: int, n: int, enlarge: int) -> tuple[np.ndarray, np.ndarray]:
    """n digits from `start` on, uint8 (n, 8 * enlarge, 8 * enlarge), and their labels."""
    digits = load_digits()
    pixels = (digits.images[start : start + n] * 15).astype(np.uint8)
    return pixels.repeat(enlarge, axis=1).repeat(enlarge, axis=2), digits.target[start : start + n]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A data set's files, what must come out of them, and for CIFAR-10 the checksums of what is in the archive."""

    files: dict[str, bytes]
    train: tuple[np.ndarray, np.ndarray]  # images as the source has them, labels
    test: tuple[np.ndarray, np.ndarray]
    inner_md5: dict[str, str] = dataclasses.field(default_factory=dict)


def make_cifar10() -> StandIn:
    parts = {f"data_batch_{i + 1}": drawings(20 * i, 20, enlarge=4) for i in range(5)}
    parts["test_batch"] = drawings(100, 20, enlarge=4)
    pickles = {
        name: pickle.dumps({"data": images.reshape(20, 1, -1).repeat(3, 1).reshape(20, -1), "labels": labels.tolist()})
        for name, (images, labels) in parts.items()
    }
    pickles["batches.meta"] = pickle.dumps({"label_names": [f"digit {i}" for i in range(10)]})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in pickles.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return StandIn(
        files={ARCHIVE: packed.getvalue()},
        train=drawings(0, 100, enlarge=4),
        test=parts["test_batch"],
        inner_md5={name: md5(content) for name, content in pickles.items()},
    )


def make_fashion_mnist() -> StandIn:
    def idx(array: np.ndarray) -> bytes:
        header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
        return gzip.compress(header + array.astype(np.uint8).tobytes())

    def framed(start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = drawings(start, n, enlarge=3)
        return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels

    train, test = framed(0, 40), framed(40, 10)
    files = {}
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
    return StandIn(files, train, test)


def make_bloodmnist() -> StandIn:
    arrays = {}
    for split, start, n in (("train", 0, 30), ("val", 30, 10), ("test", 40, 10)):
        images, labels = drawings(start, n, enlarge=4)
        arrays[f"{split}_images"] = images[:, 2:-2, 2:-2, np.newaxis].repeat(3, axis=3)
        arrays[f"{split}_labels"] = labels[:, np.newaxis].astype(np.uint8) % 8
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    images, labels = (np.concatenate([arrays[f"train_{kind}"], arrays[f"val_{kind}"]]) for kind in ("images", "labels"))
    return StandIn(
        files={"bloodmnist.npz": packed.getvalue()},
        train=(images, labels.ravel()),
        test=(arrays["test_images"], arrays["test_labels"].ravel()),
    )


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


# ---- mirrors: what they do when asked for a file


def good(handler, content: bytes) -> None:
    send(handler, content, len(content))


def truncated(handler, content: bytes) -> None:
    send(handler, content[: len(content) // 2], len(content))


def wrong(handler, content: bytes) -> None:
    send(handler, content[::-1], len(content))


def missing(handler, content: bytes) -> None:
    handler.send_error(404)


def hangs(handler, content: bytes) -> None:
    handler.server.test_is_over.wait()


def trickles(handler, content: bytes) -> None:
    send(handler, content[:2048], 10**13)
    handler.server.test_is_over.wait()


def send(handler, content: bytes, announced: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(announced))
    handler.end_headers()
    handler.wfile.write(content)


class Mirror(ThreadingHTTPServer):
    """Serves files on a free port, in one of the ways above, and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, behave, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.files = behave, files
        self.requests: list[str] = []
        self.test_is_over = threading.Event()
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.requests.append(name)
        self.server.behave(self, self.server.files[name])

    def log_message(self, *args):
        pass


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


@pytest.fixture
def closed_port() -> str:
    """The address of a mirror where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


FAULTS = {  # behaviour -> what the user is told
    truncated: "the connection broke off",
    wrong: "wrong checksum",
    missing: "answers 404",
    hangs: "nothing came for",
    trickles: "too slow",
}


@pytest.fixture(params=FAULTS, ids=lambda behave: behave.__name__)
def bad(request, mirror, monkeypatch):
    """A mirror with a fault, and the limits so low that the fault shows at once."""
    monkeypatch.setattr(fetch, "READ_S", 0.4 if request.param is hangs else 15.0)
    monkeypatch.setattr(fetch, "JUDGE_AFTER_S", -1.0 if request.param is trickles else 10.0)
    server = mirror(request.param)
    server.reason = FAULTS[request.param]
    return server


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failure(dataset: str = "cifar10", root: Path | None = None) -> str:
    """The one line that the user is told."""
    with pytest.raises(DataError) as error:
        prepare(dataset, root, 32)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what comes out


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist", "bloodmnist"])
@pytest.mark.parametrize("image_size", [32, 28])
def test_a_data_set_becomes_colour_images_of_the_size_asked_for(
    dataset, image_size, mirror, publish, stand_ins, empty_cache
):
    stand_in = publish(dataset, mirror(good).url)
    store = prepare(dataset, None, image_size)
    for split, (images, labels) in (("train", stand_in.train), ("test", stand_in.test)):
        opened = open_split(store, split)
        assert opened.images.shape == (len(images), 3, image_size, image_size)
        assert (opened.images.dtype, opened.labels.dtype) == (np.uint8, np.int64)
        assert opened.labels.tolist() == labels.tolist()
        assert opened.images.mean() == pytest.approx(images.mean(), rel=0.02)


@pytest.mark.parametrize(("dataset", "own_size"), [("cifar10", 32), ("fashion_mnist", 28), ("bloodmnist", 28)])
def test_pixels_stay_as_they_are_at_the_data_sets_own_size(dataset, own_size, mirror, publish, empty_cache):
    stand_in = publish(dataset, mirror(good).url)
    images = stand_in.train[0]
    colour = images if images.ndim == 4 else images[..., np.newaxis].repeat(3, axis=3)
    opened = open_split(prepare(dataset, None, own_size), "train")
    assert np.array_equal(opened.images, colour.transpose(0, 3, 1, 2))


def test_the_classes_of_cifar10_come_from_its_archive(mirror, publish, empty_cache):
    publish("cifar10", mirror(good).url)
    assert open_split(prepare("cifar10", None, 32), "train").classes == [f"digit {i}" for i in range(10)]


@pytest.mark.parametrize(("dataset", "n_classes"), [("fashion_mnist", 10), ("bloodmnist", 8)])
def test_every_label_has_a_class(dataset, n_classes, mirror, publish, empty_cache):
    publish(dataset, mirror(good).url)
    opened = open_split(prepare(dataset, None, 32), "train")
    assert len(set(opened.classes)) == n_classes > opened.labels.max()


def test_images_are_mapped_and_cannot_be_written(mirror, publish, empty_cache):
    publish("cifar10", mirror(good).url)
    images = open_split(prepare("cifar10", None, 32), "train").images
    assert isinstance(images.base, np.memmap)
    assert not images.flags.writeable


def test_digits_come_without_any_network():
    store = prepare("digits", None, 32)
    train, test = open_split(store, "train"), open_split(store, "test")
    assert (train.images.shape, test.images.shape) == ((1437, 3, 32, 32), (360, 3, 32, 32))
    assert (train.labels.shape, test.labels.shape) == ((1437,), (360,))
    assert train.classes == [str(i) for i in range(10)]


def test_digits_use_the_whole_range_of_pixels():
    images = open_split(prepare("digits", None, 32), "train").images
    assert images.dtype == np.uint8
    assert np.unique(images).tolist() == np.round(np.arange(17) * 255 / 16).astype(int).tolist()


def test_digits_are_enlarged_four_times_and_grey():
    images = open_split(prepare("digits", None, 32), "test").images
    assert np.array_equal(images, images[:, :1, ::4, ::4].repeat(3, axis=1).repeat(4, axis=2).repeat(4, axis=3))


def test_the_test_split_of_digits_has_every_class_in_its_proportion():
    store = prepare("digits", None, 32)
    train, test = (np.bincount(open_split(store, split).labels) for split in ("train", "test"))
    assert np.abs(test - (train + test) * 0.2).max() <= 1


def test_digits_are_the_same_bytes_in_every_cache(empty_cache, monkeypatch, tmp_path):
    first = prepare("digits", None, 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    second = prepare("digits", None, 32)
    assert first != second
    assert names_in(first) == names_in(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names_in(first))


def test_an_unknown_data_set_is_answered_with_the_known_ones():
    message = failure("imagenet")
    assert all(name in message for name in ("imagenet", "cifar10", "digits", "image_folder"))


# ---- mirrors


def test_the_first_mirror_is_enough_if_it_is_good(mirror, publish, empty_cache):
    first, second = mirror(good), mirror(good)
    publish("cifar10", first.url, second.url)
    prepare("cifar10", None, 32)
    assert (first.requests, second.requests) == ([ARCHIVE], [])


def test_a_good_mirror_makes_up_for_a_bad_one(bad, mirror, publish, empty_cache):
    stand_in = publish("cifar10", bad.url, mirror(good).url)
    store = prepare("cifar10", None, 32)
    assert open_split(store, "train").labels.tolist() == stand_in.train[1].tolist()


def test_what_a_bad_mirror_did_is_said(bad, mirror, publish, empty_cache, capfd):
    publish("cifar10", bad.url, mirror(good).url)
    prepare("cifar10", None, 32)
    assert f"{bad.host}: {bad.reason}" in capfd.readouterr().err


def test_only_the_right_file_is_kept(bad, mirror, publish, empty_cache):
    stand_in = publish("cifar10", bad.url, mirror(good).url)
    store = prepare("cifar10", None, 32)
    assert names_in(empty_cache) == sorted([ARCHIVE, store.name, f"{store.name}.lock"])
    assert (empty_cache / ARCHIVE).read_bytes() == stand_in.files[ARCHIVE]


def test_nothing_is_kept_if_every_mirror_is_bad(bad, publish, empty_cache):
    publish("cifar10", bad.url)
    failure()
    assert names_in(empty_cache) == ["cifar10-32px.lock"]


def test_the_error_names_each_host_and_what_it_did(bad, mirror, publish, closed_port, empty_cache):
    publish("cifar10", closed_port, bad.url)
    message = failure()
    assert f"{closed_port[7:-1]}: connection refused" in message
    assert f"{bad.host}: {bad.reason}" in message


def test_the_error_names_every_way_out(mirror, publish, empty_cache):
    stand_in = publish("cifar10", mirror(missing).url)
    message = failure()
    ways = ["./prepare_data.sh", "FL_DATA_MIRROR", ARCHIVE, md5(stand_in.files[ARCHIVE]), str(empty_cache)]
    assert [way for way in [*ways, "--dataset digits"] if way not in message] == []


def test_a_private_mirror_is_asked_first(mirror, publish, empty_cache, monkeypatch):
    private, public = mirror(good), mirror(good)
    publish("cifar10", public.url)
    monkeypatch.setenv("FL_DATA_MIRROR", private.url.rstrip("/"))
    prepare("cifar10", None, 32)
    assert (private.requests, public.requests) == ([ARCHIVE], [])


def test_the_public_mirrors_make_up_for_a_bad_private_one(mirror, publish, empty_cache, monkeypatch):
    private, public = mirror(missing), mirror(good)
    publish("cifar10", public.url)
    monkeypatch.setenv("FL_DATA_MIRROR", private.url)
    prepare("cifar10", None, 32)
    assert (private.requests, public.requests) == ([ARCHIVE], [ARCHIVE])


def test_a_private_mirrors_password_is_not_shown(mirror, publish, empty_cache, monkeypatch, capfd):
    private = mirror(missing)
    publish("cifar10")
    monkeypatch.setenv("FL_DATA_MIRROR", f"http://user:secret@{private.host}/")
    assert "secret" not in failure() + "".join(capfd.readouterr())


def test_no_mirror_is_tried_once_the_time_is_up(mirror, publish, empty_cache, monkeypatch):
    server = mirror(good)
    publish("cifar10", server.url)
    monkeypatch.setenv("FL_DATA_TIMEOUT", "-1")
    assert f"{server.host}: not tried" in failure()
    assert server.requests == []


def test_a_time_limit_that_is_no_number_is_named(mirror, publish, empty_cache, monkeypatch):
    publish("cifar10", mirror(good).url)
    monkeypatch.setenv("FL_DATA_TIMEOUT", "ten minutes")
    assert "FL_DATA_TIMEOUT is a number of seconds, not 'ten minutes'" in failure()


# ---- what is there already


def test_a_second_preparation_asks_nobody(mirror, publish, empty_cache):
    server = mirror(good)
    publish("cifar10", server.url)
    assert prepare("cifar10", None, 32) == prepare("cifar10", None, 32)
    assert server.requests == [ARCHIVE]


def test_another_image_size_uses_the_archive_that_is_there(mirror, publish, empty_cache):
    server = mirror(good)
    publish("cifar10", server.url)
    assert prepare("cifar10", None, 32) != prepare("cifar10", None, 16)
    assert server.requests == [ARCHIVE]


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist", "bloodmnist"])
def test_files_that_lie_under_the_data_root_are_used_and_left_alone(dataset, mirror, publish, empty_cache, tmp_path):
    server = mirror(good)
    stand_in = publish(dataset, server.url)
    root = tmp_path / "brought by hand"
    root.mkdir()
    for name, content in stand_in.files.items():
        (root / name).write_bytes(content)
    root.chmod(0o555)
    store = prepare(dataset, root, 32)
    assert server.requests == []
    assert names_in(root) == sorted(stand_in.files)
    assert open_split(store, "train").labels.tolist() == stand_in.train[1].tolist()


def test_a_corrupt_archive_under_the_data_root_is_fetched_anew(mirror, publish, empty_cache, tmp_path):
    server = mirror(good)
    stand_in = publish("cifar10", server.url)
    (tmp_path / ARCHIVE).write_bytes(stand_in.files[ARCHIVE][:-1])
    store = prepare("cifar10", tmp_path, 32)
    assert server.requests == [ARCHIVE]
    assert open_split(store, "train").labels.tolist() == stand_in.train[1].tolist()


def test_a_corrupt_archive_that_cannot_be_replaced_is_named(mirror, publish, empty_cache, tmp_path):
    publish("cifar10", mirror(missing).url)
    (tmp_path / ARCHIVE).write_bytes(b"not what it should be")
    assert f"{tmp_path / ARCHIVE}: wrong checksum" in failure(root=tmp_path)


def test_the_archive_is_kept_in_the_data_root_that_was_given(mirror, publish, empty_cache, tmp_path):
    publish("cifar10", mirror(good).url)
    prepare("cifar10", tmp_path / "data" / "shared", 32)
    assert names_in(tmp_path / "data" / "shared") == [ARCHIVE]


def test_a_data_root_that_cannot_be_made_is_named(mirror, publish, empty_cache, tmp_path):
    publish("cifar10", mirror(good).url)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "data") in failure(root=tmp_path / "file" / "data")


@pytest.mark.parametrize(("mode", "said"), [(0o555, "cannot write"), (0o000, "")], ids=["read-only", "locked"])
def test_a_data_root_without_the_archive_that_cannot_be_written_is_named(
    mode, said, mirror, publish, empty_cache, tmp_path, permissions_bind
):
    publish("cifar10", mirror(good).url)
    root = tmp_path / "data"
    root.mkdir(mode=mode)
    message = failure(root=root)
    assert str(root) in message and said in message and "Permission denied" in message


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    message = failure("digits")
    assert str(tmp_path / "file") in message and "XDG_CACHE_HOME" in message


# ---- interrupted, and two at once


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_and_is_made_good(
    interruption, mirror, publish, empty_cache, monkeypatch
):
    def interrupted(*args):
        raise interruption

    server = mirror(good)
    stand_in = publish("cifar10", server.url)
    with monkeypatch.context() as patch, pytest.raises(interruption):
        patch.setattr(catalog, "_write_classes", interrupted)
        prepare("cifar10", None, 32)
    assert names_in(empty_cache) == [ARCHIVE, "cifar10-32px.lock"]
    assert open_split(prepare("cifar10", None, 32), "test").labels.tolist() == stand_in.test[1].tolist()
    assert server.requests == [ARCHIVE]


PREPARE_WHEN_TOLD = """
import dataclasses, sys
from federation import catalog

url, checksum = sys.argv[1:]
source = catalog.SOURCES["bloodmnist"]
source = dataclasses.replace(source, files=(("bloodmnist.npz", checksum),), mirrors=(url,))
catalog.SOURCES["bloodmnist"] = source
catalog._square = lambda images, image_size: images  # what is tested is who converts, not how
print("ready", flush=True)
sys.stdin.readline()
print(catalog.prepare("bloodmnist", None, 28))
"""


def test_two_processes_at_once_download_once(mirror, stand_ins, empty_cache):
    def waits_for_a_second_request(handler, content: bytes) -> None:
        if len(handler.server.requests) > 1:
            second.set()
        second.wait(timeout=0.5)  # in vain, or else the lock does not hold
        good(handler, content)

    second = threading.Event()
    server = mirror(waits_for_a_second_request)
    stand_in = stand_ins["bloodmnist"]
    command = [sys.executable, "-c", PREPARE_WHEN_TOLD, server.url, md5(stand_in.files["bloodmnist.npz"])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=PROJECT, **pipes) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        stores = [process.communicate(timeout=60)[0].strip() for process in both]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert server.requests == ["bloodmnist.npz"]
    assert stores == [str(empty_cache / "bloodmnist-28px")] * 2
    assert open_split(Path(stores[0]), "train").labels.tolist() == stand_in.train[1].tolist()
