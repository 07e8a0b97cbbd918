"""One site's images as a LightningDataModule. The only door to data: nothing else in the project opens an image.

To train on other data, replace this file. The programs rely on what follows; `options` is the command line's
(`dataset`, `image_size`, `partition`, `alpha`, `shards_per_site`, `n_clients`, `seed`, `batch_size`, `gpu`):

- `prepare(options)`: get the data ready on this machine; called once, before any site starts;
- `describe(options)`: who holds what, a `Holdings`;
- `known_classes(options)`: the names of the classes in order, for who submits to real sites and has no image;
- `SiteDataModule(site, classes, options)`: one site's data; after `setup()` it has `n_train`, `n_val` and `n_test`,
  and client.py sets its `round` before each round, so that every round shuffles anew; `shared_counts()` is what
  the site lets the server know of its classes, nothing by default;
- `pooled(classes, options)`: the same over all sites' data, as if it could be brought together.

Data that cannot be used raises `UserError`, one line for the user.
"""

import argparse
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import LightningDataModule

from federation.errors import UserError
from federation.site.catalog import SOURCES, Split, check_classes, open_split
from federation.site.catalog import prepare as prepare_store
from federation.site.partition import deal, deal_like, hold_out, site_names

__all__ = ["Holdings", "SiteDataModule", "describe", "known_classes", "pooled", "prepare"]

VALIDATION_SHARE = 0.2  # of each site's images; fixed for the whole run
EVALUATION_BATCH = 500  # images; nothing is kept for gradients, so it can be larger than a training batch
SHARE_VARIABLE = "FL_SHARE_COUNTS"  # a site that sets it to 1 tells how many images of each class it has
MEAN, STD = 0.5, 0.5  # pixels go from [0, 1] to [-1, 1]
ROOT_VARIABLE = "FL_DATA_ROOT"  # each site's own; `{site}` in it stands for the site's name


@dataclass(frozen=True)
class Holdings:
    """Who holds what.

    `sites`: site -> `train`, `val`, `test` -> sorted indices into the images that lie under the site's data root.
    `counts`: site -> class -> number of images to learn from, those for validation included.
    """

    classes: list[str]
    sites: dict[str, dict[str, list[int]]]
    counts: dict[str, dict[str, int]]


@dataclass(frozen=True, eq=False)
class Part:
    """The images that `indices` choose, of uint8 (N, 3, S, S), with their labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    copies: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen images and their labels, copied to a device once; they leave it with this object."""
        if device not in self.copies:
            images, labels = self.images[self.indices], self.labels[self.indices]
            self.copies[device] = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        return self.copies[device]


