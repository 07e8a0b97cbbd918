"""Metrics of a classifier from counts: as those of scikit-learn and torchmetrics, which see every score."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from federation.protocol import CALIBRATION, CONFUSION, SCORES
from federation.run.classification import METRICS, Counts, wilson
from federation.site.scores import ScoreCounts

N_CLASSES = 5


def images(n=1000, sharpness=1.0, seed=0, n_classes=N_CLASSES):
    """Labels, the last classes rare, and logits of an imperfect model that never predicts the last class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, (n,), generator=generator) * torch.randint(0, 2, (n,), generator=generator)
    logits = torch.randn(n, n_classes, generator=generator)
    logits[range(n), labels] += 1.5
    logits[:, -1] -= 9
    return labels, sharpness * logits


def sent(labels, logits, batch=300):
    """What a site sends about them."""
    scores = ScoreCounts(logits.shape[1])
    for i in range(0, len(labels), batch):
        scores.on_test_batch_end(None, None, logits[i : i + batch], (None, labels[i : i + batch]), i)
    return scores.counts()


def odds(logits):
    """Ordered like the probabilities, which are 0 or 1 for a model that is very sure."""
    others = [logits[:, [k for k in range(logits.shape[1]) if k != c]] for c in range(logits.shape[1])]
    return torch.stack([logits[:, c] - own.logsumexp(dim=1) for c, own in enumerate(others)], dim=1)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_metrics_are_those_of_scikit_learn_and_torchmetrics(sharpness):
    labels, logits = images(sharpness=sharpness)
    predicted, counts = logits.argmax(dim=1), Counts.of(sent(labels, logits))
    metrics, classes = counts.metrics(), counts.classes()
    assert list(metrics) == list(METRICS)
    assert metrics["accuracy"] == pytest.approx((labels == predicted).float().mean().item())
    assert metrics["balanced accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["macro F1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    error = multiclass_calibration_error(logits.softmax(dim=1).double(), labels, N_CLASSES, n_bins=15).item()
    assert metrics["calibration error"] == pytest.approx(error, abs=1e-6)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, zero_division=np.nan)
    np.testing.assert_allclose(classes["precision"], precision)
    np.testing.assert_allclose(classes["sensitivity"], recall)
    np.testing.assert_allclose(classes["F1"], f1)
    others = [(predicted != c)[labels != c].float().mean() for c in range(N_CLASSES)]
    np.testing.assert_allclose(classes["specificity"], others, rtol=1e-6)
    areas = [roc_auc_score(labels == c, odds(logits)[:, c]) for c in range(N_CLASSES)]
    np.testing.assert_allclose(classes["AUROC"], areas, atol=0.012)
    assert counts.never_predicted() == [N_CLASSES - 1]


def test_the_sum_of_sites_is_that_of_their_images():
    labels, logits = images()
    parts = [sent(labels[i::3], logits[i::3]) for i in range(3)]
    whole, total = Counts.of(sent(labels, logits)), Counts.of(*parts)
    for name in ("confusion", "scores", "calibration"):
        np.testing.assert_allclose(getattr(total, name), getattr(whole, name))


def test_a_small_site_sends_three_kilobytes():
    counts = sent(*images(200, n_classes=10))
    assert {name: array.shape for name, array in counts.items()} == {
        **{CONFUSION: (10, 10), SCORES: (10, 2, 128), CALIBRATION: (3, 15)}
    }
    assert sum(array.nbytes for array in counts.values()) < 3100


def test_what_is_not_logits_is_not_counted():
    scores = ScoreCounts(N_CLASSES)
    for outputs in (None, {"loss": 1}, torch.zeros(4), torch.zeros(4, N_CLASSES + 1)):
        scores.on_test_batch_end(None, None, outputs, (None, torch.zeros(4)), 0)
        assert scores.counts() == {}
    assert ScoreCounts(N_CLASSES).counts() == {}  # no test images


def test_intervals_are_close_to_those_of_drawing_the_images_again():
    labels, logits = images(400)
    bounds, classes = Counts.of(sent(labels, logits)).intervals(seed=0)
    random = np.random.default_rng(1)
    drawn: dict[str, list[float]] = {"balanced accuracy": [], "macro F1": [], "AUROC": []}
    for _ in range(300):
        rows = random.integers(0, 400, 400)
        true, predicted = labels[rows], logits.argmax(dim=1)[rows]
        drawn["balanced accuracy"].append(balanced_accuracy_score(true, predicted))
        drawn["macro F1"].append(f1_score(true, predicted, average="macro", zero_division=0))
        drawn["AUROC"].append(roc_auc_score(true == 1, odds(logits)[rows, 1]))
    for name, values in drawn.items():
        ours = classes["AUROC"][:, 1] if name == "AUROC" else bounds[name]
        np.testing.assert_allclose(ours, np.percentile(values, (2.5, 97.5)), atol=0.015, err_msg=name)


def test_intervals_contain_the_value_and_follow_from_the_seed():
    counts = Counts.of(sent(*images(300)))
    bounds, _ = counts.intervals(seed=0)
    for name, value in counts.metrics().items():
        assert name == "AUROC" or bounds[name][0] < value < bounds[name][1], name
    again, other = counts.intervals(seed=0)[0], counts.intervals(seed=1)[0]
    assert all((again[name] == bounds[name]).all() for name in bounds)
    assert (other["macro F1"] != bounds["macro F1"]).any()


def test_the_interval_of_a_share_is_wilsons():
    low, high = wilson(np.array([0, 9, 81]), np.array([10, 10, 263]))
    np.testing.assert_allclose(low, [0, 0.596, 0.255], atol=5e-4)
    np.testing.assert_allclose(high, [0.278, 0.982, 0.366], atol=5e-4)
    assert np.isnan(wilson(np.array([0]), np.array([0]))).all()


def test_the_majority_class_is_the_baseline():
    counts = Counts(np.array([[2, 0, 3], [0, 1, 1], [1, 0, 2]]), np.ones((3, 2, 128)), np.ones((3, 15)))
    number, metrics = counts.majority()
    assert number == 0
    assert metrics == pytest.approx({"accuracy": 0.5, "balanced accuracy": 1 / 3, "macro F1": 2 / 9, "AUROC": 0.5})
