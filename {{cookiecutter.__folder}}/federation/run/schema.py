"""results.json: what is in it, and how the file of an older program is read.

| key | what |
|---|---|
| `version` | of this schema: 1. Files without it are of version 0 |
| `env` | `sim`, `poc` or `prod` |
| `dataset`, `algorithm`, `model_class` | what was trained on, how, and which class of model.py |
| `partition`, `alpha`, `shards_per_site`, `n_clients`, `num_rounds`, `image_size`, `batch_size`, `local_epochs`, \
`learning_rate`, `seed` | the flags of job.py |
| `max_batches` | training batches of an epoch in a check; null: all |
| `data_root` | where the images were on the machine that made the run; null: in the cache. Not shown in reports |
| `device` | `cpu`, or the GPU's name |
| `fedprox_mu`, `server_learning_rate`, `server_momentum`, `patience` | flags of job.py, where the algorithm has them |
| `tracking` | the experiment tracker |
| `total_rounds` | what a learning-rate schedule spans |
| `stages` | how the model was trained from the first run that `resumed` leads back to, up to this run: `rounds`, \
`local_epochs`, `batch_size`, `learning_rate` of each run |
| `threads` | of PyTorch, for each site; null: each site's own |
| `resumed` | the `run` that this one goes on from, and after which `round` of it; null: none |
| `stopped_early` | whether `patience` ended the run before `num_rounds` |
| `rounds` | the global model on the sites' validation images after `round` = 0, 1, 2, ... rounds: `accuracy` and \
`loss` (means over the sites, weighted by images), `sites` and `losses`: site -> its accuracy, its loss; `missing`: \
sites that these means do not cover |
| `test` | the final model on the test images: `accuracy`, `loss` of all sites; `sites`: site -> `accuracy`, `loss`, \
`images`; `worst`: the site of the lowest accuracy |
| `model` | the file of the final model |
| `best` | the model of the highest validation accuracy, the final one included: after which `round`, its file \
`model`, its `test` |
| `sha256` | of its tensors: `federation.run.outcome.fingerprint` |
| `lost` | sites that the job was sent to and that did not evaluate the final model |
| `rejected` | answers that the server left out: `round` (from 0; null: of an evaluation), `site`, `task`, `reason` |
| `images` | site -> its numbers of `train` and `val` images, as it announced them: its weights in the means |
| `timing` | site -> seconds of `start`, `computing`, `evaluating`, `waiting`; null where the logs do not say |
| `wall_s` | seconds from the command to the end |
| `versions` | of `python`, `nvflare`, `torch`, `lightning` |

A metric that the model does not log is null. Later versions may add keys.
"""

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.launch.options import OWN_FLAGS, STAGE

VERSION = 1
DOMINANT = 0.9  # share of all training images with which a site's say is no longer one among others
MAX_CAVEATS = 20  # about rejected answers
CONFIGURATION = (
    *("partition", "alpha", "shards_per_site", "n_clients", "num_rounds"),
    *("image_size", "batch_size", "local_epochs", "learning_rate", "seed"),
)


def compose(
    options: argparse.Namespace, brought: dict[str, Any], device: str, threads: int | None, wall_s: float
) -> dict[str, Any]:
    """What is written to results.json.

    Args:
        options: the command line's.
        brought: what federation.run.outcome.bring_home has gathered, without its `counts`.
        device: `cpu`, or the GPU's name.
        threads: of PyTorch, for each site; None: not known here.
        wall_s: seconds from the command to now.
    """
    n_rounds = brought["rounds"][-1]["round"] - options.first_round
    stage = {"rounds": n_rounds, **{name: getattr(options, name) for name in STAGE}}
    return {
        "version": VERSION,
        "dataset": options.dataset,
        "algorithm": options.algorithm,
        "model_class": options.model_class,
        **{name: getattr(options, name) for name in OWN_FLAGS if options.algorithm in OWN_FLAGS[name][1]},
        "resumed": {"run": options.resume, "round": options.first_round} if options.resume else None,
        "env": options.env,
        **{name: getattr(options, name) for name in CONFIGURATION},
        "total_rounds": options.total_rounds,
        "stages": [*options.stages, stage],
        "data_root": options.data_root,
        "tracking": options.tracking,
        "max_batches": options.max_batches,
        "device": device,
        "threads": threads,
        **brought,
        "wall_s": round(wall_s, 2),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what a result depends on beside this project."""
    found = {"python": platform.python_version()}
    for name in ("nvflare", "torch", "lightning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read(run: Path) -> dict[str, Any]:
    """Read a run's results.json, whichever version of the program wrote it. What an older one lacks is null or empty.

    Raises:
        UserError: it is not there, or broken, or newer than this program.
    """
    path = run / "results.json"
    result = read_json(path)
    written = result.get("version", 0)
    if written > VERSION:
        todo = "show it with the project that made it"
        raise UserError(f"{path} has version {written}, and this project reads up to {VERSION}: {todo}")
    for entry in result["rounds"]:
        entry.setdefault("loss", None)
        entry.setdefault("losses", dict.fromkeys(entry["sites"]))
        entry.setdefault("missing", [])
    unknown = (
        "model_class",
        "best",
        "resumed",
        "max_batches",
        "data_root",
        "sha256",
        "timing",
        "threads",
        "total_rounds",
    )
    missing = dict.fromkeys(unknown)
    usual = {"version": 0, "env": "sim", "lost": [], "tracking": "none", "stopped_early": False, "versions": {}}
    usual |= {"rejected": [], "images": {}, "stages": []}
    return {**usual, **missing, **result}


def caveats(result: dict[str, Any]) -> list[str]:
    """What a reader of a run's figures has to know about the sites that they do not cover: a line each."""
    found = []
    if result["lost"]:
        found.append(f"no final evaluation from {', '.join(result['lost'])}: the means do not cover them")
    for record in result["rejected"][:MAX_CAVEATS]:
        when = "an evaluation" if record["round"] is None else f"round {record['round'] + 1}"
        found.append(f"the server rejected the answer of {record['site']} in {when}: {record['reason']}")
    if len(result["rejected"]) > MAX_CAVEATS:
        found.append(f"and {len(result['rejected']) - MAX_CAVEATS} more rejected answers: results.json has all")
    for entry in result["rounds"]:
        if missing := [site for site in entry["missing"] if site not in result["lost"]]:
            found.append(f"the means {after_rounds(entry['round'])} do not cover {', '.join(missing)}")
    train = {site: own["train"] for site, own in result["images"].items()}
    for site, count in train.items():
        if len(train) > 2 and count > DOMINANT * sum(train.values()):
            found.append(f"{site} announced {count:,} of {sum(train.values()):,} training images: can that be?")
    return found


def after_rounds(number: int) -> str:
    """How tables name the global model after `number` rounds."""
    return f"after round {number}" if number else "untrained"


def read_json(path: Path) -> Any:
    """Read one of a run's files.

    Raises:
        UserError: it is not there, or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not there: finish a run with python job.py") from None
    except ValueError:
        raise UserError(f"{path} is broken: run python job.py again") from None
