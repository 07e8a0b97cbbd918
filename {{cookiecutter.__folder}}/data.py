"""One site's images as a LightningDataModule. The only module that reads images.

To train on other data, replace this file with your own `SiteDataModule`; tests/tabular/data.py is an example. Besides
Lightning's hooks, the project relies on:

- `SiteDataModule(site, options)`: the data of a site, or of all sites if `site` is None. `options` are those of
  settings.py. `federation.site.partition.split` tells which rows belong to a site, and keeps groups of rows together.
- `options.classes`: the federation's class names in label order. If empty, the module uses its own list, from which the
  federation's is derived.
- `round`: set before each round, from 0, so that each round shuffles differently.
- `counts`, after `setup()`: "train", "val", "test" -> class -> number of images, including zeros.
- `skipped`, after `setup()`, optional: number of unreadable images that were left out.
- `indices`, after `setup()`: "train", "val" -> sorted rows of the training data, "test" -> rows of the test data.

predict.py needs three functions more, without which everything else works: `image_rule`, `read_images`, `normalize`.

Unusable data raises `UserError` with a one-line message.
"""

import warnings
import zlib
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from federation.errors import UserError
from federation.site.catalog import Split, open_split, prepare, read_image
from federation.site.partition import site_names, split
from settings import Options

EVALUATION_BATCH = 500  # images; can be larger than a training batch because no gradients are needed
MEAN, STD = 0.5, 0.5  # maps pixels from [0, 1] to [-1, 1]

Batch = tuple[torch.Tensor, torch.Tensor]  # float32 (B, 3, S, S), channels last, and int64 (B,)

# Batches are slices of an array; worker processes would only slow this down.
warnings.filterwarnings("ignore", ".*does not have many workers")


def image_rule(options: Options) -> dict[str, Any]:
    """What the functions below must know. It travels with the model as JSON, in model.json."""
    how = {"size": options.image_size, "fit": options.image_fit, "white": options.image_white}
    return {"channels": 3, **how, "mean": MEAN, "std": STD}


def read_images(paths: Sequence[Path], rule: dict[str, Any]) -> torch.Tensor:
    """Read image files by the function that reads an image folder's: uint8 (N, 3, S, S)."""
    return torch.from_numpy(np.stack([read_image(path, rule["size"], rule["fit"], rule["white"]) for path in paths]))


def normalize(images: torch.Tensor, rule: dict[str, Any]) -> torch.Tensor:
    """The model's input, float32 (B, 3, S, S), channels last, for images, uint8 of the same shape."""
    # Channels last: on a CPU, this makes evaluation faster and training no slower.
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.mul_(1 / (255 * rule["std"])).sub_(rule["mean"] / rule["std"])


