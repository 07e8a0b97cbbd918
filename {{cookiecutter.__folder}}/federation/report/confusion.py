"""Confusion matrix of the final model, on the test images on this machine."""

import dataclasses
import os
from typing import Any

import numpy as np

from federation.errors import UserError
from federation.run.folder import RunFolder
from settings import Options


def confusion(run: RunFolder, result: dict[str, Any], classes: list[str]) -> dict[str, np.ndarray]:
    """Test the final model again, with data.py and model.py as they are now.

    Args:
        run: has the final model.
        result: its results.json.
        classes: names, in the order of the labels.

    Returns:
        int64 (classes, classes), number of images by true class (row) and predicted class (column): of `all sites`, and
        of the worst one under its name. Empty if no site has test images.

    Raises:
        UserError: the images are missing or differ from the site's; the message is part of a sentence.
        Exception: whatever data.py and model.py raise if they do not fit the run.
    """
    tests = {site: test for site, test in result["test"]["sites"].items() if test["images"]}
    if not tests:
        return {}
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    import torch

    import trainer
    from data import SiteDataModule

    options = dataclasses.replace(Options.of(result), classes=classes, gpu=False)
    options.data_root = os.environ.get("FL_DATA_ROOT") or options.data_root
    n_classes = len(classes)
    model = trainer.load_model(run.path / result["model"], options)
    whole, matrices = np.zeros((n_classes, n_classes), dtype=np.int64), {}
    for site, test in tests.items():
        data = SiteDataModule(site, options)
        data.prepare_data()
        data.setup("test")
        if (found := trainer.n_images(data, "test")) != test["images"]:
            raise UserError(f"{site} had {test['images']} test images, but this machine has {found} for it")
        matrix = np.zeros_like(whole)
        for index, batch in enumerate(data.test_dataloader()):
            with torch.inference_mode():
                scores, labels = model.predict_step(batch, index), batch[1]
            if scores.shape != (len(labels), n_classes):
                raise UserError("predict_step of model.py does not return a score per image and class")
            np.add.at(matrix, (labels.numpy(), scores.argmax(dim=1).numpy()), 1)
        whole += matrix
        if site == result["test"]["worst"]:
            matrices[site] = matrix
    return {"all sites": whole, **matrices}
