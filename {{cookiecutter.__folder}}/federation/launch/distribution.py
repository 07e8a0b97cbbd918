"""Data distribution: which images each simulated site has, and the class names, all from data.py."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import data
from data import SiteDataModule
from federation.errors import UserError
from federation.site.catalog import SOURCES, check_classes
from federation.site.partition import site_names
from settings import FITS, Options


@dataclass(frozen=True)
class Distribution:
    """Images per site; for real sites, only the classes are known.

    `classes`: class names, in label order.
    `sites`: site -> `train`, `val`, `test` -> sorted indices into the images under the site's data root.
    `counts`: site -> class -> number of images, training + validation.
    """

    classes: list[str]
    sites: dict[str, dict[str, list[int]]]
    counts: dict[str, dict[str, int]]


def prepare(options: Options) -> None:
    """Download and convert the images of every simulated site.

    Raises:
        UserError: the images are not available.
    """
    names, root = site_names(options.n_clients), options.data_root or ""
    if options.dataset == "image_folder" and "{site}" in root:
        there = [os.path.isdir(root.replace("{site}", site)) for site in names]
        if 0 < (n_there := sum(there)) < len(names) and all(there[:n_there]):
            raise UserError(
                f"{root.replace('{site}', names[n_there])} does not exist, but the folders of earlier sites do: "
                f"add it or use --n_clients {n_there}"
            )
    for site in names:
        SiteDataModule(site, options).prepare_data()


def describe(options: Options) -> Distribution:
    """Partition the images among the sites, as each site will do for itself.

    Raises:
        UserError: the partition is impossible, there are fewer than two classes, two class names look alike, or the
            data is not prepared and cannot be.
    """
    sites: dict[str, dict[str, list[int]]] = {}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for site in site_names(options.n_clients):
        module = SiteDataModule(site, replace(options, classes=[]))
        module.setup()
        sites[site] = {part: np.asarray(rows).tolist() for part, rows in module.indices.items()}
        found[site] = module.counts
    lists = {site: list(counts["train"]) for site, counts in found.items()}
    check_classes(lists)
    first, *others = lists.values()
    # Each site's folders are sorted by name, so a union sorted by name preserves every site's order.
    classes = first if all(own == first for own in others) else sorted(set(first).union(*others))
    if len(classes) < 2:
        raise UserError(
            f"all images have the same class, {classes[0]!r}: "
            f"expected two or more folders {options.data_root}/train/<class>"
        )
    counts = {
        site: {name: int(own["train"].get(name, 0) + own["val"].get(name, 0)) for name in classes}
        for site, own in found.items()
    }
    return Distribution(classes, sites, counts)


def notes(options: Options) -> list[str]:
    """A message for the user: how images become the model's input, if data.py says so."""
    if not hasattr(data, "image_rule"):
        return []
    fitted = f", {FITS[options.image_fit]} (--image_fit)" if options.dataset == "image_folder" else ""
    return [f"images: {options.image_size} x {options.image_size} pixels (--image_size){fitted}"]


def known_classes(options: Options) -> list[str]:
    """The classes of real sites, without reading images: from the `--classes` file, else from a public data set.

    Raises:
        UserError: the file has fewer than two classes, a duplicate, or an invalid class name.
    """
    file = options.classes_file
    if not file:
        return list(SOURCES[options.dataset].classes)
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # some editors write a byte order mark
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8, one class per line") from None
    classes = [line.strip() for line in lines if line.strip()]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"{file} must list at least two classes, one per line, without duplicates")
    check_classes({file: classes})
    return classes
