"""Partition images across simulated sites: from labels, a scheme and a seed to lists of indices.

Pure functions: the same arguments give the same lists on every machine, because the streams of
`numpy.random.RandomState` never change.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from federation.errors import UserError
from settings import PARTITIONS, Options

VALIDATION_SHARE = 0.2  # of each site's training images; fixed for the whole run
MIN_DIRICHLET = 10  # images per site, as in NVFlare's and NIID-Bench's splitters
MIN_SITE = 2  # images per site: one to train on and one to validate
MAX_DRAWS = 1000

Columns = tuple[np.ndarray | None, np.ndarray | None]  # values of the rows of the training and of the test data


def site_names(n_sites: int) -> list[str]:
    """NVFlare's names of simulated sites: site-1, site-2, ..."""
    return [f"site-{i}" for i in range(1, n_sites + 1)]


def hosts(options: Options) -> dict[str, list[str]]:
    """Host -> the simulated sites that it runs. A host is a process, NVFlare's client; with one site, it has its name.

    Args:
        options: `n_clients`, `n_hosts` and `host_names` are used; without `n_hosts`, each site has its own process.
    """
    names, n_hosts = site_names(options.n_clients), options.n_hosts or options.n_clients
    if n_hosts == len(names) and not options.host_names:
        return {name: [name] for name in names}
    host_names = options.host_names or [f"host-{i + 1}" for i in range(n_hosts)]
    return {host: names[i::n_hosts] for i, host in enumerate(host_names)}


def split(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    site: str | None,
    options: Options,
    groups: Columns = (None, None),
    sites: Columns = (None, None),
) -> dict[str, np.ndarray]:
    """A site's rows according to `--partition`. Call this in your own data.py.

    Args:
        train_labels: int (N,), class of each row of the training data, from 0.
        test_labels: int (M,), the same for the test data.
        site: its name; None means the rows of all sites.
        options: `partition`, `alpha`, `shards_per_site`, `n_clients` and `seed` are used.
        groups: int (N,) and (M,), the group of each row, such as its patient: rows of a group stay together, at one
            site, and among its training or its validation rows. None: each row is on its own.
        sites: int (N,) and (M,), for `--partition site`: the site of each row, 0 for site-1.

    Returns:
        Sorted indices, int64: `train` and `val`, disjoint rows of the training data, and `test`, rows of the test data.
        Sites do not share rows, unless the partition is `none`.

    Raises:
        UserError: this partition is impossible, or no simulated site has this name.
    """
    everything, names = options.partition == "none", site_names(options.n_clients)
    if not everything and site is not None and site not in names:
        raise UserError(f"{site} is not one of {names[0]} to {names[-1]}: real sites need --partition none")
    by_site = options.partition == "site"
    if by_site:
        if sites[0] is None or sites[1] is None:
            raise UserError("--partition site needs images.csv with the column site: add it, or use another partition")
        known, trained = set(range(len(names))), set(sites[0].tolist())
        if trained != known or not set(sites[1].tolist()) <= known:
            raise UserError(f"the column site of images.csv must have {names[0]} to {names[-1]}: see --n_clients")
    columns = [
        tuple(np.asarray(own, dtype=np.int64).tobytes() for own in pair if own is not None)
        for pair in ((train_labels, test_labels), groups, sites if by_site else ())
    ]
    n_sites = 1 if everything else options.n_clients
    try:
        own = _split(*columns, n_sites, options.partition, options.seed, options.alpha, options.shards_per_site)
    except ValueError as error:
        raise UserError(f"the training images of {site or 'all sites'}: {error}") from None
    own = own if everything or site is None else [own[names.index(site)]]
    return {part: np.sort(np.concatenate([rows[part] for rows in own])) for part in ("train", "val", "test")}


