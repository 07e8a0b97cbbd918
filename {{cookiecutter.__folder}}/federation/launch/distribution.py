"""Data distribution: which images each site of a simulation has, and the names of the classes; all from data.py."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import SiteDataModule
from federation.errors import UserError
from federation.site.catalog import SOURCES, check_classes
from federation.site.partition import site_names
from settings import Options


@dataclass(frozen=True)
class Distribution:
    """Images per site; of real sites, only the classes are known.

    `classes`: their names, in the order of the labels.
    `sites`: site -> `train`, `val`, `test` -> sorted indices into the images that lie under the site's data root.
    `counts`: site -> class -> number of images, training and validation.
    """

    classes: list[str]
    sites: dict[str, dict[str, list[int]]]
    counts: dict[str, dict[str, int]]


def prepare(options: Options) -> None:
    """Fetch and convert the images of every simulated site.

    Raises:
        UserError: they are not available.
    """
    names, root = site_names(options.n_clients), options.data_root or ""
    if options.dataset == "image_folder" and "{site}" in root:
        there = [os.path.isdir(root.replace("{site}", site)) for site in names]
        if 0 < (n_there := sum(there)) < len(names) and all(there[:n_there]):
            raise UserError(
                f"{root.replace('{site}', names[n_there])} is not there, but the folders of the sites before it are: "
                f"use --n_clients {n_there}, or add it"
            )
    for site in names:
        SiteDataModule(site, options).prepare_data()


def describe(options: Options) -> Distribution:
    """Split the images between the sites, as each site will do for itself.

    Raises:
        UserError: they cannot be split like this, they have fewer than two classes or two that look alike, or `prepare`
            was not called and cannot do its work.
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
    # Each site's folders are sorted by name, so a union sorted by name keeps every site's own order.
    classes = first if all(own == first for own in others) else sorted(set(first).union(*others))
    if len(classes) < 2:
        raise UserError(
            f"all images are of one class, {classes[0]!r}, and there is nothing to tell apart: "
            f"expected two or more folders {options.data_root}/train/<class>"
        )
    counts = {
        site: {name: int(own["train"].get(name, 0) + own["val"].get(name, 0)) for name in classes}
        for site, own in found.items()
    }
    return Distribution(classes, sites, counts)


def known_classes(options: Options) -> list[str]:
    """The classes of real sites, without an image: those in the file `--classes`, else a public data set's own.

    Raises:
        UserError: the file names fewer than two, one twice, or one that cannot be the name of a class.
    """
    file = options.classes_file
    if not file:
        return list(SOURCES[options.dataset].classes)
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # some editors begin with a mark
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as such, one class per line") from None
    classes = [line.strip() for line in lines if line.strip()]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"{file} must name at least two classes, one per line, and none twice")
    check_classes({file: classes})
    return classes
