"""Images per site: what the description of a run's data says is what its sites read, and what cannot be is refused."""

import gc
import re
import runpy
import weakref

import pytest
import torch
from PIL import Image

import data
from federation.launch import distribution
from federation.site.partition import site_names
from programs import PROJECT, data_error
from settings import PARTITIONS

CLASSES = ["ant", "bee", "cat", "dog"]
N_TRAIN, N_TEST = 200, 40
N_SITES = 3
DISJOINT = [scheme for scheme in PARTITIONS if scheme != "none"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of images, each of another color, as many of each class."""
    root = tmp_path_factory.mktemp("images")
    for split, n_images in (("train", N_TRAIN), ("test", N_TEST)):
        for number in range(n_images):
            folder = root / split / CLASSES[number % 4]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def run(images, options):
    """run(**changes): the options of a run over these images."""

    def make(**changes):
        given = {"dataset": "image_folder", "data_root": str(images), "image_size": 2}
        return options(**{**given, "n_clients": N_SITES, "classes": CLASSES, **changes})

    return make


def opened(site: str | None, run) -> data.SiteDataModule:
    module = data.SiteDataModule(site, run)
    module.setup()
    return module


def modules(run) -> list[data.SiteDataModule]:
    return [opened(site, run) for site in site_names(run.n_clients)]


@pytest.mark.parametrize("stage", [None, "fit", "validate", "test", "predict"])
def test_every_stage_has_the_same_split(stage, run):
    module = data.SiteDataModule("site-1", run())
    module.setup(stage)
    expected = distribution.describe(run()).sites["site-1"]
    assert {part: rows.tolist() for part, rows in module.indices.items()} == expected


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_the_description_lists_what_each_site_reads(scheme, run):
    found = distribution.describe(run(partition=scheme))
    for module in modules(run(partition=scheme)):
        assert module.site and found.sites[module.site] == {
            part: rows.tolist() for part, rows in module.indices.items()
        }


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_the_counts_are_those_of_the_batches(scheme, run):
    found = distribution.describe(run(partition=scheme))
    for module in modules(run(partition=scheme)):
        labels = torch.cat([y for loader in (module.train_dataloader(), module.val_dataloader()) for _, y in loader])
        assert module.site and list(found.counts[module.site].values()) == torch.bincount(labels, minlength=4).tolist()


def test_the_description_knows_the_classes_and_sites(run):
    found = distribution.describe(run())
    assert found.classes == CLASSES
    assert list(found.sites) == list(found.counts) == site_names(N_SITES)
    assert sum(sum(counts.values()) for counts in found.counts.values()) == N_TRAIN


def test_the_description_is_plain_numbers_for_a_json_file(run):
    found = distribution.describe(run())
    assert {type(i) for lists in found.sites.values() for indices in lists.values() for i in indices} == {int}
    assert {type(n) for counts in found.counts.values() for n in counts.values()} == {int}


def failure(site: str, run) -> str:
    return data_error(opened, site, run)


@pytest.mark.parametrize("site", ["site-4", "hospital", "site-0"])
@pytest.mark.parametrize("scheme", DISJOINT)
def test_a_site_that_gets_no_part_is_named(site, scheme, run):
    message = failure(site, run(partition=scheme))
    assert site in message and "--partition none" in message


def test_with_none_a_site_may_have_any_name(run):
    assert opened("hospital of the north", run(partition="none")).counts["test"] == dict.fromkeys(CLASSES, N_TEST // 4)


@pytest.mark.parametrize("changes", [{"n_clients": 101}, {"partition": "dirichlet", "n_clients": 21}], ids=str)
def test_more_sites_than_the_images_allow_are_rejected(changes, run):
    assert re.search("or less|fewer", failure("site-1", run(**changes)))


def test_a_site_with_a_single_image_cannot_validate(tmp_path, run):
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / split / "ant" / "0.png")
    message = failure("site-1", run(partition="none", data_root=str(tmp_path)))
    assert "site-1: 1 image(s) cannot be split: 2 are needed" in message


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_device_of_its_own_gets_the_same_batches(name, run):
    """As on a GPU: the images are copied to the device once, and sliced there. Here the device is the processor."""
    shared, copied = opened("site-2", run(batch_size=7)), data.SiteDataModule("site-2", run(batch_size=7))
    copied.device = torch.device("cpu")
    copied.setup()
    loaders = [getattr(module, f"{name}_dataloader")() for module in (shared, copied)]
    for _ in range(2):
        for (images, labels), (own_images, own_labels) in zip(*loaders, strict=True):
            assert torch.equal(images, own_images) and torch.equal(labels, own_labels)
            own_images.zero_()  # what is kept on the device does not change with a batch


def test_a_gpu_is_used_only_where_it_is_asked_for_and_present(run, monkeypatch):
    assert opened("site-1", run(gpu=True)).device is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert opened("site-1", run(gpu=True)).device == torch.device("cuda")
    assert opened("site-1", run(gpu=False)).device is None


def test_what_is_on_a_device_leaves_it_with_the_data_of_its_task(options):
    """Each task makes its data afresh: a copy that stayed behind would fill a GPU."""
    copies = []
    for _ in range(2):
        module = data.SiteDataModule("site-1", options())
        module.device = torch.device("cpu")
        module.setup("fit")
        next(iter(module.train_dataloader()))
        copies.append(weakref.ref(module.parts["train"].copy[0]))
        del module
    gc.collect()
    assert [copy() for copy in copies] == [None, None]


def test_the_module_has_its_own_classes_where_the_federations_are_not_known(run):
    module = opened("site-1", run(classes=[]))
    assert [list(counts) for counts in module.counts.values()] == [CLASSES] * 3


@pytest.fixture
def tabular():
    """The names that the example of other data defines."""
    return runpy.run_path(str(PROJECT / "tests" / "tabular" / "data.py"))


def test_the_example_of_other_data_is_partitioned_like_images(options, tabular, monkeypatch):
    monkeypatch.setattr(distribution, "SiteDataModule", tabular["SiteDataModule"])
    found = distribution.describe(options(n_clients=3, partition="dirichlet"))
    assert found.classes == ["malignant", "benign"]  # in its own order, which is that of the labels
    for part, n_rows in (("test", 114), ("train", 364), ("val", 91)):
        rows = [row for site in found.sites.values() for row in site[part]]
        assert len(rows) == len(set(rows)) == pytest.approx(n_rows, abs=2)
    assert sum(sum(counts.values()) for counts in found.counts.values()) == 455
