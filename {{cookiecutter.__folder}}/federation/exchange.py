"""Check and describe the answers of sites: on arrival at the server, or at a host that answers for several sites.

A function that checks returns what is wrong, in a few words, or None.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.fl_model import MetaKey
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants

from federation.protocol import (
    CALIBRATION,
    CONFUSION,
    DECLINED,
    DP,
    HOLDS,
    N_CONFIDENCES,
    N_SCORES,
    SCORES,
    SITES,
    SKIPPED,
    TEST_COUNTS,
    TEST_IMAGES,
    VAL_IMAGES,
)

MAX_IMAGES = 10**9  # no site has more; a site's number of images is its weight in the mean
SHARES, LOSSES = ("val_acc", "test_acc"), ("val_loss", "test_loss")  # the metrics that the project itself uses
MAX_REASON = 500  # characters of why a site declines
ROUNDING = 1e-6  # error of a share computed in float32

HEADERS, CONTENT = "__headers__", "DXO"  # the two parts of NVFlare's message
# The server adds these to a message on arrival.
OWN_HEADERS = (ReservedHeaderKey.TASK_NAME, ReservedHeaderKey.TASK_ID, ReservedHeaderKey.PEER_PROPS)

TensorSpecs = dict[str, tuple[tuple[int, ...], str]]  # name -> shape, dtype


class SiteCheck:
    """Checks the answers of sites.

    Args:
        algorithm: job.py's `--algorithm`.
        classes: names of the federation's classes.
        images: site -> its numbers of `train`, `val` and `test` images, if known in advance. Otherwise each site
            reports them with its first answer.
    """

    def __init__(self, algorithm: str, classes: list[str], images: dict[str, dict[str, int]] | None = None):
        self.algorithm, self.classes = algorithm, classes
        self.announced = {site: dict(counts) for site, counts in (images or {}).items()}

    def find_fault(self, site: str, task: str, answer: Shareable, specs: TensorSpecs, round_: int | None) -> str | None:
        """Check the answer of a site to a task.

        Args:
            site: its name.
            task: NVFlare's name of the task.
            answer: the message.
            specs: of the global model.
            round_: the number of the current round.
        """
        content = from_shareable(answer)
        if reason := content.meta.get(DECLINED):
            return f"it declined: {str(reason)[:MAX_REASON]}"
        if SITES in content.meta:
            return "it answers for other sites"
        if task != AppConstants.TASK_TRAIN:
            if content.data_kind != DataKind.METRICS:
                return "its metrics are missing"
            return self.evaluation_fault(site, content.data)
        if (number := answer.get_header(AppConstants.CURRENT_ROUND)) != round_:
            return f"it is for round {number}, not {round_}"
        kind = DataKind.WEIGHT_DIFF if self.algorithm == "fedopt" else DataKind.WEIGHTS
        if content.data_kind != kind:  # the first answer's kind would apply to the whole mean
            return f"its data kind is not {kind.value}"
        meta = content.meta
        counts = {"train": meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND), "val": meta.get(VAL_IMAGES)}
        controls = meta.get(AlgorithmConstants.SCAFFOLD_CTRL_DIFF)
        return (
            tensor_fault(content.data, specs)
            or (tensor_fault(controls, specs, complete=False) if self.algorithm == "scaffold" else None)
            or (metric_fault(meta[DP]) if meta.get(DP) else None)
            or self.training_fault(site, meta.get(MetaKey.INITIAL_METRICS), counts)
        )

    def training_fault(self, site: str, metrics: Any, counts: dict[str, Any]) -> str | None:
        """Check what a site reports along with its weights: metrics, and numbers of `train` and `val` images."""
        return metric_fault(metrics) or self._count_fault(site, counts)

    def evaluation_fault(self, site: str, metrics: Any) -> str | None:
        """Check the metrics of an evaluation, which include numbers of images and may include arrays of them."""
        arrays = {}
        if isinstance(metrics, dict):
            arrays = {name: metrics[name] for name in TEST_COUNTS if name in metrics}
            metrics = {name: value for name, value in metrics.items() if name not in arrays}
        if fault := metric_fault(metrics) or test_counts_fault(arrays, len(self.classes), metrics.get(TEST_IMAGES)):
            return fault
        for name in metrics:
            if name.startswith(HOLDS):
                if (class_ := name.removeprefix(HOLDS)) not in self.classes:
                    return f"it counts images of an unknown class {class_!r}"
                if fault := count_fault(name, metrics[name], 0, None):
                    return fault
        if SKIPPED in metrics and (fault := count_fault(SKIPPED, metrics[SKIPPED], 1, None)):
            return fault
        return self._count_fault(site, {"val": metrics.get(VAL_IMAGES), "test": metrics.get(TEST_IMAGES)})

    def _count_fault(self, site: str, counts: dict[str, Any]) -> str | None:
        announced = self.announced.setdefault(site, {})
        for part, count in counts.items():
            if fault := count_fault(f"its number of {part} images", count, int(part == "train"), announced.get(part)):
                return fault
        self.announced[site] = {**counts, **announced}
        return None


def specs_of(weights: dict[str, Any]) -> TensorSpecs:
    """Shapes and dtypes of a state dict of arrays or tensors."""
    return {name: (tuple(value.shape), dtype_of(value)) for name, value in weights.items()}


def tensor_fault(tensors: Any, specs: TensorSpecs, complete: bool = True) -> str | None:
    """Compare the tensors of an answer with those of the model.

    Args:
        tensors: name -> array or tensor, on the CPU.
        specs: of the global model.
        complete: whether all tensors of the model are required.
    """
    if not isinstance(tensors, dict):
        return "its weights are missing"
    if unknown := sorted(str(name) for name in tensors.keys() - specs.keys()):
        return f"tensor {unknown[0]} is not part of the model"
    if complete and (missing := sorted(specs.keys() - tensors.keys())):
        return f"tensor {missing[0]} is missing"
    for name, value in tensors.items():
        shape, dtype = specs[name]
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            return f"{name} is not a tensor"
        if tuple(value.shape) != shape:
            return f"tensor {name} has shape {tuple(value.shape)}, not {shape}"
        if dtype_of(value) != dtype:
            return f"tensor {name} is {dtype_of(value)}, not {dtype}"
        if not np.isfinite(np.asarray(value)).all():
            return f"tensor {name} is not finite"
    return None


def metric_fault(metrics: Any) -> str | None:
    """Check that metrics are numbers, and that those the project itself uses are plausible."""
    if metrics is None:
        return None
    if not isinstance(metrics, dict):
        return "its metrics have no names"
    for name, value in metrics.items():
        if not isinstance(name, str):
            return f"the name of a metric is {type(name).__name__}, not text"
        if not isinstance(value, int | float):
            return f"{name} is {type(value).__name__}, not a number"
        if name in (*SHARES, *LOSSES) and not math.isfinite(value):
            return f"{name} is not finite"
        if name in SHARES and not -ROUNDING <= value <= 1 + ROUNDING:
            return f"{name} is {value:g}, which is not within 0 to 1"
    return None


def test_counts_fault(arrays: dict[str, Any], n_classes: int, n_images: Any) -> str | None:
    """Check counts of test images (site/scores.py): their shapes, and that each is of all test images."""
    shapes = {CONFUSION: (n_classes, n_classes), SCORES: (n_classes, 2, N_SCORES), CALIBRATION: (3, N_CONFIDENCES)}
    for name, array in arrays.items():
        if getattr(array, "shape", None) != shapes[name] or dtype_of(array)[:4] not in ("uint", "floa"):
            return f"{name} is not an array of counts of shape {shapes[name]}"
        if not (np.isfinite(array).all() and (array >= 0).all()):
            return f"{name} has a count that is negative or not finite"
        total = array.sum() / n_classes if name == SCORES else array[0].sum() if name == CALIBRATION else array.sum()
        if total != n_images or (name == CALIBRATION and (array > array[0] * (1 + ROUNDING)).any()):
            return f"{name} does not count the {n_images} test images"
    return None


def count_fault(name: str, count: Any, lowest: int, announced: int | None) -> str | None:
    """Check a number of images.

    Args:
        name: what is counted, for the message.
        count: the site's number.
        lowest: the smallest plausible number.
        announced: the number at the start, if known; it may decrease, but not increase.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        return f"{name} is {type(count).__name__}, not a whole number"
    if not lowest <= count <= MAX_IMAGES:
        return f"{name} is {count}, which is not within {lowest} to {MAX_IMAGES}"
    if announced is not None and count > announced:
        return f"{name} is {count}, which is more than the {announced} announced at the start"
    return None


