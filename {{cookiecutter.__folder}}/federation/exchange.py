"""What can be wrong with a site's answer. Nobody at the server can know how an answer was made: all of it is checked.

Each function returns what is wrong, in a few words, or None.
"""

import math
from typing import Any

import numpy as np

MAX_IMAGES = 10**9  # no site has more; a site's number of images is its weight in the mean
SHARES, LOSSES = ("val_acc", "test_acc"), ("val_loss", "test_loss")  # the metrics that the project itself uses
ROUNDING = 1e-6  # by which a share computed in float32 can be off

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
    if foreign := sorted(str(name) for name in tensors.keys() - specs.keys()):
        return f"tensor {foreign[0]} is not part of the model"
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


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")
