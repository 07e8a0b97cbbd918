"""Downloading a public data set: from faulty mirrors, from a private one, or not at all if it is there."""

import socket
from pathlib import Path

import pytest

from federation.site import fetch
from federation.site.catalog import open_split, prepare
from mirrors import ARCHIVE, good, hangs, md5, missing, trickles, truncated, wrong
from programs import data_error, names_in

FAULTS = {  # behaviour -> what the user is told
    truncated: "the connection was interrupted",
    wrong: "wrong checksum",
    missing: "answers 404",
    hangs: "no data for",
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


@pytest.fixture
def closed_port() -> str:
    """The address of a mirror where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def failure(root: Path | None = None) -> str:
    return data_error(prepare, "cifar10", root, 32)


# ---- mirrors


def test_the_first_working_mirror_is_enough(mirror, publish, empty_cache):
    first, second = mirror(good), mirror(good)
    publish("cifar10", first.url, second.url)
    prepare("cifar10", None, 32)
    assert (first.requests, second.requests) == ([ARCHIVE], [])


def test_a_working_mirror_replaces_a_broken_one(bad, mirror, publish, empty_cache):
    stand_in = publish("cifar10", bad.url, mirror(good).url)
    store = prepare("cifar10", None, 32)
    assert open_split(store, "train").labels.tolist() == stand_in.train[1].tolist()


def test_the_fault_of_a_mirror_is_reported(bad, mirror, publish, empty_cache, capfd):
    publish("cifar10", bad.url, mirror(good).url)
    prepare("cifar10", None, 32)
    assert f"{bad.host}: {bad.reason}" in capfd.readouterr().err


def test_only_a_file_with_the_right_checksum_is_kept(bad, mirror, publish, empty_cache):
    stand_in = publish("cifar10", bad.url, mirror(good).url)
    store = prepare("cifar10", None, 32)
    assert names_in(empty_cache) == sorted([ARCHIVE, store.name, f"{store.name}.lock"])
    assert (empty_cache / ARCHIVE).read_bytes() == stand_in.files[ARCHIVE]


def test_nothing_is_kept_if_all_mirrors_fail(bad, publish, empty_cache):
    publish("cifar10", bad.url)
    failure()
    assert names_in(empty_cache) == ["cifar10-32px.lock"]


def test_the_error_names_each_host_and_its_fault(bad, mirror, publish, closed_port, empty_cache):
    publish("cifar10", closed_port, bad.url)
    message = failure()
    assert f"{closed_port[7:-1]}: connection refused" in message
    assert f"{bad.host}: {bad.reason}" in message


def test_the_error_names_every_remedy(mirror, publish, empty_cache):
    stand_in = publish("cifar10", mirror(missing).url)
    message = failure()
    ways = [
        "./prepare_data.sh --dataset cifar10,",
        "FL_DATA_MIRROR",
        ARCHIVE,
        md5(stand_in.files[ARCHIVE]),
        str(empty_cache),
    ]
    assert [way for way in [*ways, "--dataset digits"] if way not in message] == []


def test_the_suggested_command_has_the_given_data_root(mirror, publish, empty_cache, tmp_path):
    publish("cifar10", mirror(missing).url)
    root = tmp_path / "my data"
    assert f"./prepare_data.sh --dataset cifar10 --data_root '{root}'," in failure(root=root)


def test_a_private_mirror_is_tried_first(mirror, publish, empty_cache, monkeypatch):
    private, public = mirror(good), mirror(good)
    publish("cifar10", public.url)
    monkeypatch.setenv("FL_DATA_MIRROR", private.url.rstrip("/"))
    prepare("cifar10", None, 32)
    assert (private.requests, public.requests) == ([ARCHIVE], [])


def test_public_mirrors_are_tried_if_the_private_one_fails(mirror, publish, empty_cache, monkeypatch):
    private, public = mirror(missing), mirror(good)
    publish("cifar10", public.url)
    monkeypatch.setenv("FL_DATA_MIRROR", private.url)
    prepare("cifar10", None, 32)
    assert (private.requests, public.requests) == ([ARCHIVE], [ARCHIVE])


def test_the_password_of_a_private_mirror_is_not_printed(mirror, publish, empty_cache, monkeypatch, capfd):
    private = mirror(missing)
    publish("cifar10")
    monkeypatch.setenv("FL_DATA_MIRROR", f"http://user:secret@{private.host}/")
    assert "secret" not in failure() + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "address",
    [
        *("sftp://user:secret@mirror.example/files", "user:secret@mirror.example", "//user:secret@mirror.example"),
        *("http://user:secret@mirror.example:port/", "https://user:secret@/files", "https://[user:secret@mirror/"),
        "mirror.example/files",
    ],
)
def test_an_invalid_address_is_rejected_without_printing_it(address, mirror, publish, empty_cache, monkeypatch, capfd):
    public = mirror(good)
    publish("cifar10", public.url)
    monkeypatch.setenv("FL_DATA_MIRROR", address)
    message = failure()
    assert "FL_DATA_MIRROR must be" in message and "https://" in message
    assert "secret" not in message + "".join(capfd.readouterr())
    assert public.requests == []


def test_the_password_in_a_redirect_is_not_printed(mirror, publish, empty_cache, capfd):
    def elsewhere(handler, content: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", "sftp://user:secret@mirror.example/")
        handler.end_headers()

    publish("cifar10", mirror(elsewhere).url)
    message = failure()
    assert "InvalidSchema" in message
    assert "secret" not in message + "".join(capfd.readouterr())


def test_no_mirror_is_tried_after_the_deadline(mirror, publish, empty_cache, monkeypatch):
    server = mirror(good)
    publish("cifar10", server.url)
    monkeypatch.setenv("FL_DATA_TIMEOUT", "-1")
    assert f"{server.host}: not tried" in failure()
    assert server.requests == []


def test_an_invalid_time_limit_is_rejected(mirror, publish, empty_cache, monkeypatch):
    publish("cifar10", mirror(good).url)
    monkeypatch.setenv("FL_DATA_TIMEOUT", "ten minutes")
    assert "FL_DATA_TIMEOUT is 'ten minutes': expected a number of seconds" in failure()


# ---- what is there already


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist", "bloodmnist"])
def test_files_under_the_data_root_are_used_and_not_changed(dataset, mirror, publish, empty_cache, tmp_path):
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


def test_a_corrupt_archive_under_the_data_root_is_downloaded_again(mirror, publish, empty_cache, tmp_path):
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


def test_the_archive_is_stored_in_the_given_data_root(mirror, publish, empty_cache, tmp_path):
    publish("cifar10", mirror(good).url)
    prepare("cifar10", tmp_path / "data" / "shared", 32)
    assert names_in(tmp_path / "data" / "shared") == [ARCHIVE]


def test_a_data_root_that_cannot_be_created_is_named(mirror, publish, empty_cache, tmp_path):
    publish("cifar10", mirror(good).url)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "data") in failure(root=tmp_path / "file" / "data")


@pytest.mark.parametrize(("mode", "said"), [(0o555, "cannot write"), (0o000, "")], ids=["read-only", "locked"])
def test_a_read_only_data_root_without_the_archive_is_named(
    mode, said, mirror, publish, empty_cache, tmp_path, permissions_bind
):
    publish("cifar10", mirror(good).url)
    root = tmp_path / "data"
    root.mkdir(mode=mode)
    message = failure(root=root)
    assert str(root) in message and said in message and "Permission denied" in message
