"""The Trainer's settings, and how the model is made: the same wherever it is trained, at a site and in compare.py."""

import sys
import zlib
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

import model as models
from settings import Options


def make_model(options: Options | None = None, round_: int = 0) -> Any:
    """The model, a LightningModule, of `options.model_class` with new weights, drawn from torch's random numbers.

    Args:
        options: None: those of the job that this runs in.
        round_: the round that it is for, from 0.
    """
    options = options or Options.of_job()
    model = getattr(models, options.model_class)(num_classes=len(options.classes), options=options)
    model.round = round_
    return model


def make_trainer(options: Options, max_epochs: int, callbacks: list[Callback] | None = None) -> Trainer:
    """A Trainer that trains for `max_epochs` whenever `fit` is called, and writes nothing.

    Args:
        options: the run's; `gpu` and `max_batches` are used.
        max_epochs: passes over the training images.
        callbacks: Lightning's own; none by default.
    """
    has_gpu = torch.cuda.is_available()
    if options.gpu and not has_gpu:
        print("WARNING: --gpu was given, but there is no CUDA GPU here: training on the CPU")
    return Trainer(
        accelerator="gpu" if options.gpu and has_gpu else "cpu",
        devices=1,
        max_epochs=max_epochs,
        check_val_every_n_epoch=sys.maxsize,  # the global model is validated before `fit`, not during it
        num_sanity_val_steps=0,
        limit_train_batches=options.max_batches,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=callbacks,
    )


def n_images(data: Any, part: str) -> int:
    """How many images a data module has in a part: `train`, `val` or `test`."""
    return sum(data.counts[part].values())


def training_seed(seed: int, site: str, round_: int) -> int:
    """What a site seeds torch's random numbers (dropout, augmentation) with, for each round anew.

    The same numbers come then whichever process does the work and whatever it did before; two sites or two rounds
    do not share them.
    """
    return zlib.crc32(f"{seed} {site} {round_}".encode())
