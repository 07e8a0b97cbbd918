"""The Trainer's settings, the same wherever the model is trained: at a site (client.py) and in compare.py."""

import argparse
import sys
import zlib

import torch
from pytorch_lightning import Callback, Trainer


def make_trainer(args: argparse.Namespace, max_epochs: int, callbacks: list[Callback] | None = None) -> Trainer:
    """A Trainer that trains for `max_epochs` whenever `fit` is called, and writes nothing.

    Args:
        args: the command line's; `gpu` and `max_batches` are used.
        max_epochs: passes over the training images.
        callbacks: Lightning's own; none by default.
    """
    return Trainer(
        accelerator="gpu" if args.gpu and torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=max_epochs,
        check_val_every_n_epoch=sys.maxsize,  # the global model is validated before `fit`, not during it
        num_sanity_val_steps=0,
        limit_train_batches=args.max_batches,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=callbacks,
    )


def training_seed(seed: int, site: str, round_: int) -> int:
    """What a site seeds torch's random numbers (dropout, augmentation) with, for each round anew.

    The same numbers come then whichever process does the work and whatever it did before; two sites or two rounds
    do not share them.
    """
    return zlib.crc32(f"{seed} {site} {round_}".encode())
