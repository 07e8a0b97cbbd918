"""Collect the files of a finished run, compute its metrics, and check that it worked."""

import hashlib
import json
import shutil
from typing import Any

import torch

from federation import protocol
from federation.errors import RunError, UserError
from federation.protocol import read_json_lines, save_tensors, write_json
from federation.run import model_card, timing
from federation.run.classification import Counts
from federation.run.folder import RunFolder
from federation.run.metrics import by_number, validation, weighted_mean
from settings import Options
from trainer import load_model


def collect(run: RunFolder, options: Options, sites: list[str]) -> dict[str, Any]:
    """Collect what the server wrote: metrics of every round, the final model, the best model, the audit log.

    Args:
        run: receives `final.pt` and `best.pt`, plain state dicts, their `model.json`, and the audit log.
        options: of the run. With `patience` there may be fewer rounds; outside the simulator, sites may be lost.
        sites: the sites that the job was sent to.

    Returns:
        `rounds`, `stopped_early`, `test`, `model`, `sha256`, `best`, `leak`, `privacy`, `lost`, `rejected`,
        `images`, `skipped` and `timing`, as REFERENCE.md documents them, and `counts`: site -> class -> number of
        images, empty unless real sites report it.

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
        {site: model["sites"][site] for site in sorted(model["sites"], key=by_number)} for model in (final, best)
    )
    cohorts = {record["round"]: record["sites"] for record in read_json_lines(server / protocol.COHORTS)}
    lost = sorted(set(cohorts.get(None, sites)) - set(reports))
    rejected = read_json_lines(server / protocol.REJECTED)
    silent = [site for site in lost if site not in {record["site"] for record in rejected}]
    if silent and options.env == "sim":
        raise RunError(f"{', '.join(silent)} did not evaluate the final model")

    model = torch.load(server / protocol.LAST, weights_only=True)["model"]
    save_tensors(run.final, model)
    shutil.copy(run.final if best["round"] == final["round"] else server / protocol.BEST, run.best)
    if (server / protocol.AUDIT_LOG).exists():
        shutil.copy(server / protocol.AUDIT_LOG, run.audit_log)
    # In a round's record (from 0), sites validate the model that they received: the one before that round.
    curve = {
        record["round"]: {site: (own["metrics"], own["val"]) for site, own in record["sites"].items()}
        for record in rounds
    }
    curve[final["round"]] = {site: (report, report[protocol.VAL_IMAGES]) for site, report in reports.items()}
    asked = {number: sorted(cohorts.get(number, sites), key=by_number) for number in curve}
    asked[final["round"]] = [*reports, *lost]
    trained = {record["round"] + 1: [*record["sites"]] for record in rounds if options.sites_per_round}
    counts = {
        site: {name.removeprefix(protocol.HOLDS): n for name, n in report.items() if name.startswith(protocol.HOLDS)}
        for site, report in reports.items()
    }
    tested, best_tested = _test(reports), _test(best_reports)
    model_card.write(run, options, {protocol.FINAL: tested, protocol.BEST: best_tested})
    return {
        "rounds": [
            validation(number, own, asked[number], lost) | {"participants": trained.get(number)}
            for number, own in curve.items()
        ],
        "stopped_early": stopped_early,
        "test": {**tested, **_classification(run, final.get("counts", {}), options)},
        "model": protocol.FINAL,
        "sha256": fingerprint(model),
        "best": {"round": best["round"], "model": protocol.BEST, "test": best_tested},
        "leak": _leak(reports),
        "privacy": {
            site: {name: own[protocol.DP].get(name) for name in ("epsilon", "delta", "noise", "seeded")}
            for record in rounds
            for site, own in record["sites"].items()
            if protocol.DP in own
        },
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

    Writes the reason to `failure.json`, which makes the run a failed one.
    """
    reason = str(error)
    if (run.server / protocol.FAILURE).exists() and not site_failed:
        reason = json.loads((run.server / protocol.FAILURE).read_text(encoding="utf-8"))["reason"]
    write_json(run.failure, {"reason": reason})
    return f"{reason}{left_behind(run)}\nFull log: {run.log}"


def left_behind(run: RunFolder) -> str:
    """What is left of an unfinished run, as lines that follow others: a model, and how to resume; else empty."""
    if not (number := run.keep_last()):
        return ""
    resume = f"resume with: python job.py --resume {run.name}"
    return f"\n{run.last} is the global model after round {number}, the last that finished; {resume}"


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
        load_model(run.final, options)
    except UserError as error:
        return str(error)
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


def _leak(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Membership inference at the sites that measured it: `auc`, `tpr`."""
    return {
        site: {"auc": report[protocol.LEAK_AUC], "tpr": report[protocol.LEAK_TPR]}
        for site, report in reports.items()
        if protocol.LEAK_AUC in report and protocol.LEAK_TPR in report
    }


def _classification(run: RunFolder, counts: dict[str, Any], options: Options) -> dict[str, Any]:
    """Keep how the final model classified the test images, and compute `metrics`, `majority` and `never_predicted`."""
    if not counts:
        return {}
    sites = {site: counts[site] for site in sorted(counts, key=by_number)}
    write_json(run.test_counts, {"classes": options.classes, "sites": sites})
    of_all = Counts.of(*sites.values())
    (values, (bounds, _)), (majority, baseline) = (of_all.metrics(), of_all.intervals(options.seed)), of_all.majority()
    return {
        "metrics": {name: [value, *map(float, bounds.get(name, ()))] for name, value in values.items()},
        "majority": {"class": options.classes[majority], "metrics": baseline},
        "never_predicted": [options.classes[number] for number in of_all.never_predicted()],
    }


def _rounds_since_best(rounds: list[dict[str, Any]]) -> int:
    """Number of rounds since the one with the best validation accuracy."""
    accuracies = [record["metrics"][protocol.METRIC] for record in rounds if protocol.METRIC in record["metrics"]]
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
