"""Compute the times of a run from the phases that its sites record. Pure: text and numbers in, numbers out.

A site's progress.jsonl has one line per phase of client.py's loop; plain.py records the same phases. A *round* lasts
from a site's "validate" to its next "validate" or, for the last round, to the final evaluation. So the parts add up
exactly to the wall time:

    wall = start + rounds * (round + steps * step)

- `start_s`: everything before the first round and after the last: imports, simulator, final evaluation, shutdown.
- `round_s`: a round without its training: validate, test, predict, messages, aggregation, waiting.
- `step_s`: a training step: the time inside `fit` divided by its number of steps.
"""

import json
import re
from itertools import groupby, pairwise
from statistics import mean

PHASES = {  # phase in progress.jsonl -> its name here
    "validating": "validate",
    "training": "train",
    "testing": "test",
    "predicting": "predict",
    "evaluating": "evaluate",
}
_ROUND = ("validate", "train", "test", "predict")


class IncompleteLog(Exception):
    """The phases are not complete rounds followed by an evaluation."""


def read_phases(progress: str) -> list[tuple[float, str]]:
    """A site's progress.jsonl -> (seconds since 1970, one of PHASES' values), in order."""
    records = [json.loads(line) for line in progress.splitlines()]
    announced = [(record["time"], record["phase"]) for record in records if "phase" in record]
    # An evaluation is recorded twice, for the validation and for the test images.
    begins = [next(same) for _, same in groupby(announced, key=lambda phase: phase[1])]
    return [(time, PHASES[phase]) for time, phase in begins if phase in PHASES]


def read_process_ids(log: str) -> set[int]:
    """The processes that wrote a site's log: NVFlare logs each process ID when it connects."""
    return {int(number) for number in re.findall(r"is created: PID: (\d+)", log)}


def split_rounds(phases: list[tuple[float, str]]) -> list[dict[str, float]]:
    """One site's phases -> per round, the times of `validate`, `train`, `test`, `predict` and its `end`.

    Raises:
        IncompleteLog: a phase is missing, or there is one too many.
    """
    names = [name for _, name in phases]
    n_rounds = names.count("validate")
    if not n_rounds or names[: 4 * n_rounds + 1] != [*_ROUND * n_rounds, "evaluate"]:
        raise IncompleteLog(f"not complete rounds followed by an evaluation: {', '.join(names) or 'nothing'}")
    times = [time for time, _ in phases]
    return [dict(zip((*_ROUND, "end"), times[first : first + 5], strict=True)) for first in range(0, 4 * n_rounds, 4)]


def without_predicted(phases: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The phases that a client records, too: without plain.py's own, "predicted"."""
    return [(time, name) for time, name in phases if name != "predicted"]


def predict_over_test(sites: list[list[tuple[float, str]]]) -> float:
    """Ratio of prediction time to test time, from plain.py's phases."""
    spans: dict[str, float] = {"test": 0.0, "predict": 0.0}
    for phases in sites:
        for (begin, name), (end, _) in pairwise(phases):
            if name in spans:
                spans[name] += end - begin
    return spans["predict"] / spans["test"]


def cost(
    start: float, end: float, sites: list[list[tuple[float, str]]], steps: int, predict_over_test: float
) -> dict[str, float]:
    """The costs of a run in seconds, as means over its sites and rounds.

    Args:
        start, end: of the whole program, in seconds since 1970.
        sites: the phases of each site.
        steps: a site's training steps per round.
        predict_over_test: ratio of prediction time to test time in the plain loop, because a client does not record
            when prediction ends.

    Returns:
        `start_s`, `round_s` and `step_s` (see the top of this file), `rounds` and `steps`;
        `evaluation_s`: the part of `round_s` that grows with the images: validate, test, predict;
        `overhead_s`: the rest of `round_s`, at the site that waits least;
        `final_evaluation_s`: the part of `start_s` that grows with the images;
        `fit_s`: inside `fit` per round; `to_training_s`: from the start to the first training.
    """
    rounds = [split_rounds(phases) for phases in sites]
    every = [one for site in rounds for one in site]
    fit = mean(one["test"] - one["train"] for one in every)
    first, last = mean(site[0]["validate"] for site in rounds), mean(site[-1]["end"] for site in rounds)
    n_rounds = len(rounds[0])
    evaluations = mean(sum(name == "evaluate" for _, name in phases) for phases in sites)

    def seconds_evaluating(one: dict[str, float]) -> float:
        return one["train"] - one["validate"] + (one["predict"] - one["test"]) * (1 + predict_over_test)

    def seconds_waiting(one: dict[str, float]) -> float:
        return one["end"] - one["validate"] - (one["test"] - one["train"]) - seconds_evaluating(one)

    return {
        "start_s": first - start + end - last,
        "round_s": (last - first) / n_rounds - fit,
        "step_s": fit / steps,
        "rounds": n_rounds,
        "steps": steps,
        "evaluation_s": mean(map(seconds_evaluating, every)),
        "overhead_s": mean(min(map(seconds_waiting, same)) for same in zip(*rounds, strict=True)),
        "final_evaluation_s": evaluations
        * mean(one["train"] - one["validate"] + one["predict"] - one["test"] for one in every),
        "fit_s": fit,
        "to_training_s": min(site[0]["train"] for site in rounds) - start,
    }


def predict_wall(cost: dict[str, float], rounds: int, scale: float = 1.0) -> float:
    """Predict the seconds that the same job takes with `rounds` rounds and `scale` times the images."""
    start = cost["start_s"] + (scale - 1) * cost["final_evaluation_s"]
    one = cost["round_s"] + (scale - 1) * cost["evaluation_s"]
    return start + rounds * (one + scale * cost["steps"] * cost["step_s"])
