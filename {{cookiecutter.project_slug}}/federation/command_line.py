"""job.py's command line: its flags, their defaults from settings.py, and what is refused before anything starts."""

import argparse
import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import settings

PROJECT = Path(__file__).resolve().parent.parent
DATASETS = ("cifar10", "fashion_mnist", "bloodmnist", "digits", "image_folder")
PARTITIONS = ("iid", "dirichlet", "shards", "none")
MINIMUM = {
    **dict.fromkeys(("n_clients", "n_threads", "num_rounds", "local_epochs", "batch_size", "shards_per_site"), 1),
    "image_size": 16,
}
TRACKERS = ("none", "tensorboard", "mlflow", "wandb")


class UsageError(Exception):
    """Something to put right before anything starts: one line for the user, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message}; python {self.prog} --help lists the flags")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="job.py",
        description="Train one image classifier across sites that never share their images.",
        epilog="Defaults, in brackets, are in settings.py.",
    )
    add = parser.add_argument
    add("--model", default=settings.MODEL, help="a LightningModule of model.py [%(default)s]")
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
    add("--n_threads", type=int, help="sites that run at the same time [as many as the free memory allows]")
    add("--tracking", choices=TRACKERS, default=settings.TRACKING, help="experiment tracker [%(default)s]")
    add("--name", help="the run's folder is runs/NAME [date and time]")
    add("--verbose", action="store_true", help="show NVFlare's own log")
    add("--prepare_only", action="store_true", help="get the data ready and stop")
    add("--check", action="store_true", help="see in one short round whether all works here")
    parser.set_defaults(max_batches=None)  # all; --check trains on a few
    return parser.parse_args(arguments)


def model_names() -> list[str]:
    """The classes of model.py that derive from LightningModule. They are read, not imported, which takes seconds.

    Raises:
        UsageError: model.py is not Python.
    """
    try:
        code = ast.parse((PROJECT / "model.py").read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UsageError(f"model.py, line {error.lineno}: {error.msg}") from None
    found = ["LightningModule"]
    for node in code.body:
        if isinstance(node, ast.ClassDef) and {ast.unparse(base).split(".")[-1] for base in node.bases} & set(found):
            found.append(node.name)
    return found[1:]


def validate(options: argparse.Namespace) -> None:
    """Refuse what cannot work, and resolve what depends on something else.

    Raises:
        UsageError: the first fault found.
    """
    for name, minimum in MINIMUM.items():
        if getattr(options, name) is not None and getattr(options, name) < minimum:
            raise UsageError(f"--{name} is {getattr(options, name)}: it must be {minimum} or more")
    for name in ("alpha", "learning_rate"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} is {getattr(options, name)}: it must be a number above 0")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed is {options.seed}: it must be from 0 to {2**32 - 1}")
    if options.model not in (known := model_names()):
        raise UsageError(f"--model is {options.model!r}: model.py has {', '.join(known) or 'no LightningModule'}")
    if options.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise UsageError(f"--name is {options.name!r}: letters, digits, '.', '_' and '-' only")
    if options.name == "latest" or (options.name and (PROJECT / "runs" / options.name).exists()):
        raise UsageError(f"runs/{options.name} exists: choose another --name, or none")
    if re.search(r"\s", str(PROJECT)):
        raise UsageError(f"NVFlare cannot run in a folder whose path has spaces: move the project out of '{PROJECT}'")
    own_roots = "{site}" in (options.data_root or "")
    if own_roots and options.partition not in (None, "none"):
        raise UsageError(f"--partition {options.partition} deals images out, but with {{site}} each site has its own")
    options.partition = options.partition or ("none" if own_roots else settings.PARTITION)
    if options.data_root:
        options.data_root = os.environ["FL_DATA_ROOT"] = os.path.abspath(os.path.expanduser(options.data_root))
    missing = [name for name in ("nvflare", "pytorch_lightning", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        own = PROJECT / ".venv"
        usable = (own / "bin" / "python").exists() and Path(sys.prefix) != own
        todo = ".venv/bin/python job.py" if usable else "python3 install.py"
        raise UsageError(f"{sys.executable} has no {missing[0]}: use {todo}")
    if options.tracking != "none" and importlib.util.find_spec(options.tracking) is None:
        raise UsageError(
            f"--tracking {options.tracking} needs a package: {sys.executable} -m pip install {options.tracking}"
        )
