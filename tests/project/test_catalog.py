"""Public data sets are converted once, completely, into the cache."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from federation.site import catalog
from federation.site.catalog import open_split, prepare
from mirrors import ARCHIVE, CIFAR10_CLASSES, good, md5
from programs import PROJECT, data_error, names_in

# ---- what comes out


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist", "bloodmnist"])
@pytest.mark.parametrize("image_size", [32, 28])
def test_a_data_set_is_converted_to_color_images_of_the_requested_size(
    dataset, image_size, mirror, publish, stand_ins, empty_cache
):
    stand_in = publish(dataset, mirror(good).url)
    store = prepare(dataset, None, image_size)
    for split, (images, labels) in (("train", stand_in.train), ("test", stand_in.test)):
        opened = open_split(store, split)
        assert opened.images.shape == (len(images), 3, image_size, image_size)
        assert (opened.images.dtype, opened.labels.dtype) == (np.dtype("uint8"), np.dtype("int64"))
        assert opened.labels.tolist() == labels.tolist()
        assert opened.images.mean() == pytest.approx(images.mean(), rel=0.02)


@pytest.mark.parametrize(("dataset", "own_size"), [("cifar10", 32), ("fashion_mnist", 28), ("bloodmnist", 28)])
def test_pixels_are_unchanged_at_the_original_size(dataset, own_size, mirror, publish, empty_cache):
    stand_in = publish(dataset, mirror(good).url)
    images = stand_in.train[0]
    color = images if images.ndim == 4 else images[..., np.newaxis].repeat(3, axis=3)
    opened = open_split(prepare(dataset, None, own_size), "train")
    assert np.array_equal(opened.images, color.transpose(0, 3, 1, 2))


def test_the_classes_of_cifar10_match_its_archive(mirror, publish, empty_cache):
    publish("cifar10", mirror(good).url)
    assert open_split(prepare("cifar10", None, 32), "train").classes == CIFAR10_CLASSES


@pytest.mark.parametrize(("dataset", "n_classes"), [("cifar10", 10), ("fashion_mnist", 10), ("bloodmnist", 8)])
def test_every_label_has_a_class(dataset, n_classes, mirror, publish, empty_cache):
    publish(dataset, mirror(good).url)
    opened = open_split(prepare(dataset, None, 32), "train")
    assert len(set(opened.classes)) == n_classes > opened.labels.max()


def test_images_are_memory_mapped_and_read_only(mirror, publish, empty_cache):
    publish("cifar10", mirror(good).url)
    images = open_split(prepare("cifar10", None, 32), "train").images
    assert isinstance(images.base, np.memmap)
    assert not images.flags.writeable


def test_the_classes_of_a_public_data_set_match_its_images():
    from torchvision.datasets import FashionMNIST

    known = {name: list(source.classes) for name, source in catalog.SOURCES.items()}
    assert known["digits"] == [str(name) for name in load_digits().target_names]
    assert known["fashion_mnist"] == [name.replace("/", " or ") for name in FashionMNIST.classes]
    assert [len(known[name]) for name in ("cifar10", "bloodmnist")] == [10, 8]


def test_digits_need_no_network():
    store = prepare("digits", None, 32)
    train, test = open_split(store, "train"), open_split(store, "test")
    assert (train.images.shape, test.images.shape) == ((1437, 3, 32, 32), (360, 3, 32, 32))
    assert (train.labels.shape, test.labels.shape) == ((1437,), (360,))
    assert train.classes == [str(i) for i in range(10)]


def test_digits_use_the_full_range_of_pixel_values():
    images = open_split(prepare("digits", None, 32), "train").images
    assert images.dtype == np.uint8
    assert np.unique(images).tolist() == np.round(np.arange(17) * 255 / 16).astype(int).tolist()


def test_digits_are_enlarged_four_times_and_gray():
    images = open_split(prepare("digits", None, 32), "test").images
    assert np.array_equal(images, images[:, :1, ::4, ::4].repeat(3, axis=1).repeat(4, axis=2).repeat(4, axis=3))


def test_the_test_split_of_digits_is_stratified():
    store = prepare("digits", None, 32)
    train, test = (np.bincount(open_split(store, split).labels) for split in ("train", "test"))
    assert np.abs(test - (train + test) * 0.2).max() <= 1


def test_digits_are_identical_in_every_cache(empty_cache, monkeypatch, tmp_path):
    first = prepare("digits", None, 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    second = prepare("digits", None, 32)
    assert first != second
    assert names_in(first) == names_in(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names_in(first))


def test_an_unknown_data_set_lists_the_known_ones():
    message = data_error(prepare, "imagenet", None, 32)
    assert all(name in message for name in ("imagenet", "cifar10", "digits", "image_folder"))


def test_another_image_size_reuses_the_archive(mirror, publish, empty_cache):
    server = mirror(good)
    publish("cifar10", server.url)
    assert prepare("cifar10", None, 32) != prepare("cifar10", None, 16)
    assert server.requests == [ARCHIVE]


def test_a_second_preparation_downloads_nothing(mirror, publish, empty_cache):
    server = mirror(good)
    publish("cifar10", server.url)
    assert prepare("cifar10", None, 32) == prepare("cifar10", None, 32)
    assert server.requests == [ARCHIVE]


def test_a_cache_folder_that_cannot_be_created_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    message = data_error(prepare, "digits", None, 32)
    assert str(tmp_path / "file") in message and "XDG_CACHE_HOME" in message


# ---- interrupted, and two at once


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(
    interruption, mirror, publish, empty_cache, monkeypatch
):
    def interrupted(*args):
        raise interruption

    server = mirror(good)
    stand_in = publish("cifar10", server.url)
    with monkeypatch.context() as patch, pytest.raises(interruption):
        patch.setattr(catalog, "_square", interrupted)
        prepare("cifar10", None, 32)
    assert names_in(empty_cache) == [ARCHIVE, "cifar10-32px.lock"]
    assert open_split(prepare("cifar10", None, 32), "test").labels.tolist() == stand_in.test[1].tolist()
    assert server.requests == [ARCHIVE]


DIE_WHILE_CONVERTING = """
import os
from federation.site import catalog

