"""Count how a model scores a site's test images: all that metrics need, and much less than the scores."""

import math
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback
from torchmetrics.classification import MulticlassConfusionMatrix

from federation.protocol import CALIBRATION, CONFUSION, N_CONFIDENCES, N_SCORES, SCORES

# Limits of the bins of a score: the closer to 0, where an untrained model's scores are, the narrower. AUROC from such
# bins is off by some 0.002, and by 0.01 for a class whose scores are all close together.
LIMITS = 0.7 * torch.sinh(torch.linspace(-4.7, 4.7, N_SCORES - 1))


class ScoreCounts(Callback):
    """Counts what the model's `test_step` returns: logits, float (B, n_classes). Of anything else, there are no counts.

    Args:
        n_classes: of the federation.
    """

    def __init__(self, n_classes: int) -> None:
        self.n_classes, self.usable = n_classes, True
        self.confusion = MulticlassConfusionMatrix(n_classes)
        self.scores = torch.zeros(n_classes * 2 * N_SCORES, dtype=torch.int64)
        self.calibration = torch.zeros(3, N_CONFIDENCES, dtype=torch.float64)

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.usable &= isinstance(outputs, torch.Tensor) and outputs.shape == (len(batch[1]), self.n_classes)
        if not self.usable:
            return
        logits, labels = outputs.detach().cpu().float(), batch[1].cpu()
        self.confusion.update(logits, labels)
        is_class = torch.nn.functional.one_hot(labels, self.n_classes)
        bins = torch.bucketize(log_odds(logits), LIMITS)
        cells = (2 * torch.arange(self.n_classes) + is_class) * N_SCORES + bins
        self.scores += torch.bincount(cells.flatten(), minlength=len(self.scores))
        confidence, predicted = logits.softmax(dim=1).double().max(dim=1)
        bins = (confidence * N_CONFIDENCES).ceil().long().clamp(1, N_CONFIDENCES) - 1  # (0, 1/15], (1/15, 2/15], ...
        for row, weights in enumerate((torch.ones_like(confidence), (predicted == labels).double(), confidence)):
            self.calibration[row] += torch.bincount(bins, weights, N_CONFIDENCES)

    def counts(self) -> dict[str, np.ndarray]:
        """The counts, by their names in protocol.py; empty if there are none."""
        if not self.usable or not self.calibration.any():
            return {}
        confusion, scores = self.confusion.compute().numpy(), self.scores.numpy()
        kind = np.min_scalar_type(max(int(confusion.max()), int(scores.max())))  # small sites send small numbers
        return {
            CONFUSION: confusion.astype(kind),
            SCORES: scores.astype(kind).reshape(self.n_classes, 2, N_SCORES),
            CALIBRATION: self.calibration.numpy(),
        }


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """The log odds of each class, float (B, C), shifted so that 0 is the share of one class among all.

    Ordered like the probabilities, but those near 0 and 1 are still told apart.
    """
    whole, top = logits.logsumexp(dim=1, keepdim=True), logits.argmax(dim=1, keepdim=True)
    others = whole + torch.log1p(-(logits - whole).exp())  # inaccurate for the most probable class
    without_top = logits.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    return logits - others.scatter(1, top, without_top) + math.log(logits.shape[1] - 1)
