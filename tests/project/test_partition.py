"""Partitioning images across sites: properties that hold for any labels, and a few lists that must never change."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import UserError
from federation.site.partition import (
    MIN_DIRICHLET,
    MIN_SITE,
    partition,
    partition_like,
    site_names,
    split,
    split_off,
)
from settings import PARTITIONS

DISJOINT = [scheme for scheme in PARTITIONS if scheme != "none"]
MINIMUM = {"iid": MIN_SITE, "dirichlet": MIN_DIRICHLET, "shards": 2 * MIN_SITE}
BALANCED = np.repeat(np.arange(10), 100)  # 1000 images of 10 classes

always_the_same = settings(derandomize=True, deadline=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)
many_labels = st.builds(
    lambda n_images, n_classes, seed: np.random.RandomState(seed).randint(0, n_classes, n_images),
    n_images=st.integers(150, 300),
    n_classes=st.integers(1, 5),
    seed=seeds,
)
few_sites = st.integers(1, 4)


def as_lists(parts) -> list[list[int]]:
    return [part.tolist() for part in parts]


def together(parts) -> list[int]:
    return sorted(np.concatenate(parts).tolist())


@pytest.mark.parametrize("scheme", DISJOINT)
@always_the_same
@given(labels=many_labels, n_sites=few_sites, seed=seeds)
def test_every_image_goes_to_exactly_one_site(scheme, labels, n_sites, seed):
    assert together(partition(labels, n_sites, scheme, seed)) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", DISJOINT)
@always_the_same
@given(labels=many_labels, n_sites=few_sites, seed=seeds)
def test_every_site_gets_the_minimum(scheme, labels, n_sites, seed):
    assert min(len(part) for part in partition(labels, n_sites, scheme, seed)) >= MINIMUM[scheme]


@pytest.mark.parametrize("scheme", PARTITIONS)
@always_the_same
@given(labels=many_labels, n_sites=few_sites, seed=seeds)
def test_the_same_arguments_give_the_same_sorted_lists(scheme, labels, n_sites, seed):
    first, second = (partition(labels.copy(), n_sites, scheme, seed) for _ in range(2))
    assert as_lists(first) == as_lists(second) == [sorted(part) for part in as_lists(first)]


@pytest.mark.parametrize("scheme", DISJOINT)
def test_another_seed_gives_other_lists(scheme):
    assert as_lists(partition(BALANCED, 3, scheme, seed=0)) != as_lists(partition(BALANCED, 3, scheme, seed=1))


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_numpys_global_random_state_is_not_used(scheme):
    np.random.seed(1)
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()
    first = partition(BALANCED, 3, scheme, seed=0)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before
    np.random.seed(2)
    assert as_lists(partition(BALANCED, 3, scheme, seed=0)) == as_lists(first)


@pytest.mark.parametrize(
    ("scheme", "first_site"),
    [
        ("iid", [0, 1, 2, 5, 6, 9, 11, 12, 13, 16, 21, 22]),
        ("dirichlet", [0, 4, 5, 6, 7, 8, 10, 14, 15, 16]),
        ("shards", [0, 4, 5, 6, 7, 9, 10, 11, 12, 18, 19, 21]),
    ],
)
def test_the_lists_of_a_small_example_never_change(scheme, first_site):
    """A run can be repeated only while they stay: whoever changes them changes every user's sites."""
    first, second = as_lists(partition(np.arange(24) % 3, 2, scheme, seed=7, alpha=100.0))
    assert first == first_site
    assert second == sorted(set(range(24)) - set(first_site))


def test_the_test_images_and_validation_images_of_a_small_example_never_change():
    tested = partition_like(np.arange(12) % 3, np.array([[4, 0, 1], [4, 2, 3]]), seed=7)
    assert as_lists(tested) == [[3, 6, 11], [0, 1, 2, 4, 5, 7, 8, 9, 10]]
    assert split_off(np.arange(12), 0.25, seed=7)[1].tolist() == [2, 7, 10]


def test_none_gives_every_site_all_images():
    assert as_lists(partition(BALANCED, 3, "none", seed=0)) == [list(range(1000))] * 3


