"""Names that one process writes and another reads, and functions that write and read such files.

Files are replaced atomically: a reader finds the old content or the new one, and the old one if writing failed
(OSError). JSON is strict: non-finite numbers become null.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

# Files that travel with a job, next to its code.
OPTIONS = "options.json"  # settings.Options that concern the job
INITIAL = "initial.pt"  # initial weights of the global model

# Files that the server writes into its run folder.
ROUNDS = "rounds.jsonl"  # one line per finished round: server/evaluation.py
EVALUATION = "evaluation.json"  # of the final and of the best model: server/evaluation.py
REJECTED = "rejected.jsonl"  # rejected answers: server/answers.py
FAILURE = "failure.json"  # the `reason` for which the server ended the run
COHORTS = "cohorts.jsonl"  # which sites took part, if not all: server/cohort.py
AUDIT_LOG = "audit.jsonl"  # what left the sites: server/audit.py
LAST = "last.pt"  # after each round: its number as `round`, from 1, and the global model's state dict as `model`
FINAL, BEST = "final.pt", "best.pt"  # state dicts of the global model

# The file in which sites and hosts (site/progress.py) and the server (starting, done) announce what they are doing.
PROGRESS = "progress.jsonl"
STARTING, VALIDATING, TRAINING, TESTING = "starting", "validating", "training", "testing"
PREDICTING, EVALUATING, WAITING, DONE = "predicting", "evaluating", "waiting", "done"
PHASES = (STARTING, VALIDATING, TRAINING, TESTING, PREDICTING, EVALUATING, WAITING)  # of a site

LEDGER = "ledger"  # key of the client's configuration
LEDGER_VARIABLE = "FL_LEDGER"  # the folder of a site's ledger; job.py sets it in a simulation and in a POC

# Keys of a site's answers.
METRIC = "val_acc"  # models are compared by this
VAL_IMAGES, TEST_IMAGES = "val_images", "test_images"  # numbers of images
SKIPPED = "skipped_images"  # number of unreadable images that the site skips, if any
LEAK_AUC, LEAK_TPR = "leak_auc", "leak_tpr"  # membership inference: site/leak.py
LEAK_IMAGES = 500  # it uses equal numbers of training and test images, at most this many of each
DP = "dp"  # a round of differentially private training: site/budget.py
DECLINED = "fl_declined"  # why a site refuses the task
HOLDS = "holds "  # prefix of a class name: number of the site's training and validation images
# Arrays in the metrics of a final evaluation, of the test images: see site/scores.py and run/classification.py.
CONFUSION, SCORES, CALIBRATION = "test_confusion", "test_scores", "test_calibration"
TEST_COUNTS = (CONFUSION, SCORES, CALIBRATION)
N_SCORES, N_CONFIDENCES = 128, 15  # bins

# In the meta of an answer for several sites: site -> `metrics` of the model that it received, its numbers of `train`
# and `val` images. FinalEvaluation takes it out of the mean, because whatever is in there is sent to all sites.
SITES = "fl_sites"
DESCRIBED, LEFT_OUT = "fl_described", "fl_left_out"  # such an answer's records for the audit log and for REJECTED
COHORT = "fl_cohort"  # header of a task: the sites that take part in it; missing: all

# Messages of the heartbeat monitor in the server's log, with a site and --site_timeout in seconds.
LATE, BACK = "{} has not answered within --site_timeout {:.0f} s", "{} has taken another task"


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON."""
    text = json.dumps(finite(value), indent=indent, allow_nan=False)
    _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Append a value as a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), allow_nan=False) + "\n")


class JsonLines:
    """A file of JSON lines, which may not exist yet: each `read` returns the values of new, complete lines."""

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
    """The values of all complete lines; empty if there is no file."""
    return JsonLines(path).read()


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write a state dict with `torch.save`."""
    import torch

    _replace(path, lambda unfinished: torch.save(tensors, unfinished))


def finite(value: Any) -> Any:
    """Replace NaN and infinite floats, which JSON does not have, by None."""
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
