"""What is done to a site's answer, wherever it arrives: check it, describe it, add it up.

Nobody can know how an answer was made: all of it is checked. A function that checks returns what is wrong, in a few
words, or None.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from nvflare.apis.dxo import DataKind
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg

from federation.protocol import TEST_IMAGES, VAL_IMAGES

MAX_IMAGES = 10**9  # no site has more; a site's number of images is its weight in the mean
SHARES, LOSSES = ("val_acc", "test_acc"), ("val_loss", "test_loss")  # the metrics that the project itself uses
ROUNDING = 1e-6  # by which a share computed in float32 can be off

HEADERS, DXO = "__headers__", "DXO"  # the two parts of NVFlare's message
# The server adds these to a message on arrival.
OWN_HEADERS = (ReservedHeaderKey.TASK_NAME, ReservedHeaderKey.TASK_ID, ReservedHeaderKey.PEER_PROPS)

TensorSpecs = dict[str, tuple[tuple[int, ...], str]]  # name -> shape, dtype


def specs_of(weights: dict[str, Any]) -> TensorSpecs:
    """Names, shapes and dtypes of a state dict of arrays or tensors."""
    return {name: (tuple(value.shape), _dtype(value)) for name, value in weights.items()}


def tensor_fault(tensors: Any, specs: TensorSpecs, complete: bool = True) -> str | None:
    """Compare the tensors of an answer with those of the model.

    Args:
        tensors: name -> array or tensor, on the CPU.
        specs: those of the global model.
        complete: whether each of them has to be there.
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
        if _dtype(value) != dtype:
            return f"tensor {name} is {_dtype(value)}, not {dtype}"
        if not np.isfinite(np.asarray(value)).all():
            return f"tensor {name} is not finite"
    return None


def metric_fault(metrics: Any) -> str | None:
    """Check that metrics are numbers, and that those which the project itself uses are plausible."""
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


def count_fault(name: str, count: Any, lowest: int, announced: int | None) -> str | None:
    """Check a number of images.

    Args:
        name: whose number it is.
        count: what the site says.
        lowest: what it is at least.
        announced: what it was at the start, where that is known: it can be less now, and never more.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        return f"{name} is {type(count).__name__}, not a whole number"
    if not lowest <= count <= MAX_IMAGES:
        return f"{name} is {count}, which is not within {lowest} to {MAX_IMAGES}"
    if announced is not None and count > announced:
        return f"{name} is {count}, which is more than the {announced} announced at the start"
    return None


def describe(message: Shareable) -> dict[str, Any]:
    """List what is in a message, without a value; server/audit.py says how.

    Returns:
        `round`, `tensors`, `metrics`, `meta`, `headers`.
    """
    content = message.get(DXO) or {}
    measures = (DXO, "data") if content.get("kind") == DataKind.METRICS else (DXO, "meta", MetaKey.INITIAL_METRICS)
    tensors, metrics, meta, headers = [], [], {}, {}
    for path, value in _leaves(message, ()):
        name = "/".join(path)
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            short = name.removeprefix(f"{DXO}/data/")
            size = {"shape": list(value.shape), "dtype": _dtype(value), "bytes": int(value.nbytes)}
            tensors.append({"name": short, **size})
        elif path[: len(measures)] == measures:
            metrics.append("/".join(path[len(measures) :]))
        elif path[0] != HEADERS:
            meta[name.removeprefix(f"{DXO}/").removeprefix("meta/")] = _type(value)
        elif path[1] not in OWN_HEADERS:
            headers["/".join(path[1:])] = _type(value)
    number = message.get_header(AppConstants.CURRENT_ROUND)
    return {"round": number, "tensors": tensors, "metrics": metrics, "meta": meta, "headers": headers}


def mean_metrics(sites: list[tuple[dict[str, Any] | None, int]]) -> dict[str, float]:
    """The mean of the sites' metrics of one model, as if their images were one set.

    Args:
        sites: for each site its metrics, and the number of images that it measured them on.

    Returns:
        Those metrics that all sites with images have; empty if no site has any.
    """
    measured = [(metrics or {}, images) for metrics, images in sites if images]
    total = sum(images for _, images in measured)
    common = set.intersection(*(set(metrics) for metrics, _ in measured)) if measured else set()
    return {name: sum(metrics[name] * images for metrics, images in measured) / total for name in sorted(common)}


def mean_answer(
    answers: dict[str, FLModel], aggregate: Callable[[list[FLModel]], FLModel] = BaseFedAvg.aggregate_fn
) -> FLModel:
    """The mean of what several sites have trained, in the order of their names: the same answers give the same bits.

    Weights are weighted by training images, as the sites report them in `NUM_STEPS_CURRENT_ROUND`; metrics by
    validation images.

    Args:
        answers: site -> its answer.
        aggregate: NVFlare's function that does the arithmetic.
    """
    results = [answers[name] for name in sorted(answers)]
    mean = aggregate(results)
    mean.metrics = mean_metrics([(result.metrics, result.meta.get(VAL_IMAGES, 0)) for result in results])
    return mean


def add_up(answers: dict[str, FLModel]) -> FLModel:
    """One answer for several sites, as if it came from a site that has the images of all of them.

    Args:
        answers: site -> its answer, all to the same task.
    """
    if not any(answer.params for answer in answers.values()):
        return FLModel(metrics=_evaluated([answers[name].metrics or {} for name in sorted(answers)]))
    mean = mean_answer(answers)
    for count in (MetaKey.NUM_STEPS_CURRENT_ROUND, VAL_IMAGES):
        mean.meta[count] = sum(answer.meta.get(count, 0) for answer in answers.values())
    return mean


def _evaluated(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of an evaluation, as if the sites' images were one set."""
    counts = {name for metrics in sites for name in metrics if isinstance(metrics[name], int)}
    means: dict[str, Any] = {}
    for images, stage in ((VAL_IMAGES, "val_"), (TEST_IMAGES, "test_")):
        own = [{name: value for name, value in metrics.items() if name.startswith(stage)} for metrics in sites]
        means |= mean_metrics([(one, metrics[images]) for one, metrics in zip(own, sites, strict=True)])
    return {**means, **{name: sum(metrics.get(name, 0) for metrics in sites) for name in counts}}


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All that is in nested dicts and lists, each with the keys and places that lead to it."""
    if not isinstance(value, dict | list | tuple):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, (*path, str(key)))


def _type(value: Any) -> str:
    """`int`, `float`, ...; text and bytes with their length."""
    kind = type(value).__name__
    return f"{kind}, length {len(value)}" if isinstance(value, str | bytes | bytearray) else kind


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")
