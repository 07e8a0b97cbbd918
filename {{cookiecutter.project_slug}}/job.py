"""Run a federation: `python job.py`. All flags: `python job.py --help`.

Command line -> data -> recipe -> simulator -> `runs/<name>/` with the final model and `results.json`.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import settings

PROJECT = Path(__file__).resolve().parent
RUNS = Path("runs")
DATASETS = ("cifar10", "fashion_mnist", "bloodmnist", "digits", "image_folder")
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
    add("--name", help="the run's folder is runs/NAME [date and time]")
    add("--verbose", action="store_true", help="show NVFlare's own log")
    add("--prepare_only", action="store_true", help="get the data ready and stop")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
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
    if options.name == "latest" or (options.name and (PROJECT / RUNS / options.name).exists()):
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
        own = PROJECT / ".venv" / "bin" / "python"
        todo = ".venv/bin/python job.py" if own.exists() else "pip install -r requirements.txt"
        raise UsageError(f"{sys.executable} has no {missing[0]}: use {todo}")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `kill` cleans up as Ctrl-C does
    try:
        options = parse()
        check(options)
        os.chdir(PROJECT)
        return run(options)
    except UsageError as error:
        print(f"job.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njob.py: stopped; no process is left", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    import torch

    import data
    import results
    from federation import environments, recipes

    torch.set_num_threads(1)  # this process and the server do little; the cores are the clients'
    try:
        data.prepare(options)
        if options.prepare_only:
            print(f"{options.dataset} is ready")
            return 0
        holdings = data.describe(options)
    except data.DataError as error:
        raise UsageError(str(error)) from None

    has_gpu = torch.cuda.is_available()
    if has_gpu and not options.gpu:
        print("A GPU is present but not used: --gpu switches it on")
    if options.gpu and not has_gpu:
        print("WARNING: --gpu was asked for, but there is no CUDA GPU here: training on the CPU")

    folder = new_run(options.name)
    (folder / "partition.json").write_text(json.dumps(dataclasses.asdict(holdings)), encoding="utf-8")
    results.show_holdings(holdings.counts)
    print(f"\nrun {folder}: FedAvg, {options.n_clients} sites, {options.num_rounds} rounds, log in {folder}/log.txt")

    recipe = recipes.fedavg(options, holdings.classes, folder)
    recipe.export(str(folder))
    progress = results.Progress(options.num_rounds, options.verbose)
    try:
        environments.simulate(folder / recipe.name, folder, options, progress)
        outcome = environments.bring_home(folder, options.num_rounds)
    except environments.RunFailed as error:
        print(f"\njob.py: {error}\n\nThe whole log: {folder}/log.txt", file=sys.stderr)
        return 1
    configuration = {
        "dataset": options.dataset,
        "algorithm": "fedavg",
        **{name: getattr(options, name) for name in results.CONFIGURATION},
        "device": torch.cuda.get_device_name() if options.gpu and has_gpu else "cpu",
    }
    result = {**configuration, **outcome, "wall_s": round(time.monotonic() - start, 2)}
    (folder / "results.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    results.show(result)
    print(f"\n{folder}/results.json has all figures, {folder}/{result['model']} the model")
    return 0


def new_run(name: str | None) -> Path:
    """Make a folder under runs/ that was not there before, and point runs/latest to it."""
    RUNS.mkdir(exist_ok=True)
    while True:
        folder = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if name:
                raise UsageError(f"{folder} exists: choose another --name, or none") from None
            time.sleep(0.1)  # another run started within this second
    latest = RUNS / f".latest-{os.getpid()}"
    latest.symlink_to(folder.name)
    latest.replace(RUNS / "latest")
    return folder


if __name__ == "__main__":
    sys.exit(main())