@always_the_same
@given(n_images=st.integers(20, 200), n_sites=st.integers(1, 10), seed=seeds)
def test_iid_parts_differ_in_size_by_one_image_at_most(n_images, n_sites, seed):
    sizes = [len(part) for part in partition(np.zeros(n_images, int), n_sites, "iid", seed)]
    assert max(sizes) - min(sizes) <= 1


def unevenness(alpha: float) -> float:
    """The share of a site's largest class, averaged over sites and seeds; 0.1 if all classes are alike."""
    parts = [part for seed in range(5) for part in partition(BALANCED, 4, "dirichlet", seed, alpha)]
    return float(np.mean([np.bincount(BALANCED[part]).max() / len(part) for part in parts]))


def test_a_smaller_alpha_makes_sites_less_similar():
    assert unevenness(0.05) > unevenness(1.0) + 0.1 > unevenness(1000.0) + 0.2
    assert unevenness(1000.0) < 0.13


@pytest.mark.parametrize("seed", range(20))
def test_dirichlet_gives_no_further_class_to_a_full_site(seed):
    sizes = [len(part) for part in partition(BALANCED, 2, "dirichlet", seed, alpha=0.1)]
    assert max(sizes) <= 500 + 100 + 1  # short of its share, it got one class more; an image can be left by rounding


@pytest.mark.parametrize("shards_per_site", [1, 2, 5])
def test_a_site_has_no_more_classes_than_shards(shards_per_site):
    parts = partition(BALANCED, 10, "shards", seed=0, shards_per_site=shards_per_site)
    assert max(len(np.unique(BALANCED[part])) for part in parts) <= shards_per_site


@always_the_same
@given(labels=many_labels, n_sites=few_sites, shards_per_site=st.integers(1, 5), seed=seeds)
def test_a_shard_has_two_classes_only_where_one_ends(labels, n_sites, shards_per_site, seed):
    parts = partition(labels, n_sites, "shards", seed, shards_per_site=shards_per_site)
    boundaries = len(np.unique(labels)) - 1
    assert sum(len(np.unique(labels[part])) for part in parts) <= n_sites * shards_per_site + boundaries


@pytest.mark.parametrize(
    ("labels", "n_sites", "scheme", "more", "named"),
    [
        (np.zeros(5, int), 3, "iid", {}, "use --n_clients 2 or less"),
        (np.zeros(5, int), 3, "dirichlet", {}, "use --n_clients 2 or less"),
        (np.zeros(19, int), 2, "dirichlet", {}, "--alpha"),
        (np.repeat([0, 1], 50), 3, "dirichlet", {"alpha": 1e-9}, "--alpha"),  # two classes cannot fill three sites
        (np.zeros(11, int), 2, "shards", {"shards_per_site": 3}, "--shards_per_site"),
        (BALANCED, 2, "by moonlight", {}, "iid, dirichlet, shards, none"),
    ],
    ids=["iid", "dirichlet-images", "dirichlet-minimum", "dirichlet-alpha", "shards", "unknown"],
)
def test_an_impossible_partition_is_rejected_in_one_line(labels, n_sites, scheme, more, named):
    with pytest.raises(UserError) as error:
        partition(labels, n_sites, scheme, 0, **more)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


count_tables = st.builds(  # sites × classes; many are 0
    lambda n_sites, seed: np.maximum(np.random.RandomState(seed).randint(-30, 30, (n_sites, 5)), 0),
    n_sites=st.integers(1, 5),
    seed=seeds,
)


@always_the_same
@given(labels=many_labels, counts=count_tables, seed=seeds)
def test_every_test_image_goes_to_exactly_one_site(labels, counts, seed):
    parts = partition_like(labels, counts, seed)
    assert len(parts) == len(counts)
    assert together(parts) == list(range(len(labels)))