class Images(Dataset[Batch]):
    """Images with labels. Returns whole batches to a DataLoader: single images would take longer than training.

    Args:
        images: uint8 (N, 3, S, S), memory shared by all sites on the machine.
        rows: int64 (M,), the images to use.
        labels: int64 (M,), their labels.
        device: a GPU that gets a copy of the images, as uint8, to slice batches there; None means the CPU.
    """

    def __init__(self, images: np.ndarray, rows: np.ndarray, labels: np.ndarray, device: torch.device | None = None):
        self.images, self.rows, self.labels, self.device = images, rows, labels, device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> Batch:
        if self.device is None:
            chosen = np.array(places)
            images, labels = torch.from_numpy(self.images[self.rows[chosen]]), torch.from_numpy(self.labels[chosen])
        else:
            on_device = torch.tensor(places, device=self.device)
            images, labels = self.copy[0][on_device], self.copy[1][on_device]
        return normalize(images, {"mean": MEAN, "std": STD}), labels

    @cached_property
    def copy(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels on the device, freed with this object."""
        images, labels = torch.from_numpy(self.images[self.rows]), torch.from_numpy(self.labels)
        return images.to(self.device), labels.to(self.device)


class KeyedShuffle(Sampler[int]):
    """Shuffles 0 to n - 1 by a key and the number of earlier passes, identically in every process."""

    def __init__(self, n: int, key: tuple[int, ...]):
        self.n, self.key, self.passes = n, key, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((*self.key, self.passes)).permutation(self.n)
        self.passes += 1
        return iter(order.tolist())


class SiteDataModule(LightningDataModule):
    """The images of a site; see the module docstring."""

    round = 0

    def __init__(self, site: str | None, options: Options):
        super().__init__()
        self.site, self.options = site, options
        each_its_own = "{site}" in (options.data_root or "")  # one folder per site, otherwise one for all
        self.sources = site_names(options.n_clients) if site is None and each_its_own else [site]
        self.device = torch.device("cuda") if options.gpu and torch.cuda.is_available() else None
        self.parts: dict[str, Images] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.indices: dict[str, np.ndarray] = {}
        self.skipped = 0

    def prepare_data(self) -> None:
        """Download and convert what is missing; in a simulation, job.py has already done so."""
        for source in self.sources:
            _open(source, self.options)

    def setup(self, stage: str | None = None) -> None:
        """Open the images. The split is the same in all stages and rounds."""
        if self.parts:
            return
        opened = {source: _open(source, self.options) for source in self.sources}
        classes = self.options.classes or list(
            dict.fromkeys(name for train, _ in opened.values() for name in train.classes)
        )
        pieces: dict[str, list[Images]] = {"train": [], "val": [], "test": []}
        for source, (train, test) in opened.items():
            self.skipped += len(train.unreadable) + len(test.unreadable)
            groups, sites = (train.groups, test.groups), (train.sites, test.sites)
            of_site = split(train.labels, test.labels, source, self.options, groups, sites)
            for part, rows in of_site.items():
                images = test if part == "test" else train
                labels = _labels(images, classes, source)[rows]
                pieces[part].append(Images(images.images, rows, labels, self.device))
        for part, own in pieces.items():
            self.parts[part] = _join(own)
            self.indices[part] = self.parts[part].rows
            counts = np.bincount(self.parts[part].labels, minlength=len(classes)).tolist()
            self.counts[part] = dict(zip(classes, counts, strict=True))

    def train_dataloader(self) -> DataLoader[Batch]:
        key = (self.options.seed, zlib.crc32((self.site or "").encode()), self.round)
        shuffle = KeyedShuffle(len(self.parts["train"]), key)
        return _loader(self.parts["train"], self.options.batch_size, shuffle)

    def val_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.parts["val"], EVALUATION_BATCH)

    def test_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.parts["test"], EVALUATION_BATCH)

    predict_dataloader = test_dataloader


def _loader(images: Images, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[Batch]:
    return DataLoader(
        images,
        batch_size=batch_size,  # by keyword, or Lightning cannot rebuild the loader for `predict`
        sampler=sampler,
        collate_fn=lambda batch: batch,
        generator=torch.Generator(),  # otherwise it draws from torch's, which dropout and augmentation use
    )


def _open(site: str | None, options: Options) -> tuple[Split, Split]:
    """A site's source of training and test images, before partitioning."""
    root = (options.data_root or "").replace("{site}", site or "")
    how = (options.image_size, options.image_fit, options.image_white)
    return _opened(options.dataset, root, *how, skip_unreadable=options.skip_unreadable)


@cache
def _opened(
    dataset: str, root: str, image_size: int, fit: str, white: int | None, *, skip_unreadable: float
) -> tuple[Split, Split]:
    folder = Path(root) if root else None
    store = prepare(dataset, folder, image_size, fit, white, skip_unreadable=skip_unreadable)
    return open_split(store, "train"), open_split(store, "test")


def _labels(images: Split, classes: list[str], site: str | None) -> np.ndarray:
    """Labels as indices into the federation's list of classes, of which a site's own list may lack some."""
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        known = ", ".join(classes)
        raise UserError(
            f"{site or 'the data'} has a class {unknown[0]!r}, which is not one of the federation's: {known}"
        )
    return np.array([classes.index(name) for name in images.classes])[images.labels]


def _join(pieces: list[Images]) -> Images:
    """Images of several folders as one data set."""
    if len(pieces) == 1:
        return pieces[0]
    images = np.concatenate([piece.images[piece.rows] for piece in pieces])
    labels = np.concatenate([piece.labels for piece in pieces])
    return Images(images, np.arange(len(labels)), labels, pieces[0].device)