catalog._square = lambda *args: os._exit(9)
catalog.prepare("digits", None, 32)
"""


def test_leftovers_of_a_killed_conversion_are_removed_by_the_next(empty_cache):
    assert subprocess.run([sys.executable, "-c", DIE_WHILE_CONVERTING], cwd=PROJECT).returncode == 9
    assert len(names_in(empty_cache)) == 2
    prepare("digits", None, 32)
    assert names_in(empty_cache) == ["digits-32px", "digits-32px.lock"]


def test_an_archive_is_unpacked_where_the_next_conversion_cleans_up(mirror, publish, empty_cache, monkeypatch):
    def watch(archive, folder):
        unpacked_in.append(Path(folder).relative_to(empty_cache).parts[0])
        unpack(archive, folder)

    unpacked_in: list[str] = []
    unpack = shutil.unpack_archive
    publish("cifar10", mirror(good).url)
    monkeypatch.setattr(shutil, "unpack_archive", watch)
    prepare("cifar10", None, 32)
    assert [name.startswith(".cifar10-32px-") for name in unpacked_in] == [True]


PREPARE_WHEN_TOLD = """
import dataclasses, sys
from federation.site import catalog

url, checksum = sys.argv[1:]
source = catalog.SOURCES["bloodmnist"]
source = dataclasses.replace(source, files=(("bloodmnist.npz", checksum),), mirrors=(url,))
catalog.SOURCES["bloodmnist"] = source
catalog._square = lambda images, image_size: images  # what is tested is who converts, not how
print("ready", flush=True)
sys.stdin.readline()
print(catalog.prepare("bloodmnist", None, 28))
"""


def test_two_simultaneous_processes_download_once(mirror, stand_ins, empty_cache):
    def waits_for_a_second_request(handler, content: bytes) -> None:
        if len(handler.server.requests) > 1:
            second.set()
        second.wait(timeout=0.5)  # in vain, or else the lock does not hold
        good(handler, content)

    second = threading.Event()
    server = mirror(waits_for_a_second_request)
    stand_in = stand_ins["bloodmnist"]
    command = [sys.executable, "-c", PREPARE_WHEN_TOLD, server.url, md5(stand_in.files["bloodmnist.npz"])]
    pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both: list = [subprocess.Popen(command, cwd=PROJECT, **pipes) for _ in range(2)]
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
