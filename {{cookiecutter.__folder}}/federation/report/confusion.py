"""What the final model takes for what: its predictions on the test images that are on this machine."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from federation.errors import UserError


def confusion(run: Path, result: dict[str, Any], classes: list[str]) -> dict[str, np.ndarray]:
    """Test the final model again, through data.py and model.py as they are now.

    Args:
        run: the run's folder, with the final model.
        result: its results.json.
        classes: the names, in the order of the labels.

    Returns:
        For each site that has test images: int64 (classes, classes), the number of images of a true class (row) that
        the model takes for a class (column).

    Raises:
        UserError: the images are not here, or not those that the site had, or data.py or model.py do not fit.
    """
    root = os.environ.get("FL_DATA_ROOT")
    if not root and result["data_root"]:
        os.environ["FL_DATA_ROOT"] = result["data_root"]
    try:
        return {
            site: _site(run, result, classes, site, test["images"])
            for site, test in result["test"]["sites"].items()
            if test["images"]
        }
    except UserError:
        raise
    except Exception as error:  # whatever a user's data.py and model.py raise, the rest of the report stands
        raise UserError(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}") from None
    finally:
        if not root:
            os.environ.pop("FL_DATA_ROOT", None)


def _site(run: Path, result: dict[str, Any], classes: list[str], site: str, n_images: int) -> np.ndarray:
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    import torch

    import model as models
    from data import SiteDataModule

    name = result["model_class"] or "LitNet"  # the one that there was, for an older file
    model = getattr(models, name)(num_classes=len(classes), learning_rate=result["learning_rate"])
    model.load_state_dict(torch.load(run / result["model"], weights_only=True))
    model.eval()
    data = SiteDataModule(site, classes, argparse.Namespace(**result, gpu=False))
    data.prepare_data()
    data.setup("test")
    if data.n_test != n_images:
        raise UserError(f"{site} had {n_images} test images, and on this machine there are {data.n_test} for it")
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    with torch.inference_mode():
        for index, batch in enumerate(data.test_dataloader()):
            scores, labels = model.predict_step(batch, index), batch[1]
            if scores.shape != (len(labels), len(classes)):
                raise UserError("predict_step of model.py does not return a score for each image and class")
            np.add.at(matrix, (labels.numpy(), scores.argmax(dim=1).numpy()), 1)
    return matrix