@lru_cache(maxsize=8)  # computed once for all sites
def _split(
    labels: Any, groups: Any, sites: Any, n_sites: int, scheme: str, seed: int, alpha: float, shards_per_site: int
) -> list[dict[str, np.ndarray]]:
    """The rows of all sites; the columns are pairs of bytes, or empty."""
    train_labels, test_labels = (np.frombuffer(own, np.int64) for own in labels)
    n_classes = max(train_labels.max(initial=0), test_labels.max(initial=0)) + 1
    # What is partitioned are units: groups, or else single images.
    units, test_units = (
        np.unique(np.frombuffer(own, np.int64), return_inverse=True)[1] if groups else np.arange(len(of))
        for own, of in zip(groups or labels, (train_labels, test_labels), strict=True)
    )
    if sites:
        training, testing = (
            [np.flatnonzero(np.frombuffer(own, np.int64) == i) for i in range(n_sites)] for own in sites
        )
    else:
        of_unit, of_test_unit, noun = train_labels, test_labels, "images"
        if groups:
            of_unit, of_test_unit = most_frequent(train_labels, units), most_frequent(test_labels, test_units)
            noun = "groups"
        parts = partition(of_unit, n_sites, scheme, seed, alpha, shards_per_site, noun)
        training = [np.flatnonzero(np.isin(units, part)) for part in parts]
        counts = np.array([np.bincount(train_labels[own], minlength=n_classes) for own in training])
        parts = partition_like(of_test_unit, counts, seed)
        testing = [np.flatnonzero(np.isin(test_units, part)) for part in parts]
    # With one seed for all sites, small sites of equal size would validate on images from the same places of the data,
    # often of the same classes, and train on the other classes.
    seeds = [(seed + i) % 2**32 for i in range(n_sites)]
    trained = [split_off(own, VALIDATION_SHARE, seeds[i], units if groups else None) for i, own in enumerate(training)]
    return [{"train": own, "val": val, "test": tested} for (own, val), tested in zip(trained, testing, strict=True)]


