"""Resume a finished run from its last global model: `--resume RUN`. command_line.py takes over its settings."""

import argparse
import dataclasses
import json
import pickle

import torch

import model as models
from data import Holdings
from federation.errors import UserError

RESTARTS = {  # what a resumed run begins without
    "fedavg": "the sites' optimizers start afresh in every round anyway",
    "fedprox": "the sites' optimizers start afresh in every round anyway",
    "scaffold": "the control variates restart at zero",
    "fedopt": "the server's momentum restarts at zero",
}


def check(options: argparse.Namespace, holdings: Holdings) -> None:
    """See that the sites hold the same images as before, and that the model of before still fits.

    Args:
        options: the command line's; `resume_from` is the run's model.
        holdings: data.py's `Holdings` of the run that is about to start.

    Raises:
        UserError: they do not, or it is not.
    """
    partition = options.resume_from.parent / "partition.json"
    try:
        before = json.loads(partition.read_text(encoding="utf-8"))
        classes = before["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--resume {options.resume}: {partition} is missing or broken, and says which images the sites held: "
            "resume another run"
        ) from None
    now = json.loads(json.dumps(dataclasses.asdict(holdings)))
    if options.env == "prod":  # only the classes are known: each site sees to its own images
        before, now = classes, now["classes"]
    if before != now:
        raise UserError(f"--resume {options.resume}: its sites held other images: give the --data_root that it had")
    try:
        model = getattr(models, options.model_class)(
            num_classes=len(holdings.classes), learning_rate=options.learning_rate
        )
        model.load_state_dict(torch.load(options.resume_from, weights_only=True))
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"--resume {options.resume}: its model does not load into {options.model_class}: {reason}"
        ) from None


def note(options: argparse.Namespace) -> str:
    """What to tell the user: what restarts, and whether a learning-rate schedule is not the one that was planned."""
    text = f"resumes runs/{options.resume} after round {options.first_round}: {RESTARTS[options.algorithm]}"
    if options.total_rounds != options.planned_rounds:
        text += f"\na learning-rate schedule spans {options.total_rounds} rounds now, not {options.planned_rounds}"
    return text