class Batches:
    """A loader: yields (float32 (B, 3, S, S), int64 (B,)), each batch sliced and normalised whole.

    A DataLoader would fetch and transform image by image, which takes longer than training a small network.

    Args:
        part: the images.
        batch_size: B; the last batch may be smaller.
        shuffle: None keeps the order. A key gives an order of its own to each key and pass, whichever process asks.
        device: a GPU takes the part's images once, as uint8, and slices the batches there; None: they stay where they
            are, in memory that the sites of a machine share.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        shuffle: tuple[int, ...] | None = None,
        device: torch.device | None = None,
    ):
        self.part, self.batch_size, self.shuffle, self.device = part, batch_size, shuffle, device
        self.passes = 0

    def __len__(self) -> int:
        return -(-len(self.part.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = np.arange(len(self.part.indices))
        if self.shuffle is not None:
            order = np.random.default_rng((*self.shuffle, self.passes)).permutation(order)
        self.passes += 1
        for start in range(0, len(order), self.batch_size):
            images, labels = self._slice(order[start : start + self.batch_size])
            # Channels last: on a CPU, convolutions take less time in evaluation so, and no more in training.
            images = images.to(torch.float32, memory_format=torch.channels_last)
            yield images.mul_(1 / (255 * STD)).sub_(MEAN / STD), labels

    def _slice(self, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if self.device is None:
            chosen = self.part.indices[places]
            return torch.from_numpy(self.part.images[chosen]), torch.from_numpy(self.part.labels[chosen])
        images, labels = self.part.on(self.device)
        chosen = torch.from_numpy(places).to(self.device)
        return images[chosen], labels[chosen]


class SiteDataModule(LightningDataModule):
    """The images of one site, or of all sites together.

    Args:
        site: the site's name; None for all sites' images pooled.
        classes: the federation's classes in order; a label is a place in this list.
        options: see the top of this file.
    """

    def __init__(self, site: str | None, classes: list[str], options: argparse.Namespace):
        super().__init__()
        self.site, self.classes, self.options = site, classes, options
        self.round = 0
        self.parts: dict[str, Part] = {}
        self.device = torch.device("cuda") if options.gpu and torch.cuda.is_available() else None

    def prepare_data(self) -> None:
        """Fetch and convert what is missing; in a simulation all of it is there already."""
        for site in [self.site] if self.site else site_names(self.options.n_clients):
            _store(site, self.options)

    def setup(self, stage: str | None = None) -> None:
        """Open this site's images. The split is the same in every stage and round."""
        if not self.parts:
            if self.site:
                self.parts = _site_parts(self.site, self.classes, self.options)
            else:
                every = [_site_parts(s, self.classes, self.options) for s in site_names(self.options.n_clients)]
                self.parts = {name: _pool([parts[name] for parts in every]) for name in every[0]}

    @property
    def n_train(self) -> int:
        return len(self.parts["train"].indices)

    @property
    def n_val(self) -> int:
        return len(self.parts["val"].indices)

    @property
    def n_test(self) -> int:
        return len(self.parts["test"].indices)

    def shared_counts(self) -> dict[str, int]:
        """`holds <class>` -> number of images to learn from, where the site has chosen to tell; else empty."""
        if os.environ.get(SHARE_VARIABLE) != "1":
            return {}
        labels = np.concatenate([self.parts[name].labels[self.parts[name].indices] for name in ("train", "val")])
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        return {f"holds {name}": count for name, count in zip(self.classes, counts, strict=True)}

    def train_dataloader(self) -> Batches:
        key = (self.options.seed, zlib.crc32((self.site or "").encode()), self.round)
        return Batches(self.parts["train"], self.options.batch_size, key, self.device)

    def val_dataloader(self) -> Batches:
        return Batches(self.parts["val"], EVALUATION_BATCH, device=self.device)

    def test_dataloader(self) -> Batches:
        return Batches(self.parts["test"], EVALUATION_BATCH, device=self.device)

    def predict_dataloader(self) -> Batches:
        return Batches(self.parts["test"], EVALUATION_BATCH, device=self.device)


def prepare(options: argparse.Namespace) -> None:
    """Fetch and convert the images of every site that this machine stands for.

    Raises:
        UserError: they cannot be had.
    """
    names, root = site_names(options.n_clients), os.environ.get(ROOT_VARIABLE, "")
    if options.dataset == "image_folder" and "{site}" in root:
        there = [os.path.isdir(root.replace("{site}", site)) for site in names]
        if 0 < (n_there := sum(there)) < len(names) and all(there[:n_there]):
            raise UserError(
                f"{root.replace('{site}', names[n_there])} is not there, but the folders of the sites before it are: "
                f"use --n_clients {n_there}, or add it"
            )
    for site in names:
        _store(site, options)


def describe(options: argparse.Namespace) -> Holdings:
    """Deal the images to the sites, as each site will do for itself.

    Raises:
        UserError: they cannot be dealt like this, they have fewer than two classes or two that look alike, or `prepare`
            was not called and cannot do its work.
    """
    names = site_names(options.n_clients)
    lists = [_split(_store(site, options), "train").classes for site in names]
    check_classes(dict(zip(names, lists, strict=True)))
    # Each site's folders are sorted by name, so a union sorted by name keeps every site's own order.
    classes = lists[0] if all(own == lists[0] for own in lists) else sorted(set().union(*lists))
    if len(classes) < 2:
        root = os.environ.get(ROOT_VARIABLE)
        raise UserError(
            f"all images are of one class, {classes[0]!r}, and there is nothing to tell apart: "
            f"expected two or more folders {root}/train/<class>"
        )
    sites, counts = {}, {}
    for site in names:
        parts = _site_parts(site, classes, options)
        sites[site] = {name: part.indices.tolist() for name, part in parts.items()}
        labels = np.concatenate([parts[name].labels[parts[name].indices] for name in ("train", "val")])
        counts[site] = dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))
    return Holdings(classes, sites, counts)


