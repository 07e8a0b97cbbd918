"""Collect the files of a finished run, compute its metrics, and check that it worked."""

import hashlib
import json
import re
import shutil
from typing import Any

import torch

from federation import protocol
from federation.errors import RunError
from federation.protocol import read_json_lines
from federation.run import timing
from federation.run.folder import RunFolder
from federation.run.metrics import weighted_mean
from settings import Options
from trainer import make_model


def collect(run: RunFolder, options: Options, sites: list[str]) -> dict[str, Any]:
    """Collect what the server wrote: metrics of every round, the final model, the best model, the audit log.

    Args:
        run: receives `final.pt` and `best.pt`, plain state dicts, and the audit log.
        options: of the run. With `patience` there may be fewer rounds; outside the simulator, sites may be lost.
        sites: the sites that the job was sent to.

    Returns:
        `rounds`, `stopped_early`, `test`, `model`, `sha256`, `best`, `lost`, `rejected`, `images`, `skipped` and
        `timing`, as README.md documents them, and `counts`: site -> class -> number of images, empty unless real sites
        report it.

    Raises:
        RunError: rounds or the final evaluation are missing.
    """
    server, rounds, patience = run.server, run.rounds(), options.patience
    stopped_early = patience is not None and len(rounds) < options.num_rounds and _rounds_since_best(rounds) >= patience
    if len(rounds) != options.num_rounds and not stopped_early:
        raise RunError(f"only {len(rounds)} of {options.num_rounds} rounds finished")
    if not (server / protocol.EVALUATION).exists():
        raise RunError("no site evaluated the final model")
    evaluation = json.loads((server / protocol.EVALUATION).read_text(encoding="utf-8"))
    final, best = evaluation["final"], evaluation["best"]
    reports, best_reports = (
        {site: model["sites"][site] for site in sorted(model["sites"], key=_by_number)} for model in (final, best)
    )
    cohorts = {record["round"]: record["sites"] for record in read_json_lines(server / protocol.COHORTS)}
    lost = sorted(set(cohorts.get(None, sites)) - set(reports))
    rejected = read_json_lines(server / protocol.REJECTED)
    silent = [site for site in lost if site not in {record["site"] for record in rejected}]
    if silent and options.env == "sim":
        raise RunError(f"{', '.join(silent)} did not evaluate the final model")

    shutil.copy(server / protocol.FINAL, run.final)
    shutil.copy(server / (protocol.FINAL if best["round"] == final["round"] else protocol.BEST), run.best)
    if (server / protocol.AUDIT_LOG).exists():
        shutil.copy(server / protocol.AUDIT_LOG, run.audit_log)
    # In a round's record (from 0), sites validate the model that they received: the one before that round.
    curve = {
        record["round"]: {site: (own["metrics"], own["val"]) for site, own in record["sites"].items()}
        for record in rounds
    }
    curve[final["round"]] = {site: (report, report[protocol.VAL_IMAGES]) for site, report in reports.items()}
    asked = {number: sorted(cohorts.get(number, sites), key=_by_number) for number in curve}
    asked[final["round"]] = [*reports, *lost]
    trained = {record["round"] + 1: [*record["sites"]] for record in rounds if options.sites_per_round}
    counts = {
        site: {name.removeprefix(protocol.HOLDS): n for name, n in report.items() if name.startswith(protocol.HOLDS)}
        for site, report in reports.items()
    }
    return {
        "rounds": [
            _validation(number, own, asked[number], lost) | {"participants": trained.get(number)}
            for number, own in curve.items()
        ],
        "stopped_early": stopped_early,
        "test": _test(reports),
        "model": protocol.FINAL,
        "sha256": fingerprint(torch.load(run.final, weights_only=True)),
        "best": {"round": best["round"], "model": protocol.BEST, "test": _test(best_reports)},
        "lost": lost,
        "rejected": rejected,
        "images": {
            site: {part: own[part] for part in ("train", "val")}
            for record in rounds
            for site, own in record["sites"].items()
        },
        "skipped": {site: own[protocol.SKIPPED] for site, own in reports.items() if protocol.SKIPPED in own},
        "timing": timing.totals(timing.phases(run)),
        "counts": counts if any(counts.values()) else {},
    }


