"""What a finished run has to show: bring it home from where NVFlare's server left it, and work out its figures."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from federation.errors import RunError
from federation.protocol import AUDIT_LOG, BEST, EVALUATION, FAILURE, FINAL, HOLDS, REJECTED, read_json_lines
from federation.run import timing
from federation.run.metrics import weighted_mean
from federation.run.workspace import SERVER, read_rounds, root_cause

LAST = "last.pt"  # in the folder of a run that failed


def bring_home(
    run: Path, num_rounds: int, sites: list[str], patience: int | None = None, tolerant: bool = False
) -> dict[str, Any]:
    """Gather what the server wrote: the metrics of every round, the final model and the best one.

    Args:
        run: the run's folder. `final.pt` and `best.pt`, plain dicts of tensors, are written into it, and the receipt.
        num_rounds: how many there should be.
        sites: whom the job was sent to.
        patience: with it there may be fewer: the last so many began with no better validation accuracy.
        tolerant: whether sites may have been lost on the way.

    Returns:
        `rounds`, `stopped_early`, `test`, `model`, `sha256`, `best`, `lost`, `rejected`, `images` and `timing`, as
        federation/run/schema.py documents them, and `counts`: site -> class -> number of images, where real sites have
        told, else empty.

    Raises:
        RunError: something is missing.
    """
    server = run / "workspace" / SERVER
    rounds = read_rounds(run / "workspace")
    stopped_early = patience is not None and len(rounds) < num_rounds and _without_gain(rounds) >= patience
    if len(rounds) != num_rounds and not stopped_early:
        raise RunError(f"only {len(rounds)} of {num_rounds} rounds were finished")
    if not (server / EVALUATION).exists():
        raise RunError("no site evaluated the final model")
    evaluation = json.loads((server / EVALUATION).read_text(encoding="utf-8"))
    final, best = evaluation["final"], evaluation["best"]
    reports = dict(sorted(final["sites"].items(), key=_by_number))
    lost = sorted(set(sites) - set(reports))
    rejected = read_json_lines(server / REJECTED)
    silent = [site for site in lost if site not in {record["site"] for record in rejected}]
    if silent and not tolerant:
        raise RunError(f"{', '.join(silent)} did not evaluate the final model")

    shutil.copy(server / FINAL, run)
    shutil.copy(server / (FINAL if best["round"] == final["round"] else BEST), run / BEST)
    if (receipt := server / AUDIT_LOG).exists():
        shutil.copy(receipt, run)
    # A round's record, counted from 0, has what the sites said of the model that they got: the one before the round.
    curve = {record["round"]: {site: own["metrics"] for site, own in record["sites"].items()} for record in rounds}
    curve[final["round"]] = reports
    images = {site: report["val_images"] for site, report in reports.items()} | dict.fromkeys(lost, 0)
    counts = {
        site: {name.removeprefix(HOLDS): n for name, n in report.items() if name.startswith(HOLDS)}
        for site, report in reports.items()
    }
    return {
        "rounds": [_validation(number, metrics, images) for number, metrics in curve.items()],
        "stopped_early": stopped_early,
        "test": _test(reports),
        "model": FINAL,
        "sha256": fingerprint(torch.load(run / FINAL, weights_only=True)),
        "best": {"round": best["round"], "model": BEST, "test": _test(best["sites"])},
        "lost": lost,
        "rejected": rejected,
        "images": {
            site: {part: own[part] for part in ("train", "val")}
            for record in rounds
            for site, own in record["sites"].items()
        },
        "timing": timing.totals(timing.phases(run / "workspace")),
        "counts": counts if any(counts.values()) else {},
    }


def failure(run: Path, error: Exception) -> str:
    """Why a run failed and what is left of it: a site's own error, else the server's reason to end it, else `error`.

    The global model after the last finished round is brought home as `last.pt`, where there is one.
    """
    server, reason, left = run / "workspace" / SERVER, str(error), ""
    if (server / FAILURE).exists() and not root_cause(run / "workspace"):
        reason = json.loads((server / FAILURE).read_text(encoding="utf-8"))["reason"]
    if (server / FINAL).exists():
        shutil.copy(server / FINAL, run / LAST)
        left = f"\n{run}/{LAST} is the global model after the last round that was finished"
    return f"{reason}{left}\nThe whole log: {run}/log.txt"


def fingerprint(state_dict: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors in the order of their names: equal only where every bit of every weight is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _validation(number: int, metrics: dict[str, dict[str, Any]], images: dict[str, int]) -> dict[str, Any]:
    """What the model after `number` rounds is worth on the sites' validation images, of which each has so many."""
    accuracies, losses = (
        {site: metrics.get(site, {}).get(name) for site in images} for name in ("val_acc", "val_loss")
    )
    mean = weighted_mean(accuracies, images)
    return {
        "round": number,
        "accuracy": mean,
        "sites": accuracies,
        "loss": weighted_mean(losses, images),
        "losses": losses,
        "missing": [] if mean is None else [site for site in images if accuracies[site] is None or not images[site]],
    }


def _test(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The test of one model: `accuracy` and `loss` over all sites' test images, `sites`, and the `worst` of them."""
    tests = {
        site: {"accuracy": report.get("test_acc"), "loss": report.get("test_loss"), "images": report["test_images"]}
        for site, report in sorted(reports.items(), key=_by_number)
    }
    tested = {site: test for site, test in tests.items() if test["images"]}
    images = {site: test["images"] for site, test in tested.items()}
    rated = {site: test for site, test in tested.items() if test["accuracy"] is not None}
    return {
        "accuracy": weighted_mean({site: test["accuracy"] for site, test in tested.items()}, images),
        "loss": weighted_mean({site: test["loss"] for site, test in tested.items()}, images),
        "sites": tests,
        "worst": min(rated, key=lambda site: rated[site]["accuracy"], default=None),
    }


def _without_gain(rounds: list[dict[str, Any]]) -> int:
    """How many rounds there have been since the one with the best validation accuracy."""
    accuracies = [record["metrics"]["val_acc"] for record in rounds if "val_acc" in record["metrics"]]
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0


def _by_number(item: tuple[str, object]) -> tuple[int, str]:
    """site-2 before site-10."""
    digits = re.search(r"\d+$", item[0])
    return (int(digits[0]) if digits else 0, item[0])