@always_the_same
@given(labels=many_labels, counts=count_tables, seed=seeds)
def test_test_images_follow_the_classes_that_a_site_trains_on(labels, counts, seed):
    tested = np.array([np.bincount(labels[part], minlength=5) for part in partition_like(labels, counts, seed)])
    held = np.where(counts.sum(axis=0) > 0, counts, 1)  # a class that nobody holds is split into equal parts
    expected = held / held.sum(axis=0) * np.bincount(labels, minlength=5)
    assert np.abs(tested - expected).max() <= 1


def test_the_same_seed_gives_the_same_test_images():
    counts = np.full((3, 10), 7)
    assert as_lists(partition_like(BALANCED, counts, seed=0)) == as_lists(partition_like(BALANCED, counts, seed=0))
    assert as_lists(partition_like(BALANCED, counts, seed=0)) != as_lists(partition_like(BALANCED, counts, seed=1))


@always_the_same
@given(n_images=st.integers(2, 100), share=st.floats(0, 1), seed=seeds)
def test_a_validation_share_is_never_empty_and_never_all(n_images, share, seed):
    indices = np.arange(n_images) * 3 + 1
    rest, split_away = split_off(indices, share, seed)
    assert len(rest) >= 1 and len(split_away) >= 1
    assert together([rest, split_away]) == indices.tolist()
    assert abs(len(split_away) - share * n_images) <= 1


def test_the_same_seed_splits_off_the_same_images():
    assert as_lists(split_off(np.arange(50), 0.2, 3)) == as_lists(split_off(np.arange(50), 0.2, 3))
    assert as_lists(split_off(np.arange(50), 0.2, 3)) != as_lists(split_off(np.arange(50), 0.2, 4))


@pytest.mark.parametrize("n_images", [0, 1])
def test_fewer_than_two_images_cannot_be_split(n_images):
    with pytest.raises(ValueError, match="cannot be split"):
        split_off(np.arange(n_images), 0.2, 0)


def test_sites_are_named_as_the_simulator_names_them():
    assert site_names(3) == ["site-1", "site-2", "site-3"]


# ---- what a data.py calls


def own_rows(site: str | None, options, labels=BALANCED, test_labels=BALANCED[::5]) -> dict[str, list[int]]:
    return {part: rows.tolist() for part, rows in split(labels, test_labels, site, options).items()}


def test_small_sites_validate_on_all_classes_alike(options):
    """Also where the images are sorted by class, as those of image folders are."""
    labels = np.repeat(np.arange(10), 500)
    rows = split(labels, labels, None, options(n_clients=100, partition="iid"))
    shares = np.bincount(labels[rows["val"]]) / len(rows["val"])
    np.testing.assert_allclose(shares, 0.1, atol=0.02)


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_the_rows_of_all_sites_are_the_union_of_each_sites(scheme, options):
    run = options(n_clients=3, partition=scheme)
    sites = [own_rows(site, run) for site in site_names(3)]
    for part, rows in own_rows(None, run).items():
        assert rows == sorted(set().union(*(own[part] for own in sites)))


def test_a_site_has_what_the_partition_gives_it(options):
    run = options(n_clients=3, partition="dirichlet", alpha=0.3, seed=5)
    own = own_rows("site-2", run)
    assert sorted(own["train"] + own["val"]) == partition(BALANCED, 3, "dirichlet", 5, 0.3)[1].tolist()


def test_labels_can_have_any_integer_dtype(options):
    expected = own_rows("site-1", options(partition="shards"))
    for kind in (np.uint8, np.int32, list):
        labels, test_labels = (kind(each) if kind is list else each.astype(kind) for each in (BALANCED, BALANCED[::5]))
        assert own_rows("site-1", options(partition="shards"), labels, test_labels) == expected


def test_changing_a_sites_rows_does_not_affect_others(options):
    first = split(BALANCED, BALANCED, "site-1", options())
    first["train"][:] = 0
    assert split(BALANCED, BALANCED, "site-1", options())["train"].any()


def test_the_partition_of_a_thousand_sites_is_computed_once(options):
    labels = np.tile(np.arange(10), 5000)
    started = time.process_time()
    for site in site_names(1000):
        split(labels, labels[::5], site, options(n_clients=1000))
    assert time.process_time() - started < 10  # split again for each site, it takes minutes
