"""job.py's command line: its flags, their defaults from settings.py, and what is refused before anything starts."""

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import settings

PROJECT = Path(__file__).resolve().parent.parent
DATASETS = ("cifar10", "fashion_mnist", "bloodmnist", "digits", "image_folder")
ENVIRONMENTS = ("sim", "poc", "prod")
PARTITIONS = ("iid", "dirichlet", "shards", "none")
MINIMUM = {"n_clients": 1, "num_rounds": 1, "local_epochs": 1, "batch_size": 1, "shards_per_site": 1, "image_size": 16}


class UsageError(Exception):
    """Something to put right before anything starts: one line for the user, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message}; python job.py --help lists the flags")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="job.py",
        description="Train one image classifier across sites that never share their images.",
        epilog="Defaults, in brackets, are in settings.py.",
    )
    add = parser.add_argument
    add("--n_clients", type=int, default=settings.N_CLIENTS, help="number of sites [%(default)s]")
    add("--num_rounds", type=int, default=settings.NUM_ROUNDS, help="rounds of training [%(default)s]")
    add("--local_epochs", type=int, default=settings.LOCAL_EPOCHS, help="a site's epochs in a round [%(default)s]")
    add("--batch_size", type=int, default=settings.BATCH_SIZE, help="images in a training step [%(default)s]")
    add("--learning_rate", type=float, default=settings.LEARNING_RATE, help="of the sites [%(default)s]")
    add("--dataset", choices=DATASETS, default=settings.DATASET, help="what to train on [%(default)s]")
    add(
        "--data_root",
        default=os.environ.get("FL_DATA_ROOT"),
        help="where the raw images or archives lie; {site} in it stands for a site's name [FL_DATA_ROOT, or the cache]",
    )
    add("--image_size", type=int, default=settings.IMAGE_SIZE, help="pixels, width and height [%(default)s]")
    add("--partition", choices=PARTITIONS, help=f"how to deal the images to the sites [{settings.PARTITION}]")
    add("--alpha", type=float, default=settings.ALPHA, help="of dirichlet: smaller is less alike [%(default)s]")
    add("--shards_per_site", type=int, default=settings.SHARDS_PER_SITE, help="of shards [%(default)s]")
    add("--seed", type=int, default=settings.SEED, help="of weights, partition and shuffling [%(default)s]")
    add("--gpu", action=argparse.BooleanOptionalAction, default=settings.USE_GPU, help="use NVIDIA GPUs, if any")
    add(
        "--env", choices=ENVIRONMENTS, default="sim", help="simulator, POC on this machine, or real sites [%(default)s]"
    )
    add("--startup_kit", metavar="DIR", help="prod: the submitter's start-up kit")
    add("--username", help="prod: who submits [the kit's own]")
    add("--sites", help="prod: names of the sites, with commas between [those in deploy/project.yml]")
    add("--classes", metavar="FILE", help="prod: names of the classes, one a line [those of a public data set]")
    add("--wait", type=float, default=60.0, help="prod: seconds to wait for server and sites [%(default)s]")
    add("--export", metavar="DIR", help="prod: write the job to DIR, for someone else to submit, and stop")
    add("--name", help="the run's folder is runs/NAME [date and time]")
    add("--verbose", action="store_true", help="show NVFlare's own log")
    add("--prepare_only", action="store_true", help="get the data ready and stop")
    add("--check", action="store_true", help="see in one short round whether all works here")
    parser.set_defaults(max_batches=None)  # all; --check trains on a few
    return parser.parse_args(arguments)


def validate(options: argparse.Namespace) -> None:
    """Refuse what cannot work, and resolve what depends on something else.

    Raises:
        UsageError: the first fault found.
    """
    for name, minimum in MINIMUM.items():
        if getattr(options, name) < minimum:
            raise UsageError(f"--{name} is {getattr(options, name)}: it must be {minimum} or more")
    for name in ("alpha", "learning_rate"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} is {getattr(options, name)}: it must be a number above 0")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed is {options.seed}: it must be from 0 to {2**32 - 1}")
    if options.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise UsageError(f"--name is {options.name!r}: letters, digits, '.', '_' and '-' only")
    if options.name == "latest" or (options.name and (PROJECT / "runs" / options.name).exists()):
        raise UsageError(f"runs/{options.name} exists: choose another --name, or none")
    if re.search(r"\s", str(PROJECT)):
        raise UsageError(f"NVFlare cannot run in a folder whose path has spaces: move the project out of '{PROJECT}'")
    own_roots = "{site}" in (options.data_root or "")
    if own_roots and options.partition not in (None, "none"):
        raise UsageError(f"--partition {options.partition} deals images out, but with {{site}} each site has its own")
    _validate_environment(options)
    options.partition = options.partition or ("none" if own_roots else settings.PARTITION)
    if options.data_root:
        options.data_root = os.environ["FL_DATA_ROOT"] = os.path.abspath(os.path.expanduser(options.data_root))
    missing = [name for name in ("nvflare", "pytorch_lightning", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        own = PROJECT / ".venv" / "bin" / "python"
        todo = ".venv/bin/python job.py" if own.exists() else "pip install -r requirements.txt"
        raise UsageError(f"{sys.executable} has no {missing[0]}: use {todo}")


def _validate_environment(options: argparse.Namespace) -> None:
    """Refuse what cannot work with real sites, and resolve who they are and who submits."""
    if options.env != "prod":
        for name in ("startup_kit", "username", "sites", "classes", "export"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} is for real sites: add --env prod")
        return
    if options.check or options.prepare_only:
        raise UsageError("--check and --prepare_only work on this machine: leave --env prod out")
    if options.partition not in (None, "none"):
        raise UsageError(f"--partition {options.partition} deals images out, but real sites have their own: use none")
    options.partition = "none"
    if options.data_root:
        raise UsageError("each site sets its own FL_DATA_ROOT: leave --data_root out, and unset FL_DATA_ROOT here")
    names = options.sites.split(",") if options.sites else _sites_of_project()
    if unfit := [name for name in names if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)]:
        raise UsageError(f"--sites has a name {unfit[0]!r}: names with commas between, and no spaces")
    if len(set(names)) < len(names):
        raise UsageError(f"--sites names {max(names, key=names.count)} twice")
    options.sites, options.n_clients = names, len(names)
    if options.dataset == "image_folder" and not options.classes:
        raise UsageError("--classes FILE is missing: the names of the classes, one a line, as the sites' folders")
    if options.classes and not Path(options.classes).is_file():
        raise UsageError(f"--classes: there is no file {options.classes}")
    for name in ("classes", "export", "startup_kit"):  # relative to where the user is, not to the project
        if getattr(options, name):
            setattr(options, name, os.path.abspath(os.path.expanduser(getattr(options, name))))
    if options.export:
        if os.path.exists(options.export):
            raise UsageError(f"--export: {options.export} exists: choose another folder")
        return
    if not options.startup_kit:
        raise UsageError("--startup_kit DIR is missing: the folder that you were given, with startup/ in it")
    kit = Path(options.startup_kit, "startup", "fed_admin.json")
    if not kit.is_file():
        raise UsageError(f"--startup_kit: {kit} is not there: name the folder that holds startup/, a submitter's kit")
    options.username = options.username or json.loads(kit.read_text(encoding="utf-8"))["admin"]["username"]


def _sites_of_project() -> list[str]:
    import yaml

    try:
        project = yaml.safe_load((PROJECT / "deploy" / "project.yml").read_text(encoding="utf-8"))
        return [member["name"] for member in project["participants"] if member["type"] == "client"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(f"deploy/project.yml does not tell the sites ({error}): name them with --sites") from None
