"""What one process writes and another reads: the names, and how such a file is written.

Files are written whole: whoever reads one finds the old content or the new, never a part, and the old where writing
has failed (OSError). JSON is strict: a number that is not finite becomes null.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

# Files that a job brings along, next to its code.
OPTIONS = "options.json"  # settings.Options, as far as they concern the job
INITIAL = "initial.pt"  # the weights that the federation begins with

# Files that the server writes into its run folder.
ROUNDS = "rounds.jsonl"  # a line per finished round: server/evaluation.py
EVALUATION = "evaluation.json"  # of the final and of the best model: server/evaluation.py
REJECTED = "rejected.jsonl"  # answers that were left out: server/answers.py
FAILURE = "failure.json"  # why the server ended the run: its `reason`
COHORTS = "cohorts.jsonl"  # which sites took part, if not all: server/cohort.py
AUDIT_LOG = "audit.jsonl"  # what came from each site: server/audit.py
FINAL, BEST = "final.pt", "best.pt"  # state dicts of the global model

# The file in which a site (site/progress.py) and the server (phases starting and done) announce what they are doing.
PROGRESS = "progress.jsonl"
STARTING, VALIDATING, TRAINING, TESTING = "starting", "validating", "training", "testing"
PREDICTING, EVALUATING, WAITING, DONE = "predicting", "evaluating", "waiting", "done"
PHASES = (STARTING, VALIDATING, TRAINING, TESTING, PREDICTING, EVALUATING, WAITING)  # of a site

# Keys of a site's answers.
METRIC = "val_acc"  # by which models are compared
VAL_IMAGES, TEST_IMAGES = "val_images", "test_images"  # numbers of images
HOLDS = "holds "  # and the name of a class: how many training and validation images of it the site has

# In the meta of an answer for several sites: site -> `metrics` of the model that it received, its numbers of `train`
# and `val` images. FinalEvaluation takes it out of the mean, because whatever is in there is sent to all sites.
SITES = "fl_sites"
DESCRIBED, LEFT_OUT = "fl_described", "fl_left_out"  # such an answer's records for the audit log and for REJECTED
COHORT = "fl_cohort"  # header of a task: the sites that take part in it; missing: all

# What the heartbeat monitor writes into the server's log: a site, and the seconds that it may take.
LATE, BACK = "{} has not answered within --site_timeout {:.0f} s", "{} has taken another task"


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON."""
    text = json.dumps(finite(value), indent=indent, allow_nan=False)
    _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Append a value as one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), allow_nan=False) + "\n")


class JsonLines:
    """A file of JSON lines, which may come into being later: each `read` returns the values of new, complete lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def read(self) -> list[Any]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                lines = [line for line in file if line.endswith(b"\n")]
        except FileNotFoundError:
            return []
        self.position += sum(map(len, lines))
        return [json.loads(line) for line in lines]


def read_json_lines(path: Path) -> list[Any]:
    """The values of all lines that are complete; none if there is no file."""
    return JsonLines(path).read()


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write a state dict with `torch.save`."""
    import torch

    _replace(path, lambda unfinished: torch.save(tensors, unfinished))


def finite(value: Any) -> Any:
    """The same value with None in place of each float that is NaN or infinite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, write: Any) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