def failure(run: RunFolder, error: Exception, site_failed: bool) -> str:
    """Say why a run failed: the site's own error, else the server's reason for ending the run, else `error`.

    Keeps the global model after the last finished round as `last.pt`, if there is one.
    """
    reason, left = str(error), ""
    if (run.server / protocol.FAILURE).exists() and not site_failed:
        reason = json.loads((run.server / protocol.FAILURE).read_text(encoding="utf-8"))["reason"]
    if (run.server / protocol.FINAL).exists():
        shutil.copy(run.server / protocol.FINAL, run.last)
        left = f"\n{run.last} is the global model after the last finished round"
    return f"{reason}{left}\nFull log: {run.log}"


def death(run: RunFolder, process: str) -> str:
    """Say that the process of a site or a host is gone, and for a host, at which of its sites."""
    sites = [record["site"] for record in read_json_lines(run.progress(process)) if "site" in record]
    at = f" at {sites[-1]}" if sites and sites[-1] != process else ""
    return f"{process} died{at}: its process is gone"


def first_death(run: RunFolder, processes: list[str]) -> str | None:
    """The same for the process that stopped first in the middle of a task, if one did."""
    busy = {}  # process -> when it was last heard of
    for process in processes:
        records = read_json_lines(run.progress(process))
        if records and records[-1].get("phase") != protocol.WAITING:
            busy[process] = records[-1]["time"]
    return death(run, min(busy, key=busy.__getitem__)) if busy else None


def find_fault(run: RunFolder, result: dict[str, Any], options: Options, sites: list[str]) -> str | None:
    """Say what is wrong with a run whose results.json is `result`, or None: did all sites report, did training work?"""
    if silent := [site for site in sites if site not in result["test"]["sites"]]:
        return f"no final evaluation from {', '.join(silent)}"
    initial = torch.load(run.bundle / protocol.INITIAL, weights_only=True)
    final = torch.load(run.final, weights_only=True)
    try:
        make_model(options).load_state_dict(final)
    except RuntimeError as error:
        return f"the final model does not load into {options.model_class}: {str(error).splitlines()[-1].strip()}"
    if all(torch.allclose(initial[name], final[name]) for name in initial):  # averaging alone changes the last bits
        return "the final model is the same as the initial one"
    if not all(torch.isfinite(tensor).all() for tensor in final.values()):
        return "the final model is not finite"
    return None


def fingerprint(state_dict: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors, in order of their names: equal only if every bit of every weight is equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _validation(
    number: int, reports: dict[str, tuple[dict[str, Any], int]], asked: list[str], lost: list[str]
) -> dict[str, Any]:
    """Validation metrics after round `number`, weighted by images per site.

    Args:
        number: of the round.
        reports: site -> its metrics, its number of validation images.
        asked: the sites that were to validate this model.
        lost: sites that were lost later; the means of all rounds exclude them.
    """
    names = (protocol.METRIC, "val_loss")
    accuracies, losses = ({site: reports.get(site, ({}, 0))[0].get(name) for site in asked} for name in names)
    images = {site: 0 if site in lost else reports.get(site, ({}, 0))[1] for site in asked}
    mean = weighted_mean(accuracies, images)
    return {
        "round": number,
        "accuracy": mean,
        "sites": _rounded(accuracies),
        "loss": weighted_mean(losses, images),
        "losses": _rounded(losses),
        "missing": [] if mean is None else [site for site in asked if accuracies[site] is None or not images[site]],
    }


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    """The precision of float32, which is what models log: rounds x sites of them are most of results.json."""
    return {site: value if value is None else round(value, 7) for site, value in values.items()}


def _test(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Test of one model: `accuracy` and `loss` over all sites' test images, the same per site, and the `worst` site."""
    images = {site: report[protocol.TEST_IMAGES] for site, report in reports.items()}
    accuracies, losses = ({site: reports[site].get(key) for site in reports} for key in ("test_acc", "test_loss"))
    rated = {site: value for site, value in accuracies.items() if value is not None and images[site]}
    return {
        "accuracy": weighted_mean(accuracies, images),
        "loss": weighted_mean(losses, images),
        "sites": {
            site: {"accuracy": accuracies[site], "loss": losses[site], "images": images[site]} for site in reports
        },
        "worst": min(rated, key=rated.__getitem__, default=None),
    }


def _rounds_since_best(rounds: list[dict[str, Any]]) -> int:
    """Number of rounds since the one with the best validation accuracy."""
    accuracies = [record["metrics"][protocol.METRIC] for record in rounds if protocol.METRIC in record["metrics"]]
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0


def _by_number(site: str) -> tuple[int, str]:
    """site-2 before site-10."""
    digits = re.search(r"\d+$", site)
    return (int(digits[0]) if digits else 0, site)