def describe(message: Shareable) -> dict[str, Any]:
    """List the content of a message without values, for the audit log.

    Returns:
        `round`, `tensors`, `metrics`, `meta`, `headers`, as in server/audit.py.
    """
    content = message.get(CONTENT) or {}
    measures = (
        (CONTENT, "data") if content.get("kind") == DataKind.METRICS else (CONTENT, "meta", MetaKey.INITIAL_METRICS)
    )
    tensors, metrics, meta, headers = [], [], {}, {}
    for path, value in _leaves(message, ()):
        name = "/".join(path)
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            short = name.removeprefix(f"{CONTENT}/data/")
            size = {"shape": list(value.shape), "dtype": dtype_of(value), "bytes": int(value.nbytes)}
            tensors.append({"name": short, **size})
        elif path[: len(measures)] == measures:
            metrics.append("/".join(path[len(measures) :]))
        elif path[0] != HEADERS:
            meta[name.removeprefix(f"{CONTENT}/").removeprefix("meta/")] = _type(value)
        elif path[1] not in OWN_HEADERS:
            headers["/".join(path[1:])] = _type(value)
    number = message.get_header(AppConstants.CURRENT_ROUND)
    return {"round": number, "tensors": tensors, "metrics": metrics, "meta": meta, "headers": headers}


def mean_metrics(sites: Sequence[tuple[dict[str, Any] | None, int]]) -> dict[str, float]:
    """The means of the sites' metrics of one model, weighted by images.

    Args:
        sites: for each site, its metrics and the number of images behind them.

    Returns:
        The means of those metrics that all sites with images have; empty if there are none.
    """
    measured = [(metrics or {}, images) for metrics, images in sites if images]
    total = sum(images for _, images in measured)
    common = set.intersection(*(set(metrics) for metrics, _ in measured)) if measured else set()
    return {name: sum(metrics[name] * images for metrics, images in measured) / total for name in sorted(common)}


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values in nested dicts and lists, each with its path of keys and indices."""
    if not isinstance(value, dict | list | tuple):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, (*path, str(key)))


def _type(value: Any) -> str:
    """Name of a value's type; for text and bytes, also the length."""
    kind = type(value).__name__
    return f"{kind}, length {len(value)}" if isinstance(value, str | bytes | bytearray) else kind


def dtype_of(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")
