"""Metrics of a classifier, with 95 % intervals, from the counts that sites send (site/scores.py).

Intervals of shares are Wilson's, all others those of a bootstrap (Efron & Tibshirani 1993, "An Introduction to the
Bootstrap") that draws the images again from the counts. They take images for independent: several of one patient make
them too narrow.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from federation.protocol import CALIBRATION, CONFUSION, SCORES

N_DRAWS = 1000
PERCENT = (2.5, 97.5)
CLASS_METRICS = ("sensitivity", "specificity", "precision", "F1", "AUROC")
METRICS = ("accuracy", "balanced accuracy", "macro F1", "AUROC", "calibration error")


@dataclass(frozen=True)
class Counts:
    """Test images of one site or several.

    `confusion`: (C, C), by true and predicted class; `scores`: (C, 2, bins), for each class a histogram of its score
    over the images of other classes, and over its own; `calibration`: (3, bins), for each bin of the probability of
    the predicted class the numbers of images and of correct ones, and the sum of the probabilities.
    """

    confusion: np.ndarray
    scores: np.ndarray
    calibration: np.ndarray

    @classmethod
    def of(cls, *sites: dict[str, Any]) -> "Counts":
        """The sum over sites of what they sent."""
        return cls(*(np.sum([own[name] for own in sites], axis=0) for name in (CONFUSION, SCORES, CALIBRATION)))

    def images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of images per class, each (C,): predicted correctly, of the class, and predicted as the class."""
        return np.diag(self.confusion), self.confusion.sum(axis=1), self.confusion.sum(axis=0)

    def metrics(self) -> dict[str, float]:
        """Each of `METRICS` -> value; NaN if undefined."""
        _, overall = rates(*self.images())
        others = {"AUROC": mean(auroc(self.scores)), "calibration error": calibration_error(self.calibration)}
        return {name: float(value) for name, value in {**overall, **others}.items()}

    def classes(self) -> dict[str, np.ndarray]:
        """Each of `CLASS_METRICS` -> float (C,); NaN if undefined."""
        return {**rates(*self.images())[0], "AUROC": auroc(self.scores)}

    def majority(self) -> tuple[int, dict[str, float]]:
        """The most frequent class, and the metrics of always predicting it."""
        _, true, _ = self.images()
        predicted = true.sum() * (np.arange(len(true)) == true.argmax())
        _, overall = rates(np.minimum(true, predicted), true, predicted)
        return int(true.argmax()), {**{name: float(value) for name, value in overall.items()}, "AUROC": 0.5}

    def never_predicted(self) -> list[int]:
        """The classes that have images, but none is predicted as such."""
        _, true, predicted = self.images()
        return np.flatnonzero((predicted == 0) & (true > 0)).tolist()

    def intervals(self, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The bounds of `metrics`, each (2,), and of `classes`, each (2, C).

        The mean AUROC has none: the counts do not tell which scores belong to the same image.
        """
        random, (hits, true, predicted) = np.random.default_rng(seed), self.images()
        each, overall = rates(*_resampled(self.confusion, random))
        classes = {
            "sensitivity": wilson(hits, true),
            "specificity": wilson(true.sum() - true - predicted + hits, true.sum() - true),
            "precision": wilson(hits, predicted),
            "F1": _percentiles(each["F1"]),
            "AUROC": np.stack([_percentiles(_auroc_draws(own, random)) for own in self.scores], axis=1),
        }
        bounds = {name: _percentiles(overall[name]) for name in ("balanced accuracy", "macro F1")}
        bounds["accuracy"] = wilson(hits.sum(), true.sum())
        n, correct, probability = self.calibration
        drawn = random.multinomial(int(n.sum()), np.stack([correct, n - correct]).ravel() / n.sum(), N_DRAWS)
        right, wrong = np.moveaxis(drawn.reshape(N_DRAWS, 2, -1), 1, 0)
        errors = calibration_error(np.stack([right + wrong, right, (right + wrong) * _ratio(probability, n, 0.0)]))
        # Chance alone adds to this error, and drawing again adds as much once more: mirrored, the two cancel.
        mirrored = 2 * calibration_error(self.calibration) - _percentiles(errors)[::-1]
        bounds["calibration error"] = np.maximum(mirrored, 0)
        return bounds, classes


def rates(
    hits: np.ndarray, true: np.ndarray, predicted: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Metrics per class (..., C) and of all (...), from numbers of images (..., C) as those of `Counts.images`.

    Means are over the classes for which the metric is defined, as in scikit-learn and torchmetrics.
    """
    n = true.sum(axis=-1, keepdims=True)
    each = {
        "sensitivity": _ratio(hits, true),
        "specificity": _ratio(n - true - predicted + hits, n - true),
        "precision": _ratio(hits, predicted),
        "F1": _ratio(2 * hits, true + predicted),
    }
    overall = {"accuracy": hits.sum(axis=-1) / n[..., 0]}
    return each, {**overall, "balanced accuracy": mean(each["sensitivity"]), "macro F1": mean(each["F1"])}


def wilson(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """95 % interval of a share (Wilson 1927), (2, ...): unlike a bootstrap's, not empty for none of a few or all."""
    z = 1.96
    root = np.sqrt(_ratio(part * (whole - part), whole) + z**2 / 4)
    return np.stack([part + z**2 / 2 - z * root, part + z**2 / 2 + z * root]) / (whole + z**2)


def auroc(scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of one class against all others: the probability that its image has the higher score.

    Args:
        scores: histograms (..., 2, bins) of the score over the images of others, and over its own.
    """
    others, own = scores[..., 0, :], scores[..., 1, :]
    lower = np.cumsum(others, axis=-1) - others / 2  # those in the same bin count half
    return _ratio((own * lower).sum(axis=-1), own.sum(axis=-1) * others.sum(axis=-1))


def calibration_error(calibration: np.ndarray) -> np.ndarray:
    """Expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks") of (3, ..., bins)."""
    n, correct, probability = calibration
    return np.abs(correct - probability).sum(axis=-1) / n.sum(axis=-1)


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what is not NaN."""
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def _ratio(part: np.ndarray, whole: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, otherwise), where=whole > 0)


def _percentiles(draws: np.ndarray) -> np.ndarray:
    known = np.where(np.isnan(draws).all(axis=0), 0.0, draws)  # nanpercentile would warn
    return np.where(np.isnan(draws).all(axis=0), np.nan, np.nanpercentile(known, PERCENT, axis=0))


def _resampled(confusion: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws of `hits`, `true` and `predicted`, each (draws, C)."""
    (rows, columns), n, size = np.nonzero(confusion), int(confusion.sum()), len(confusion)
    shares, draws = confusion[rows, columns] / n, np.empty((3, N_DRAWS, size))
    for number in range(N_DRAWS):  # one by one, because many classes have many cells
        drawn = random.multinomial(n, shares)
        draws[0, number] = np.bincount(rows, drawn * (rows == columns), size)
        draws[1, number], draws[2, number] = np.bincount(rows, drawn, size), np.bincount(columns, drawn, size)
    return draws[0], draws[1], draws[2]


def _auroc_draws(scores: np.ndarray, random: np.random.Generator) -> np.ndarray:
    drawn = [random.multinomial(int(own.sum()), own / max(own.sum(), 1), N_DRAWS) for own in scores]
    return auroc(np.stack(drawn, axis=1))
