"""A site's privacy budget: what a task would spend, what has been spent, and what the site allows."""

import importlib.util
import math
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nvflare.app_common.app_constant import AppConstants

from federation.errors import Declined
from federation.protocol import DP
from federation.site.ledger import read
from settings import Options

CEILING_VARIABLE = "FL_DP_EPSILON"  # the site's ceiling on ε, over all jobs in its ledger
DELTA_SHARE = 0.1  # by default, and for the ceiling, δ is this share of 1 / number of training images

Step = tuple[float, float, int]  # noise multiplier, sampling rate, number of steps: as Opacus' accountants count


@dataclass(frozen=True)
class Plan:
    """A round of DP-SGD at a site: `steps` steps, each on a Poisson sample with probability `rate`.

    `noise`: standard deviation of the noise, as a multiple of the norm `clip` to which an image's gradient is clipped;
    `epsilon`: of everything in the site's ledger and this round together, at `delta`; infinite if weights have left
    the site without noise; `seeded`: whether noise and samples follow from the seed, so that there is no guarantee.
    """

    rate: float
    steps: int
    noise: float
    clip: float
    epsilon: float
    delta: float
    seeded: bool


def private(
    site: str, options: Options, data: Any, model: Any, ledger: tuple[Path, dict[str, Any]] | None
) -> list[Any]:
    """The Lightning callbacks that make training at a site differentially private: none without `--dp_epsilon`.

    Args:
        site: its name.
        options: of the job.
        data: the site's data module, after `setup()`.
        model: the LightningModule to train; gets the plan as an entry of its answer.
        ledger: the site's ledger, and what the job's own records have in common; None without a ledger.

    Raises:
        Declined: the job has no `--dp_epsilon` or would exceed the site's ceiling, or the model is unfit for DP-SGD.
    """
    ceiling = _ceiling()
    if options.dp_epsilon is None:
        if ceiling is not None:
            raise Declined(f"this site requires differential privacy ({CEILING_VARIABLE}): use --dp_epsilon")
        return []
    if importlib.util.find_spec("opacus") is None:
        raise Declined("this site lacks a package: pip install opacus")
    from federation.site.dp import DPSGD, first_images, randomness, unfit

    records = read(ledger[0]) if ledger else []
    plan = make_plan(options, sum(data.counts["train"].values()), records, ceiling, ledger[1] if ledger else {})
    if fault := unfit(model, first_images(data.train_dataloader())):
        raise Declined(f"{type(model).__name__} cannot be trained with differential privacy: {fault}")
    model.__fl_meta__ = {**getattr(model, "__fl_meta__", {}), DP: asdict(plan)}
    return [DPSGD(plan, randomness(options, site, data.round))]


def make_plan(
    options: Options, n_images: int, records: list[dict[str, Any]], ceiling: float | None, job: dict[str, Any]
) -> Plan:
    """Derive the noise of each round from the site's number of images, so that the job spends at most `dp_epsilon`.

    Args:
        options: of the job.
        n_images: the site's number of training images.
        records: of its ledger.
        ceiling: on ε, for everything that the site has sent and will have sent if it finishes the job; None: none.
        job: what the job's own records have in common.

    Raises:
        Declined: δ is not below 1 / `n_images`, no noise is large enough, or the ceiling would be exceeded.
    """
    assert options.dp_epsilon is not None
    default = DELTA_SHARE / n_images
    delta = options.dp_delta or default
    if delta >= 1 / n_images:
        raise Declined(f"--dp_delta is {delta:g}: it must be below 1 / {n_images}, the number of training images")
    batch_size = min(options.batch_size, n_images)
    per_epoch = min(math.ceil(n_images / batch_size), options.max_batches or n_images)
    rate, steps = batch_size / n_images, per_epoch * options.local_epochs
    try:
        noise = noise_for(options.dp_epsilon, delta, rate, steps * options.num_rounds)
    except ValueError as error:
        raise Declined(f"--dp_epsilon {options.dp_epsilon:g} is not possible: {error}") from None
    earlier = [record for record in records if any(record.get(key) != value for key, value in job.items())]
    history, others = spent(records), spent(earlier)
    this_round = (noise, rate, steps)
    if ceiling is not None:
        if history is None or others is None:
            raise Declined(f"answers without differential privacy have left this site, so no {CEILING_VARIABLE} holds")
        whole_job = (noise, rate, steps * options.num_rounds)
        total = max(epsilon((*others, whole_job), default), epsilon((*history, this_round), default))
        if total > ceiling:
            before = f"ε = {epsilon(others, default):.2f} is spent"
            raise Declined(f"the job would bring ε to {total:.2f} ({before}), and {CEILING_VARIABLE} is {ceiling:g}")
    total = math.inf if history is None else epsilon((*history, this_round), delta)
    return Plan(rate, steps, noise, options.dp_clip, total, delta, options.env == "sim")


def spent(records: list[dict[str, Any]]) -> tuple[Step, ...] | None:
    """All steps of DP-SGD in a ledger; None if weights have left the site without noise."""
    sent = (record for record in records if record["tensors"] and record["task"] != AppConstants.TASK_VALIDATION)
    if any(not record.get(DP) for record in sent):
        return None
    totals: dict[tuple[float, float], int] = {}
    for plan in filter(None, (record.get(DP) for record in records)):
        key = (plan["noise"], plan["rate"])
        totals[key] = totals.get(key, 0) + plan["steps"]
    return tuple((noise, rate, steps) for (noise, rate), steps in totals.items())


@cache
def epsilon(history: tuple[Step, ...], delta: float) -> float:
    """ε of a list of steps at δ, by Opacus' accountant of Rényi differential privacy (Mironov et al. 2019)."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta)) if history else 0.0


@cache
def noise_for(target: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier for which `steps` steps spend at most ε = `target`.

    Raises:
        ValueError: there is none.
    """
    from opacus.accountants.utils import get_noise_multiplier

    return float(get_noise_multiplier(target_epsilon=target, target_delta=delta, sample_rate=rate, steps=steps))


def _ceiling() -> float | None:
    text = os.environ.get(CEILING_VARIABLE)
    try:
        return float(text) if text else None
    except ValueError:
        raise Declined(f"{CEILING_VARIABLE} of this site is not a number") from None