def known_classes(options: argparse.Namespace) -> list[str]:
    """The classes of real sites, without an image: those in the file `options.classes`, else a public data set's own.

    Raises:
        UserError: the file names fewer than two, one twice, or one that cannot be the name of a class.
    """
    if not options.classes:
        return list(SOURCES[options.dataset].classes)
    try:
        lines = Path(options.classes).read_text(encoding="utf-8-sig").split("\n")  # some editors begin with a mark
    except UnicodeDecodeError:
        raise UserError(f"{options.classes} is not UTF-8 text: save it as such, one class per line") from None
    classes = [line.strip() for line in lines if line.strip()]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"{options.classes} must name at least two classes, one per line, and none twice")
    check_classes({options.classes: classes})
    return classes


def pooled(classes: list[str], options: argparse.Namespace) -> SiteDataModule:
    """All sites' training images as one training set, their validation images as one validation set, and so on."""
    return SiteDataModule(None, classes, options)


def _store(site: str, options: argparse.Namespace) -> Path:
    root = os.environ.get(ROOT_VARIABLE, "").replace("{site}", site)
    return _prepared(options.dataset, root, options.image_size)


@cache
def _prepared(dataset: str, root: str, image_size: int) -> Path:
    return prepare_store(dataset, Path(root) if root else None, image_size)


@cache
def _split(store: Path, split: str) -> Split:
    return open_split(store, split)


def _site_parts(site: str, classes: list[str], options: argparse.Namespace) -> dict[str, Part]:
    store = _store(site, options)
    train, test = _split(store, "train"), _split(store, "test")
    if options.partition == "none":
        dealt, tested = np.arange(len(train.labels)), np.arange(len(test.labels))
    else:
        names = site_names(options.n_clients)
        if site not in names:
            raise UserError(f"{site} is none of {names[0]} to {names[-1]}: real sites need --partition none")
        try:
            all_dealt, all_tested = _deal(
                store, options.n_clients, options.partition, options.seed, options.alpha, options.shards_per_site
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        dealt, tested = all_dealt[names.index(site)], all_tested[names.index(site)]
    try:
        kept, held_out = hold_out(dealt, VALIDATION_SHARE, options.seed)
    except ValueError as error:
        raise UserError(f"the training images of {site}: {error}") from None
    train_labels, test_labels = (_labels_among(classes, split, site) for split in (train, test))
    return {
        "train": Part(train.images, train_labels, kept),
        "val": Part(train.images, train_labels, held_out),
        "test": Part(test.images, test_labels, tested),
    }


@cache
def _deal(
    store: Path, n_sites: int, scheme: str, seed: int, alpha: float, shards_per_site: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(training images, test images): for each site its indices."""
    train, test = _split(store, "train"), _split(store, "test")
    dealt = deal(train.labels, n_sites, scheme, seed, alpha, shards_per_site)
    counts = np.array([np.bincount(train.labels[own], minlength=len(train.classes)) for own in dealt])
    return dealt, deal_like(test.labels, counts, seed)


def _labels_among(classes: list[str], split: Split, site: str) -> np.ndarray:
    """A site's labels as places in the federation's list of classes: its own list may lack some of them."""
    unknown = [name for name in split.classes if name not in classes]
    if unknown:
        raise UserError(f"{site} has a class {unknown[0]!r} that the federation does not know: {', '.join(classes)}")
    return np.array([classes.index(name) for name in split.classes])[split.labels]


def _pool(parts: list[Part]) -> Part:
    if all(part.images is parts[0].images for part in parts):
        return Part(parts[0].images, parts[0].labels, np.unique(np.concatenate([part.indices for part in parts])))
    images = np.concatenate([part.images[part.indices] for part in parts])
    labels = np.concatenate([part.labels[part.indices] for part in parts])
    return Part(images, labels, np.arange(len(labels)))
