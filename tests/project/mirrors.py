"""Small stand-ins for the public data sets, and a local mirror with every possible fault.

The stand-ins have the layout of the real data sets and consist of scikit-learn's digits. conftest.py has fixtures for
both.
"""

import dataclasses
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from sklearn.datasets import load_digits

ARCHIVE = "cifar-10-python.tar.gz"  # of CIFAR-10
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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
    pickles["batches.meta"] = pickle.dumps({"label_names": CIFAR10_CLASSES})
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
    np.savez(packed, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes an array for allow_pickle  # type: ignore[arg-type]  # NumPy's stub takes an array for allow_pickle
    images, labels = (np.concatenate([arrays[f"train_{kind}"], arrays[f"val_{kind}"]]) for kind in ("images", "labels"))
    return StandIn(
        files={"bloodmnist.npz": packed.getvalue()},
        train=(images, labels.ravel()),
        test=(arrays["test_images"], arrays["test_labels"].ravel()),
    )


# What a mirror does when asked for a file


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
    server: Mirror

    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.requests.append(name)
        self.server.behave(self, self.server.files[name])

    def log_message(self, *args):
        pass
