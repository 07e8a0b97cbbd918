"""Write results.json, and read it, also from older versions of the project. README.md documents its keys."""

import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.run.folder import RunFolder
from federation.run.metrics import some
from settings import INHERITED, Options

VERSION = 2
DOMINANT_SHARE = 0.9  # share of all training images above which one site decides the mean
MAX_CAVEATS = 20  # of a kind
CONFIGURATION = [each.name for each in fields(Options) if "resume" in each.metadata]  # what defines a run's training
STAGE_OPTIONS = [  # may differ between a run and the one that it resumes
    each.name
    for each in fields(Options)
    if each.metadata.get("resume") == INHERITED and each.metadata["group"] == "training" and each.name != "num_rounds"
]
ADDED_KEYS = (  # missing from older files
    *("model_class", "best", "resumed", "max_batches", "data_root", "sha256", "timing", "threads", "total_rounds"),
    "stages",
)


def compose(
    options: Options,
    collected: dict[str, Any],
    device: str,
    wall_s: float,
    resumed: dict[str, Any] | None = None,
    stages: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        options: of the run.
        collected: what outcome.collect returned, without `counts`.
        device: `cpu`, or the GPU's name.
        wall_s: seconds since the program started.
        resumed: the `run` that this one resumes, and after which `round`.
        stages: of that run.
    """
    made_with = options.of_run()
    del made_with["classes"]  # partition.json has them
    rounds = collected["rounds"][-1]["round"] - (resumed["round"] if resumed else 0)
    return {
        "version": VERSION,
        **made_with,
        "resumed": resumed,
        "stages": [*stages, {"rounds": rounds, **{name: made_with[name] for name in STAGE_OPTIONS}}],
        "device": device,
        **collected,
        "wall_s": round(wall_s, 2),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("nvflare", "torch", "pytorch-lightning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read(run: RunFolder) -> dict[str, Any]:
    """Read a run's results.json, of this or an older version. Keys that an older one lacks are null or empty.

    Raises:
        UserError: the file is missing, broken, or newer than this project.
    """
    result = read_json(run.results)
    written = result.get("version", 0)
    if written > VERSION:
        todo = "use the project that wrote it"
        raise UserError(f"{run.results} has version {written}, but this project reads up to {VERSION}: {todo}")
    for entry in result["rounds"]:
        entry.setdefault("loss", None)
        entry.setdefault("losses", dict.fromkeys(entry["sites"]))
        entry.setdefault("missing", [])
        entry.setdefault("participants", None)
    usual = {"version": 0, "env": "sim", "lost": [], "tracking": "none", "stopped_early": False, "versions": {}}
    usual |= {"rejected": [], "images": {}, "skipped": {}}
    return {**usual, **dict.fromkeys(ADDED_KEYS), **result}


def stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The `stages` of a results.json; a file without them counts as one stage."""
    known = {name: result[name] for name in STAGE_OPTIONS if name in result}
    return result["stages"] or [{"rounds": result["rounds"][-1]["round"], **known}]


def coverage(result: dict[str, Any]) -> list[str]:
    """Sentences on random choices of sites: who trained in a round, who was tested. Empty if all were."""
    found, n_sites = [], f"random sites of {result['n_clients']:,}"
    if cohorts := [entry["participants"] for entry in result["rounds"] if entry["participants"]]:
        least, most = (f"{bound(map(len, cohorts)):,}" for bound in (min, max))
        size = least if least == most else f"{least} to {most}"
        found.append(f"In each round, {size} {n_sites} trained ({len(set().union(*cohorts)):,} in at least one).")
    if result.get("evaluate_sites"):
        found.append(f"The final test covers {len(result['test']['sites']):,} {n_sites}.")
    return found


def caveats(result: dict[str, Any]) -> list[str]:
    """Warnings about a run's metrics, one line each: missing sites, rejected answers, a dominant site."""
    found, rejected, excluded = [], [], []
    if result["lost"]:
        found.append(f"no final evaluation from {some(result['lost'])}: the means exclude them")
    for record in result["rejected"]:
        when = "an evaluation" if record["round"] is None else f"round {record['round'] + 1}"
        rejected.append(f"the server rejected the answer of {record['site']} in {when}: {record['reason']}")
    lost = set(result["lost"])
    for entry in result["rounds"]:
        if missing := [site for site in entry["missing"] if site not in lost]:
            excluded.append(f"the means {after_rounds(entry['round'])} exclude {some(missing)}")
    for kind, lines in {"rejected answers": rejected, "rounds with missing sites": excluded}.items():
        found += lines[:MAX_CAVEATS]
        if len(lines) > MAX_CAVEATS:
            found.append(f"{len(lines) - MAX_CAVEATS} more {kind}: see results.json")
    for count in sorted(set(result["skipped"].values())):
        sites = [site for site, own in result["skipped"].items() if own == count]
        found.append(f"{count:,} unreadable files were skipped under the data root of {some(sites)}")
    train = {site: own["train"] for site, own in result["images"].items()}
    total = sum(train.values())
    for site, count in train.items():
        if len(train) > 2 and count > DOMINANT_SHARE * total:
            found.append(f"{site} reported {count:,} of all {total:,} training images: is that right?")
    return found


def after_rounds(number: int) -> str:
    """How tables and messages name the global model after `number` rounds."""
    return f"after round {number}" if number else "untrained"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: finish a run with python job.py") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is broken: run python job.py again")
    return value