def most_frequent(labels: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The most frequent class of each unit.

    Args:
        labels: int64 (N,), class of each image.
        units: int64 (N,), unit of each image, from 0 to M - 1.

    Returns:
        int64 (M,).
    """
    pairs, counts = np.unique(np.stack([units, labels]), axis=1, return_counts=True)
    found = np.zeros(units.max(initial=-1) + 1, dtype=np.int64)
    order = np.argsort(counts, kind="stable")
    found[pairs[0, order]] = pairs[1, order]  # of equal units, the last one counts
    return found


def partition(
    labels: np.ndarray,
    n_sites: int,
    scheme: str,
    seed: int,
    alpha: float = 0.5,
    shards_per_site: int = 2,
    noun: str = "images",
) -> list[np.ndarray]:
    """Partition images, or groups of images, across the sites.

    Args:
        labels: int64 (N,), class of each image.
        n_sites: number of sites.
        scheme: one of settings.PARTITIONS.
            `iid`: shuffled and cut into parts whose sizes differ by at most one image.
            `dirichlet`: each class is spread over the sites in proportions drawn from Dir(alpha); see `_dirichlet`.
            `shards`: sorted by class and cut into `n_sites * shards_per_site` shards; each site gets `shards_per_site`
            random ones (McMahan et al. 2017, section 3).
            `none`: every site has all images.
        seed: from 0 to 2**32 - 1.
        alpha: concentration of the Dirichlet distribution, > 0; the smaller, the more uneven.
        shards_per_site: for `shards`.
        noun: what is partitioned, for errors: `images` or `groups`.

    Returns:
        Sorted indices, int64, for each site; disjoint and complete, except with `none`.

    Raises:
        UserError: the scheme is unknown or leaves a site with too few images.
    """
    n_images = len(labels)
    if scheme == "none":
        return [np.arange(n_images) for _ in range(n_sites)]
    if n_images < MIN_SITE * n_sites:
        raise UserError(
            f"{n_images} training {noun} are too few for {n_sites} sites: "
            f"each needs {MIN_SITE}; use --n_clients {n_images // MIN_SITE} or less"
        )
    random = np.random.RandomState(seed)
    if scheme == "iid":
        parts = np.array_split(random.permutation(n_images), n_sites)
    elif scheme == "dirichlet":
        parts = _dirichlet(labels, n_sites, alpha, random, noun)
    elif scheme == "shards":
        parts = _shards(labels, n_sites, shards_per_site, random, noun)
    else:
        raise UserError(f"unknown partition {scheme!r}: choose one of {', '.join(PARTITIONS)}")
    return [np.sort(part) for part in parts]


def _dirichlet(
    labels: np.ndarray, n_sites: int, alpha: float, random: np.random.RandomState, noun: str
) -> list[np.ndarray]:
    """Spread each class over the sites by p ~ Dir(alpha); redraw until each site has MIN_DIRICHLET images.

    As in NIID-Bench (Li et al. 2022, "Federated Learning on Non-IID Data Silos", distribution-based label imbalance)
    and NVFlare's CIFAR-10 splitter, after Wang et al. 2020 ("Federated Learning with Matched Averaging"): a site that
    already has its equal share gets nothing of the remaining classes. Hsu et al. 2019 ("Measuring the Effects of
    Non-Identical Data Distribution") instead draw a mixture of classes for each of equally large sites.
    """
    n_images, least = len(labels), MIN_DIRICHLET if noun == "images" else MIN_SITE
    for _ in range(MAX_DRAWS if n_images >= least * n_sites else 0):
        parts: list[list[np.ndarray]] = [[] for _ in range(n_sites)]
        sizes = np.zeros(n_sites)
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            share = random.dirichlet(np.full(n_sites, alpha)) * (sizes < n_images / n_sites)
            if not share.sum() > 0:  # a tiny alpha can give a whole class to a full site
                break
            cuts = (np.cumsum(share / share.sum()) * len(members)).astype(int)[:-1]
            for site, own in enumerate(np.split(members, cuts)):
                parts[site].append(own)
                sizes[site] += len(own)
        else:
            if sizes.min() >= least:
                return [np.concatenate(part) for part in parts]
    raise UserError(
        f"no Dirichlet draw with alpha {alpha} gives each of {n_sites} sites {least} of the {n_images} "
        f"training {noun}: use a larger --alpha or fewer sites"
    )


def _shards(
    labels: np.ndarray, n_sites: int, shards_per_site: int, random: np.random.RandomState, noun: str
) -> list[np.ndarray]:
    n_shards = n_sites * shards_per_site
    if len(labels) < n_shards * MIN_SITE:
        raise UserError(
            f"{len(labels)} training {noun} are too few for {n_shards} shards: "
            "use a smaller --shards_per_site or fewer sites"
        )
    by_class = random.permutation(len(labels))
    by_class = by_class[np.argsort(labels[by_class], kind="stable")]
    shards = np.array_split(by_class, n_shards)
    order = random.permutation(n_shards).reshape(n_sites, shards_per_site)
    return [np.concatenate([shards[i] for i in own]) for own in order]


def partition_like(labels: np.ndarray, counts: np.ndarray, seed: int) -> list[np.ndarray]:
    """Partition the test images so that each site is tested on the class mixture that it trains on.

    Args:
        labels: int64 (N,), class of each test image.
        counts: int (sites, classes), training images of each class at each site. A class that no site has is split
            evenly.
        seed: from 0 to 2**32 - 1.

    Returns:
        Sorted indices, int64, for each site; disjoint and complete. A site's list may be empty.
    """
    random = np.random.RandomState(seed)
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        held = counts[:, label]
        share = held / held.sum() if held.sum() else np.full(len(counts), 1 / len(counts))
        cuts = np.round(np.cumsum(share) * len(members)).astype(int)[:-1]
        for part, own in zip(parts, np.split(members, cuts), strict=True):
            part.append(own)
    return [np.sort(np.concatenate(part)) if part else np.array([], dtype=int) for part in parts]


def split_off(
    indices: np.ndarray, share: float, seed: int, units: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split off a random share of a site's images, or of its groups of images: at least one, never all.

    Args:
        indices: int64 (N,), N >= 2.
        share: between 0 and 1.
        seed: from 0 to 2**32 - 1.
        units: int64, the group of each image of all sites, of which groups are not split; None: no groups.

    Returns:
        (rest, share): sorted indices, disjoint and complete.

    Raises:
        ValueError: fewer than two images or groups.
    """
    chosen, noun = (indices, "image") if units is None else (np.unique(units[indices]), "group")
    if len(chosen) < MIN_SITE:
        raise ValueError(f"{len(chosen)} {noun}(s) cannot be split: {MIN_SITE} are needed")
    n_held = min(max(round(share * len(chosen)), 1), len(chosen) - 1)
    shuffled = np.random.RandomState(seed).permutation(chosen)
    rest, held = np.sort(shuffled[n_held:]), np.sort(shuffled[:n_held])
    if units is None:
        return rest, held
    return indices[np.isin(units[indices], rest)], indices[np.isin(units[indices], held)]
