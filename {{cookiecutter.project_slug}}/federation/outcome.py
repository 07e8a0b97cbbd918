"""What a finished run has to show: bring it home from where NVFlare's server left it, and work out its figures."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from federation import timing
from federation.evaluation import BEST, FINAL, REPORT
from federation.figures import weighted_mean
from federation.workspace import SERVER, RunFailed, read_rounds


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
        `rounds`, `stopped_early`, `test`, `model`, `sha256`, `best`, `lost` and `timing`, as federation/schema.py
        documents them, and `counts`: site -> class -> number of images, where real sites have told, else empty.

    Raises:
        RunFailed: something is missing.
    """
    server = run / "workspace" / SERVER
    rounds = read_rounds(run / "workspace")
    stopped_early = patience is not None and len(rounds) < num_rounds and _without_gain(rounds) >= patience
    if len(rounds) != num_rounds and not stopped_early:
        raise RunFailed(f"only {len(rounds)} of {num_rounds} rounds were finished")
    if not (server / REPORT).exists():
        raise RunFailed("no site evaluated the final model")
    evaluation = json.loads((server / REPORT).read_text(encoding="utf-8"))
    final, best = evaluation["final"], evaluation["best"]
    reports = dict(sorted(final["sites"].items(), key=_by_number))
    lost = sorted(set(sites) - set(reports))
    if lost and not tolerant:
        raise RunFailed(f"{', '.join(lost)} did not evaluate the final model")

    shutil.copy(server / FINAL, run)
    shutil.copy(server / (FINAL if best["round"] == final["round"] else BEST), run / BEST)
    if (receipt := server / "receipt.jsonl").exists():
        shutil.copy(receipt, run)
    # NVFlare counts from 0 and records what the sites got: the model before the round.
    curve = {
        record["round"]: {s["name"]: {m["name"]: m["value"] for m in s["metrics"]} for s in record["sites"]}
        for record in rounds
    }
    curve[final["round"]] = reports
    images = {site: report["val_images"] for site, report in reports.items()} | dict.fromkeys(lost, 0)
    counts = {
        site: {name.removeprefix("holds "): n for name, n in report.items() if name.startswith("holds ")}
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
        "timing": timing.totals(timing.phases(run / "workspace")),
        "counts": counts if any(counts.values()) else {},
    }


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
    return {
        "round": number,
        "accuracy": weighted_mean(accuracies, images),
        "sites": accuracies,
        "loss": weighted_mean(losses, images),
        "losses": losses,
    }


def _test(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The test of one model: `accuracy` and `loss` over all sites' test images, `sites`, and the `worst` of them."""
    tests = {
        site: {"accuracy": report.get("test_acc"), "loss": report.get("test_loss"), "images": report["test_images"]}
        for site, report in sorted(reports.items(), key=_by_number)
    }
    tested = {site: test for site, test in tests.items() if test["images"]}
    images = {site: test["images"] for site, test in tested.items()}
    return {
        "accuracy": weighted_mean({site: test["accuracy"] for site, test in tested.items()}, images),
        "loss": weighted_mean({site: test["loss"] for site, test in tested.items()}, images),
        "sites": tests,
        "worst": min(tested, key=lambda site: tested[site]["accuracy"], default=None),
    }


def _without_gain(rounds: list[dict[str, Any]]) -> int:
    """How many rounds there have been since the one with the best validation accuracy."""
    accuracies = [m["value"] for record in rounds for m in record["aggregated_metrics"] if m["name"] == "val_acc"]
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0


def _by_number(item: tuple[str, object]) -> tuple[int, str]:
    """site-2 before site-10."""
    digits = re.search(r"\d+$", item[0])
    return (int(digits[0]) if digits else 0, item[0])
