"""One site's data: batches, order, and that no validation or test image is ever trained on.

Most tests use images that encode their own number, to recognize them in a batch.
"""

import math
from itertools import combinations

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer

import data
from federation.site.partition import site_names
from settings import PARTITIONS

CLASSES = ["ant", "bee", "cat", "dog"]
N_TRAIN, N_TEST = 200, 40
N_SITES = 3
DISJOINT = [scheme for scheme in PARTITIONS if scheme != "none"]


@pytest.fixture(scope="session")
def numbered_images(tmp_path_factory):
    """A folder of images; the red of each is its place in its split, its green its class, its blue its split."""
    root = tmp_path_factory.mktemp("numbered")
    for blue, (split, n_images) in enumerate((("train", N_TRAIN), ("test", N_TEST))):
        for number in range(n_images):
            label = number * len(CLASSES) // n_images
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (number, label, blue)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture
def run(numbered_images, options):
    """run(**changes): the options of a run over the numbered images."""

    def make(**changes):
        images = {"dataset": "image_folder", "data_root": str(numbered_images), "image_size": 2}
        return options(**{**images, "n_clients": N_SITES, "classes": CLASSES, **changes})

    return make


def opened(site: str | None, run) -> data.SiteDataModule:
    module = data.SiteDataModule(site, run)
    module.setup()
    return module


def modules(run) -> list[data.SiteDataModule]:
    return [opened(site, run) for site in site_names(run.n_clients)]


def pixels(images: torch.Tensor) -> torch.Tensor:
    """The images from 0 to 1, as before the normalization of data.py."""
    return images * data.STD + data.MEAN


def colors(images: torch.Tensor) -> torch.Tensor:
    """The red, green and blue of each image, int64 (B, 3): its number, its class, and 1 if it is a test image."""
    return (pixels(images)[:, :, 0, 0] * 255).round().to(torch.int64)


def numbers(loader) -> list[int]:
    """Which images one pass over the loader yields, in its order."""
    return [number for images, _ in loader for number in colors(images)[:, 0].tolist()]


def labels_of(*loaders) -> torch.Tensor:
    return torch.cat([labels for loader in loaders for _, labels in loader])


# ---- batches


def test_batches_are_float_images_and_integer_labels(options):
    images, labels = next(iter(opened("site-1", options()).train_dataloader()))
    assert (images.shape, images.dtype) == ((16, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((16,), torch.int64)


def test_pixels_are_normalized_from_black_0_and_white_1(options):
    module = opened("site-1", options())
    every = torch.cat([pixels(images) for images, _ in module.val_dataloader()])
    assert every.min().item() == pytest.approx(0, abs=1e-6)
    assert every.max().item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["train", "val", "test", "predict"])
def test_every_image_comes_with_its_own_label(name, run):
    for images, labels in getattr(opened("site-1", run()), f"{name}_dataloader")():
        assert torch.equal(colors(images)[:, 1], labels)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 160, 1000])
def test_the_last_batch_has_the_remaining_images(batch_size, run):
    module = opened("site-1", run(batch_size=batch_size, partition="none"))
    sizes = [len(labels) for _, labels in module.train_dataloader()]
    assert len(module.train_dataloader()) == len(sizes) == math.ceil(160 / batch_size)
    assert sum(sizes) == len(module.indices["train"]) == 160
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_changing_a_batch_does_not_change_the_images(run):
    loader = opened("site-1", run()).val_dataloader()
    before = numbers(loader)
    for images, labels in loader:
        images.zero_()
        labels.zero_()
    assert numbers(loader) == before


# ---- the order of training images


def training_orders(run, site: str = "site-1", round_: int = 0, passes: int = 1) -> list[list[int]]:
    """The order of each pass over the training images in one round, from a module made for it."""
    module = opened(site, run)
    module.round = round_
    loader = module.train_dataloader()
    return [numbers(loader) for _ in range(passes)]


def test_each_pass_yields_each_training_image_once(run):
    module = opened("site-1", run())
    loader = module.train_dataloader()
    for _ in range(3):
        assert sorted(numbers(loader)) == module.indices["train"].tolist()


def test_each_pass_has_its_own_order(run):
    first, second = training_orders(run(), passes=2)
    assert first != second
    assert sorted(first) == sorted(second)


