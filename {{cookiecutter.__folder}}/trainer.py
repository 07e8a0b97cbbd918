"""The Trainer's settings, and the factory of the model, which is built and loaded nowhere else."""

import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

import model as models
from federation.errors import UserError
from settings import Options


def make_model(options: Options | None = None, round_: int = 0) -> Any:
    """A new LightningModule of the class `options.model_class`, with random weights.

    Args:
        options: None means those of the job that this code runs in.
        round_: the current round, from 0.
    """
    options = options or Options.of_job()
    model = getattr(models, options.model_class)(num_classes=len(options.classes), options=options)
    model.round = round_
    return model


def load_model(file: Path, options: Options) -> Any:
    """The LightningModule of a run with the weights in `file`, a state dict; in evaluation mode.

    Raises:
        UserError: the weights cannot be read, or do not fit the model.
    """
    model = make_model(options)
    try:
        model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    except Exception as error:  # PyTorch raises many types for a broken file
        fault = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"{file} does not load into {options.model_class}: {fault}") from None
    return model.eval()


def make_trainer(options: Options, max_epochs: int, callbacks: list[Callback] | None = None) -> Trainer:
    """A Trainer that writes no files.

    Args:
        options: of the run; `gpu` and `max_batches` are used.
        max_epochs: passes over the training images in `fit`.
        callbacks: none by default.
    """
    has_gpu = torch.cuda.is_available()
    if options.gpu and not has_gpu:
        print("WARNING: --gpu was given, but no CUDA GPU is available: training on the CPU")
    return Trainer(
        accelerator="gpu" if options.gpu and has_gpu else "cpu",
        devices=1,
        max_epochs=max_epochs,
        check_val_every_n_epoch=sys.maxsize,  # client.py validates the global model before `fit`
        num_sanity_val_steps=0,
        limit_train_batches=options.max_batches,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=callbacks,
    )


def n_images(data: Any, part: str) -> int:
    """Number of images in a part of a data module: `train`, `val` or `test`."""
    return sum(data.counts[part].values())


def training_seed(seed: int, site: str, round_: int) -> int:
    """The seed of a site's random numbers (dropout, augmentation) in a round.

    It differs between sites and between rounds, and the result does not depend on which process runs the site.
    """
    return zlib.crc32(f"{seed} {site} {round_}".encode())
