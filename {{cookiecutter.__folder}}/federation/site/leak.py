"""A measured leak: does the model's loss tell which images it was trained on?"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.classification import binary_auroc, binary_roc

from federation.protocol import LEAK_AUC, LEAK_IMAGES, LEAK_TPR

FALSE_POSITIVES = 0.01


def membership(model: Any, data: Any, seed: int) -> dict[str, float]:
    """Membership inference by loss, on a site's training images and as many of its test images.

    The attack of Yeom et al. 2018, "Privacy Risk in Machine Learning", measured as Carlini et al. 2022, "Membership
    Inference Attacks From First Principles", recommend. Both work without knowing the model's inside.

    Args:
        model: a LightningModule whose `predict_step` returns a score per image and class.
        data: the site's data module, after `setup()`.
        seed: draws the images, at most `LEAK_IMAGES` of each kind.

    Returns:
        The area under the ROC curve, and the share of training images found at 1 % false positives; empty if the site
        has no test images or the model no such scores.
    """
    loaders = [data.train_dataloader(), data.test_dataloader()]
    n_images = min(LEAK_IMAGES, *(len(loader.dataset) for loader in loaders))
    if not n_images:
        return {}
    random = np.random.default_rng(seed)
    model.eval()
    losses = []
    for loader in loaders:
        drawn = Subset(loader.dataset, random.choice(len(loader.dataset), n_images, replace=False).tolist())
        for index, batch in enumerate(DataLoader(drawn, batch_size=n_images, collate_fn=loader.collate_fn)):
            with torch.inference_mode():
                scores, labels = model.to(batch[1].device).predict_step(batch, index), batch[1]
            if scores.ndim != 2 or len(scores) != len(labels):
                return {}
            losses += F.cross_entropy(scores, labels, reduction="none").nan_to_num().tolist()
    is_member = torch.tensor([1] * n_images + [0] * n_images)
    guesses = (
        torch.tensor(losses, dtype=torch.float64).neg().exp()
    )  # the smaller the loss, the likelier a training image
    false, true, _ = binary_roc(guesses, is_member)
    tpr = true[false <= FALSE_POSITIVES].max()
    return {LEAK_AUC: float(binary_auroc(guesses, is_member)), LEAK_TPR: float(tpr)}
