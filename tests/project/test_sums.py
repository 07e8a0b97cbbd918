"""Exact sums: the same bits whatever the order of the sites and their grouping into hosts."""

import itertools
from typing import Any

import numpy as np
import pytest
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType

from federation.protocol import SITES
from federation.sums import CHANGE, AnswerSum

# float32 values that cancel: in float32 or float64, a sum depends on its order and grouping.
CANCELING = [1e16, 1.0, -1e16, 3e-8, 2.5e15, -2.5e15, 1e-3]


def answer(value: float, images: int = 1, own: dict[str, Any] | None = None) -> FLModel:
    params = {"w": np.array([value, 1.0], dtype=np.float32), "n": np.array(7, dtype=np.int64)}
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: images, "val_images": images, **(own or {})}
    return FLModel(params_type=ParamsType.FULL, params=params, metrics={"val_acc": 0.5}, meta=meta)


def mean(*hosts: list[tuple[str, FLModel]]) -> FLModel:
    """The mean over all sites of these hosts, each of which sends a sum."""
    total = AnswerSum()
    for sites in hosts:
        own = AnswerSum()
        for site, one in sites:
            own.add_site(site, one)
        total.add_host(own.as_answer())
    return total.mean()


def groupings(sites: list) -> list[list]:
    """Sites in every rotation, cut into one, two and three hosts."""
    rotated = [sites[i:] + sites[:i] for i in range(len(sites))]
    return [[order[i::n] for i in range(n)] for order in rotated for n in (1, 2, 3)]


def test_neither_order_nor_grouping_changes_a_sum_that_cancels():
    sites = [(f"site-{i}", answer(value)) for i, value in enumerate(CANCELING)]
    results = {mean(*hosts).params["w"].tobytes() for hosts in groupings(sites)}
    assert len(results) == 1
    exact = np.float32((1.0 + float(np.float32(3e-8)) + float(np.float32(1e-3))) / len(CANCELING))
    assert np.frombuffer(results.pop(), np.float32)[0] == exact
    plain = {np.sum(order, dtype=np.float64) for order in itertools.permutations(CANCELING)}
    assert len(plain) > 1  # with these values, float64 would depend on the order


def test_weights_count_by_training_images():
    sites = [("site-1", answer(1.0, images=3)), ("site-2", answer(5.0, images=1))]
    assert mean(sites[:1], sites[1:]).params["w"].tolist() == [2.0, 1.0]


def test_tensors_keep_their_dtype():
    result = mean([("site-1", answer(1.0, images=3)), ("site-2", answer(1.0, images=4))])
    assert {name: str(value.dtype) for name, value in result.params.items()} == {"w": "float32", "n": "int64"}
    assert result.params["n"] == 7


def test_changes_of_control_variates_are_summed_alike():
    sites = [
        (f"site-{i}", answer(0.0, own={CHANGE: {"w": np.array([value], dtype=np.float32)}}))
        for i, value in enumerate(CANCELING)
    ]
    assert len({mean(*hosts).meta[CHANGE]["w"].tobytes() for hosts in groupings(sites)}) == 1


def test_every_sites_metrics_arrive_in_the_order_of_names():
    sites = [("site-2", answer(0.0)), ("site-10", answer(0.0)), ("site-1", answer(0.0, images=9))]
    listed = mean(sites[:1], sites[1:]).meta[SITES]
    assert list(listed) == ["site-1", "site-10", "site-2"]
    assert listed["site-1"] == {"metrics": {"val_acc": 0.5}, "train": 9, "val": 9}


@pytest.mark.parametrize("n_sites", [1, 2, 50])
def test_a_mean_of_equal_weights_is_these_weights(n_sites):
    value = float(np.float32(0.1))
    result = mean([(f"site-{i}", answer(value, images=i + 1)) for i in range(n_sites)])
    assert result.params["w"][0] == np.float32(0.1)
