"""The models: shapes, normalization layers, augmentation, learning-rate schedule."""

from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import model as models
from federation.launch.model_file import model_names
from model import LitNet, LitResNet, augment
from trainer import make_model, training_seed

MODELS = model_names(Path(models.__file__))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [28, 32, 40, 64])
def test_every_model_accepts_images_of_any_size(name, size, options):
    model = make_model(options(model_class=name, classes=list("abcdefg"))).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_no_model_fails_on_an_empty_batch(name, options):
    model = make_model(options(model_class=name))
    assert model.training_step((torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64)), batch_idx=0).isnan()


def test_the_flag_offers_the_lightning_modules_of_model_py():
    defined = [value for value in vars(models).values() if isinstance(value, type) and value.__module__ == "model"]
    assert [cls.__name__ for cls in defined if issubclass(cls, LightningModule)] == MODELS


def test_the_resnet_has_no_batch_statistics(options):
    layers = list(LitResNet(10, options()).modules())
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in layers)
    assert sum(isinstance(layer, torch.nn.GroupNorm) for layer in layers) == 20  # one for each convolution
    assert not any("running" in name for name in LitResNet(10, options()).state_dict())


def test_the_resnet_does_not_downsample_before_the_first_block(options):
    seen = []
    model = LitResNet(10, options()).eval()
    model.get_submodule("model.layer1").register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32)]


def test_the_same_seed_gives_the_same_augmentation():
    x = torch.rand(8, 3, 32, 32)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(augment(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_augmented_image_is_a_shifted_and_possibly_flipped_crop():
    torch.manual_seed(0)
    x = torch.rand(32, 3, 12, 12)
    padded = torch.nn.functional.pad(x, (4,) * 4, mode="reflect")
    kinds = set()
    for image, source in zip(augment(x), padded, strict=True):
        pieces = source.unfold(1, 12, 1).unfold(2, 12, 1)  # (3, 9, 9, 12, 12)
        places = {
            (flipped, down, right)
            for flipped, wanted in ((False, image), (True, image.flip(-1)))
            for down in range(9)
            for right in range(9)
            if torch.equal(pieces[:, down, right], wanted)
        }
        assert len(places) == 1
        kinds |= places
    assert {flipped for flipped, _, _ in kinds} == {True, False}
    assert len(kinds) > 16  # each image has its own


class Watched(LitResNet):
    """Small enough for a test; notes the images that its network gets, and the learning rates."""

    def __init__(self, options):
        super().__init__(2, options)
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))  # type: ignore[assignment]
        self.seen, self.rates = [], []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return super().forward(x)

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def quiet_trainer() -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 2), batch_size=4)


def test_images_are_augmented_in_training_only(loader, options):
    trainer = quiet_trainer()
    originals = loader.dataset.tensors[0]
    model = Watched(options())
    trainer.validate(model, loader, verbose=False)
    trainer.test(model, loader, verbose=False)
    trainer.predict(model, loader)
    assert torch.equal(torch.cat(model.seen), originals.repeat(3, 1, 1, 1))
    model.seen.clear()
    trainer.fit(model, loader)
    assert not torch.equal(torch.cat(model.seen), originals.repeat(2, 1, 1, 1))


def test_the_learning_rate_follows_a_half_cosine_over_all_rounds(loader, options):
    model = Watched(options(total_rounds=3))
    for model.round in range(3):
        quiet_trainer().fit(model, loader)
    steps = torch.arange(18, dtype=torch.float64)  # 3 rounds of 2 epochs of 3 batches
    assert model.rates == pytest.approx((0.005 * (1 + torch.cos(torch.pi * steps / 18))).tolist())


def test_the_small_model_does_not_need_the_round(options):
    images = TensorDataset(torch.rand(4, 3, 16, 16), torch.arange(4) % 2)
    quiet_trainer().fit(LitNet(2, options()), DataLoader(images, batch_size=2))


def test_every_site_and_round_has_its_own_seed():
    seeds = {
        training_seed(seed, site, round_) for seed in (0, 1) for site in ("site-1", "site-2") for round_ in range(9)
    }
    assert len(seeds) == 2 * 2 * 9
    assert training_seed(0, "site-1", 3) == training_seed(0, "site-1", 3) == 2847800754
    assert all(0 <= seed < 2**32 for seed in seeds)
