"""Go on from a finished run's last global model: `--resume RUN`. command_line.py takes over its settings."""

import argparse
import dataclasses
import json

import torch

import model as models
from data import Holdings
from federation.command_line import UsageError

LOST = {  # what a run that goes on begins without
    "fedavg": "nothing is lost: the sites' optimizers start afresh in every round",
    "fedprox": "nothing is lost: the sites' optimizers start afresh in every round",
    "scaffold": "not carried on: the control variates, which start at zero",
    "fedopt": "not carried on: the server's momentum, which starts at zero",
}


def check(options: argparse.Namespace, holdings: Holdings) -> None:
    """See that the sites hold the same images as before, and that the model of before still fits.

    Args:
        options: the command line's; `resume_from` is the run's model.
        holdings: data.py's `Holdings` of the run that is about to start.

    Raises:
        UsageError: they do not, or it is not.
    """
    before = json.loads((options.resume_from.parent / "partition.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dataclasses.asdict(holdings)))
    if options.env == "prod":  # only the classes are known: each site sees to its own images
        before, now = before["classes"], now["classes"]
    if before != now:
        raise UsageError(f"--resume {options.resume}: its sites held other images: give the --data_root that it had")
    try:
        model = getattr(models, options.model_class)(
            num_classes=len(holdings.classes), learning_rate=options.learning_rate
        )
        model.load_state_dict(torch.load(options.resume_from, weights_only=True))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"--resume {options.resume}: its model does not load into {options.model_class}: {reason}"
        ) from None


def note(options: argparse.Namespace) -> str:
    """What to tell the user."""
    return f"goes on from runs/{options.resume} after round {options.first_round}; {LOST[options.algorithm]}"