def test_each_round_has_its_own_order(run):
    (first,), (second,) = (training_orders(run(), round_=k) for k in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_sites_with_the_same_images_have_different_orders(run):
    (first,), (second,) = (training_orders(run(partition="none"), site) for site in ("site-1", "site-2"))
    assert first != second
    assert sorted(first) == sorted(second)


def test_another_seed_gives_another_order(run):
    first, second = (opened("site-1", run(seed=seed)) for seed in (0, 1))
    second.parts = first.parts
    assert numbers(first.train_dataloader()) != numbers(second.train_dataloader())


def test_the_order_depends_only_on_seed_site_round_and_pass(run):
    assert training_orders(run(seed=5), "site-2", round_=3, passes=2) == training_orders(
        run(seed=5), "site-2", round_=3, passes=2
    )


def test_the_order_is_the_same_in_every_process(run):
    module = opened("site-1", run(seed=5))
    module.round = 3
    sampler = module.train_dataloader().sampler
    assert isinstance(sampler, data.KeyedShuffle) and sampler.key == (5, 0x73E3AF25, 3)  # the CRC-32 of "site-1"


@pytest.mark.parametrize("name", ["val", "test", "predict"])
def test_evaluation_images_keep_their_order(name, run):
    module = opened("site-1", run())
    loader = getattr(module, f"{name}_dataloader")()
    first = numbers(loader)
    module.round = 1
    assert first == numbers(loader) == numbers(getattr(module, f"{name}_dataloader")())


# ---- nothing that a model is judged by is trained on


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_no_site_trains_on_an_image_that_any_site_validates_on(scheme, run):
    trained, validated = set(), set()
    for module in modules(run(partition=scheme)):
        for module.round in range(2):
            trained |= set(numbers(module.train_dataloader()))
        validated |= set(numbers(module.val_dataloader()))
    assert trained & validated == set()
    assert trained | validated == set(range(N_TRAIN))


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_no_site_trains_or_validates_on_a_test_image(scheme, run):
    for module in modules(run(partition=scheme)):
        for images, _ in (*module.train_dataloader(), *module.val_dataloader()):
            assert not colors(images)[:, 2].any()
        for images, _ in module.test_dataloader():
            assert colors(images)[:, 2].all()


@pytest.mark.parametrize("scheme", DISJOINT)
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_no_two_sites_share_an_image(scheme, name, run):
    seen = [set(numbers(getattr(module, f"{name}_dataloader")())) for module in modules(run(partition=scheme))]
    assert all(one & other == set() for one, other in combinations(seen, 2))


@pytest.mark.parametrize("scheme", DISJOINT)
def test_every_test_image_belongs_to_a_site(scheme, run):
    tested = [number for module in modules(run(partition=scheme)) for number in numbers(module.test_dataloader())]
    assert sorted(tested) == list(range(N_TEST))


def test_with_none_all_sites_have_all_images_and_the_same_validation_split(run):
    every = modules(run(partition="none"))
    assert all([sum(n.values()) for n in module.counts.values()] == [160, 40, N_TEST] for module in every)
    assert len({tuple(numbers(module.val_dataloader())) for module in every}) == 1


def test_a_fifth_of_a_sites_images_is_for_validation(run):
    module = opened("site-1", run(partition="none"))
    assert (len(module.indices["train"]), len(module.indices["val"])) == (160, 40)


def test_a_second_setup_changes_nothing(run):
    module = opened("site-1", run())
    before = dict(module.parts)
    for stage in ("fit", "test", None):
        module.setup(stage)
    assert all(module.parts[name] is part for name, part in before.items())


def test_a_site_is_tested_on_the_class_mixture_that_it_trains_on(run):
    for module in modules(run(partition="shards")):
        trained = labels_of(module.train_dataloader(), module.val_dataloader())
        tested = labels_of(module.test_dataloader())
        expected = torch.bincount(trained, minlength=4) * N_TEST / N_TRAIN
        assert (torch.bincount(tested, minlength=4) - expected).abs().max() <= 1


@pytest.mark.parametrize("scheme", PARTITIONS)
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_pooled_data_is_the_union_of_the_sites_data(scheme, name, run):
    pooled = opened(None, run(partition=scheme))
    loader = f"{name}_dataloader"
    together = set().union(*(numbers(getattr(module, loader)()) for module in modules(run(partition=scheme))))
    assert sorted(numbers(getattr(pooled, loader)())) == sorted(together)


# ---- Lightning and PyTorch


def test_a_loader_does_not_use_torchs_random_numbers(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    module = opened("site-1", run())
    for loader in (module.train_dataloader(), module.val_dataloader()):
        numbers(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trainer_predicts_all_test_images_in_order(run):
    class Echo(LightningModule):
        def predict_step(self, batch, batch_index):
            return colors(batch[0])[:, 0]

    module = opened("site-1", run())
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    predicted = trainer.predict(Echo(), datamodule=module) or []
    assert [number for batch in predicted for number in batch] == module.indices["test"].tolist()
