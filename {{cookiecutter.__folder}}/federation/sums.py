"""Add up the training answers of sites, at a host that runs several of them and on the server."""

from typing import Any

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.app_constant import AlgorithmConstants

from federation.exchange import dtype_of, mean_metrics
from federation.protocol import DP, SITES, VAL_IMAGES

CHANGE = AlgorithmConstants.SCAFFOLD_CTRL_DIFF
# In the meta of a host's answer: the low parts of its sums, and the dtypes of the tensors that it added up.
LOW, LOW_CHANGE, DTYPES = "fl_low", "fl_low_change", "fl_dtypes"


class AnswerSum:
    """The sum of the training answers of several sites. Neither their order nor their grouping into hosts matters.

    Tensors are weighted by training images and added up in twice the precision of float64, as pairs of a high and a low
    part: the rounding error of each addition is kept (Joldes, Muller & Popescu 2017, "Tight and Rigorous Error Bounds
    for Basic Building Blocks of Double-Word Arithmetic", algorithm 6). A sum is rounded once, in `mean`; it is exact
    unless a weight differs between sites by a factor of more than 1e16. The mean is that of McMahan et al. 2017,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1.
    """

    def __init__(self) -> None:
        self.sites: dict[str, dict[str, Any]] = {}  # site -> `metrics`, numbers of `train` and `val` images
        self.weights: dict[str, Any] = {}  # name -> high part, low part: float64, of the tensor's shape
        self.changes: dict[str, Any] = {}  # the same for the changes of SCAFFOLD's control variates
        self.dtypes: dict[str, str] = {}
        self.kind = ParamsType.FULL

    def add_site(self, site: str, answer: FLModel) -> None:
        """Add the answer of a site, which must have passed the checks."""
        images = answer.meta[MetaKey.NUM_STEPS_CURRENT_ROUND]
        self.sites[site] = {"metrics": answer.metrics or {}, "train": images, "val": answer.meta.get(VAL_IMAGES, 0)}
        if DP in answer.meta:
            self.sites[site][DP] = answer.meta[DP]
        self.kind = answer.params_type
        self.dtypes |= {name: dtype_of(value) for name, value in answer.params.items()}
        for sums, tensors in ((self.weights, answer.params), (self.changes, answer.meta.get(CHANGE, {}))):
            for name, value in tensors.items():  # float32 x number of images is exact in float64
                add_to(sums, name, np.asarray(value, np.float64) * images)

    def add_host(self, answer: FLModel) -> None:
        """Add what another instance of this class has summed up; see `as_answer`."""
        self.sites |= answer.meta[SITES]
        self.kind = answer.params_type
        self.dtypes |= answer.meta[DTYPES]
        for name, high in answer.params.items():
            add_to(self.weights, name, high, answer.meta[LOW][name])
        for name, high in answer.meta.get(CHANGE, {}).items():
            add_to(self.changes, name, high, answer.meta[LOW_CHANGE][name])

    def as_answer(self) -> FLModel:
        """The sum as a message to the server."""
        meta = {SITES: self.sites, DTYPES: self.dtypes, LOW: {name: low for name, (_, low) in self.weights.items()}}
        if self.changes:
            meta[CHANGE] = {name: high for name, (high, _) in self.changes.items()}
            meta[LOW_CHANGE] = {name: low for name, (_, low) in self.changes.items()}
        return FLModel(params_type=self.kind, params={n: high for n, (high, _) in self.weights.items()}, meta=meta)

    def mean(self) -> FLModel:
        """The mean: weights weighted by training images, metrics by validation images. Its meta has `SITES`."""
        sites = {name: self.sites[name] for name in sorted(self.sites)}
        total = sum(own["train"] for own in sites.values())
        weights, changes = (
            {name: _rounded((high + low) / total, self.dtypes[name]) for name, (high, low) in sums.items()}
            for sums in (self.weights, self.changes)
        )
        metrics = mean_metrics([(own["metrics"], own["val"]) for own in sites.values()])
        meta = {SITES: sites, **({CHANGE: changes} if changes else {})}
        return FLModel(params_type=self.kind, params=weights, metrics=metrics, meta=meta)


def add_to(sums: dict[str, Any], name: str, high: np.ndarray, low: np.ndarray | float = 0.0) -> None:
    """Add a float64 tensor, or a pair of a high and a low part, to the pair `sums[name]`, with hardly any rounding."""
    if name not in sums:
        sums[name] = (high, low + np.zeros_like(high))
        return
    high, error = _two_sum(sums[name][0], high)
    low, small = _two_sum(sums[name][1], low)
    high, error = _two_sum(high, error + low)
    sums[name] = _two_sum(high, error + small)


def _two_sum(a: np.ndarray, b: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """a + b, and its rounding error: exact, whatever their sizes (Knuth, TAOCP 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _rounded(mean: np.ndarray, dtype: str) -> np.ndarray:
    """The mean in the tensor's own dtype; integers, such as a counter of batches, to the nearest."""
    return (mean if np.issubdtype(np.dtype(dtype), np.floating) else np.rint(mean)).astype(dtype)
