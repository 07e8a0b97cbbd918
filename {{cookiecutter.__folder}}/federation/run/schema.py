"""Write results.json, and read it, also from older versions of the project. REFERENCE.md documents its keys."""

import json
import platform
import subprocess
import sys
from dataclasses import fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.protocol import LEAK_IMAGES
from federation.run.folder import PROJECT, RunFolder
from federation.run.metrics import as_text, by_number, quantiles, some, validation
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
COMPARED = {  # key in compare.json -> title
    "centralized": "centralized",
    "federated": "federated",
    "alone": "alone, own test images",
    "alone_on_all": "alone, all test images",
}
ADDED_KEYS = (  # missing from older files
    *("model_class", "best", "resumed", "max_batches", "data_root", "sha256", "timing", "threads", "total_rounds"),
    *("stages", "command", "started", "commit", "clean"),
)


def compose(
    options: Options,
    collected: dict[str, Any],
    device: str,
    wall_s: float,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        options: of the run.
        collected: what outcome.collect returned, without `counts`.
        device: `cpu`, or the GPU's name.
        wall_s: seconds since the program started.
        record: the content of start.json: what `origin` returned; which `run` is resumed, and after which `round`; the
            `stages` of that run.
    """
    made_with = options.of_run()
    del made_with["classes"]  # partition.json has them
    rounds = collected["rounds"][-1]["round"] - (record["resumed"]["round"] if record["resumed"] else 0)
    return {
        "version": VERSION,
        **record,
        **made_with,
        "stages": [*record["stages"], stage(made_with, rounds)],
        "device": device,
        **collected,
        "wall_s": round(wall_s, 2),
        "versions": versions(),
    }


def origin() -> dict[str, Any]:
    """Where a result comes from.

    Returns:
        `command`: the words of this process's command; `started`: the local time; `commit` of the project's git
        repository, and whether its files are `clean`, as they are in that commit: null if there is none.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "clean": git("status", "--porcelain", "--", ".") == "" if commit else None,
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

    For an unfinished run, the same keys as far as they are known: there is no test. The key `state`, which is not in
    the file, is that of `RunFolder`.

    Raises:
        UserError: the file is missing, broken, or newer than this project.
    """
    state = run.state
    result = read_json(run.results) if state in ("finished", None) else _so_far(run)
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
    usual |= {"rejected": [], "images": {}, "leak": {}, "privacy": {}, "skipped": {}}
    return {**usual, **dict.fromkeys(ADDED_KEYS), **result, "state": state}


def _so_far(run: RunFolder) -> dict[str, Any]:
    """What there would be in results.json if an unfinished run had been meant to end here."""
    records = run.rounds()
    rounds = []
    for record in records:
        sites = {name: record["sites"][name] for name in sorted(record["sites"], key=by_number)}
        reports = {name: (own["metrics"], own["val"]) for name, own in sites.items()}
        rounds.append(validation(record["round"], reports, [*sites], []) | {"participants": None})
    return {
        "version": VERSION,
        **(read_json(run.start) if run.start.exists() else {}),
        **read_json(run.options),
        "rounds": rounds,
        "test": {"accuracy": None, "loss": None, "sites": {}, "worst": None},
        "rejected": [answer for record in records for answer in record["rejected"]],
        "wall_s": None,
    }


def stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The `stages` of a results.json; a file without them counts as one stage."""
    return result["stages"] or [stage(result, result["rounds"][-1]["round"])]


def stage(made_with: dict[str, Any], rounds: int) -> dict[str, Any]:
    """An entry of `stages`: a number of rounds, and the training options among those of a run."""
    return {"rounds": rounds, **{name: made_with[name] for name in STAGE_OPTIONS if name in made_with}}


def validated(entry: dict[str, Any]) -> float:
    """The validation accuracy of an entry of `rounds`, if it is of a trained model; else 0."""
    return entry["accuracy"] or 0.0 if entry["round"] else 0.0


def n_finished(result: dict[str, Any]) -> int:
    """The number of the last round that has finished, in this run or in one that it resumes; 0: none.

    The model after the last round of an unfinished run has not been validated yet.
    """
    last = result["rounds"][-1]["round"] if result["rounds"] else -1
    return int(last + (result["state"] != "finished"))


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


def leak(result: dict[str, Any]) -> dict[str, list[Any]]:
    """Membership inference: site -> images of each kind, AUC, its standard error without any leak, TPR at 1 % FPR."""
    rows = {}
    for site, own in result["leak"].items():
        train = result["images"].get(site, {}).get("train", LEAK_IMAGES)  # unknown if it never trained
        n = min(LEAK_IMAGES, train, result["test"]["sites"][site]["images"])
        rows[site] = [n, own["auc"], ((2 * n + 1) / 12) ** 0.5 / n, own["tpr"]]
    return rows


def privacy(result: dict[str, Any]) -> list[str]:
    """Sentences on differential privacy and the leak test. Empty if there was neither."""
    found = []
    if spent := result["privacy"]:
        least, *_, most = quantiles(own["epsilon"] for own in spent.values())
        deltas = quantiles(own["delta"] for own in spent.values())
        if any(own["epsilon"] is None for own in spent.values()):
            found.append("Differential privacy: none, because answers without it have left some of the sites.")
        else:
            values = f"ε {least:.2f} to {most:.2f} at δ {deltas[0]:.1e} to {deltas[-1]:.1e}"
            found.append(f"Differential privacy of single images in what each site has sent so far: {values}.")
        found.append("Not covered: validation and test metrics, the leak test, and numbers of images, which are exact.")
        if any(own["seeded"] for own in spent.values()):
            found.append("Simulated: no guarantee, because the noise follows from the seed.")
    if rows := leak(result):
        site, (_, auc, error, tpr) = max(rows.items(), key=lambda row: row[1][1])
        median = as_text(quantiles(row[1] for row in rows.values())[2])
        found.append(
            f"Leak test: median AUC {median}, highest {as_text(auc)} at {site}, where guessing gives 0.500 ± "
            f"{as_text(error)}; {as_text(tpr)} of its training images found at 1 % false positives."
        )
    return found


def caveats(result: dict[str, Any]) -> list[str]:
    """Warnings about a run's metrics, one line each: missing sites, rejected answers, a dominant site."""
    found, rejected, excluded = [], [], []
    if unused := result["test"].get("never_predicted"):
        found.append(f"never predicted on test images that have it: class {some(unused)}")
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
