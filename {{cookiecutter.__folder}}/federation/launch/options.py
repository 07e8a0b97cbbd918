"""job.py's command line: its flags, their defaults from settings.py, and what is refused before anything starts."""

import argparse
import ast
import builtins
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import settings
from federation.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
NO_MODELS = {*sys.stdlib_module_names, "torch", "torchmetrics", "torchvision", "pytorch_lightning", "lightning"}
UNFIT = r"[\s'\"\\#]"  # in a project's path: NVFlare's simulator or POC fails, long after its start
MAX_NAME = 100  # letters of a run's name: files that are named after it have more of them
DATASETS = ("cifar10", "fashion_mnist", "bloodmnist", "digits", "image_folder")
ALGORITHMS = {"fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "fedopt": "FedOpt"}
OWN_FLAGS = {  # flag -> its default, and the algorithms that use it
    "fedprox_mu": (settings.FEDPROX_MU, ("fedprox",)),
    "server_learning_rate": (settings.SERVER_LEARNING_RATE, ("fedopt",)),
    "server_momentum": (settings.SERVER_MOMENTUM, ("fedopt",)),
    "patience": (None, ("fedavg", "fedprox")),
}
ENVIRONMENTS = ("sim", "poc", "prod")
PARTITIONS = ("iid", "dirichlet", "shards", "none")
MINIMUM = {
    **dict.fromkeys(("n_clients", "n_threads", "num_rounds", "local_epochs", "batch_size", "shards_per_site"), 1),
    "image_size": 16,
}
TRACKERS = ("none", "tensorboard", "mlflow", "wandb")
KEPT = (  # by a run that goes on
    *("dataset", "image_size", "partition", "alpha", "shards_per_site", "n_clients", "seed"),
    *("algorithm", "model_class"),
)
TAKEN = (  # of a run that goes on, unless said otherwise
    *("num_rounds", "local_epochs", "batch_size", "learning_rate", "data_root"),
    *("fedprox_mu", "server_learning_rate", "server_momentum"),
)


STAGE = ("local_epochs", "batch_size", "learning_rate")  # what a resumed run may do otherwise


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python {self.prog} --help lists the flags")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="job.py",
        description="Train one image classifier across sites that never share their images.",
        epilog="Defaults, in brackets, are in settings.py.",
    )
    add = parser.add_argument
    add("--model", dest="model_class", default=settings.MODEL, help="a LightningModule of model.py [%(default)s]")
    add("--n_clients", type=int, default=settings.N_CLIENTS, help="number of sites [%(default)s]")
    add("--num_rounds", type=int, default=settings.NUM_ROUNDS, help="rounds of training [%(default)s]")
    add("--local_epochs", type=int, default=settings.LOCAL_EPOCHS, help="a site's epochs in a round [%(default)s]")
    add("--batch_size", type=int, default=settings.BATCH_SIZE, help="images in a training step [%(default)s]")
    add("--learning_rate", type=float, default=settings.LEARNING_RATE, help="of the sites [%(default)s]")
    add(
        "--algorithm", choices=ALGORITHMS, default=settings.ALGORITHM, help="how the sites learn together [%(default)s]"
    )
    mu, server = settings.FEDPROX_MU, (settings.SERVER_LEARNING_RATE, settings.SERVER_MOMENTUM)
    add("--fedprox_mu", type=float, help=f"fedprox: pull to the global model, mu of Li et al. 2020 [{mu}]")
    add("--server_learning_rate", type=float, help=f"fedopt: eta of Reddi et al. 2021 [{server[0]}]")
    add("--server_momentum", type=float, help=f"fedopt: the server's momentum, beta 1 [{server[1]}]")
    add("--patience", type=int, help="fedavg, fedprox: stop after so many rounds without a better validation accuracy")
    add(
        "--total_rounds",
        type=int,
        help="rounds that a learning-rate schedule spans, those of a later --resume included [the rounds of this run]",
    )
    add("--resume", metavar="RUN", help="go on from the last global model of runs/RUN, with its settings")
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
    add(
        "--env", choices=ENVIRONMENTS, default="sim", help="simulator, POC on this machine, or real sites [%(default)s]"
    )
    add("--startup_kit", metavar="DIR", help="prod: the submitter's start-up kit")
    add("--username", help="prod: who submits [the kit's own]")
    add("--sites", help="prod: names of the sites, with commas between [those in deploy/project.yml]")
    add("--classes", metavar="FILE", help="prod: names of the classes, one a line [those of a public data set]")
    add("--wait", type=float, default=60.0, help="prod: seconds to wait for server and sites [%(default)s]")
    add(
        "--site_timeout",
        type=float,
        help=f"poc, prod: seconds a site may take for a round before it is given up [{settings.SITE_TIMEOUT:.0f}]",
    )
    add("--export", metavar="DIR", help="prod: write the job to DIR, for someone else to submit, and stop")
    add("--name", help="the run's folder is runs/NAME [date and time]")
    add("--overwrite", action="store_true", help="replace runs/NAME, if there is one")
    add("--verbose", action="store_true", help="show NVFlare's own log")
    add("--prepare_only", action="store_true", help="get the data ready and stop")
    add("--check", action="store_true", help="see in one short round whether all works here")
    parser.set_defaults(max_batches=None)  # all; --check trains on a few
    parser.set_defaults(first_round=0, resume_from=None, stages=[])
    options = parser.parse_args(arguments)
    if options.resume is not None:
        made = read_run(options.resume)
        parser.set_defaults(**{name: made[name] for name in (*KEPT, *TAKEN) if name in made})
        parser.set_defaults(first_round=made["rounds"][-1]["round"], resume_from=made["folder"] / made["model"])
        options = parser.parse_args(arguments)
        options.resume = made["folder"].name
        options.stages = made.get("stages") or [stage_of(made)]
        options.planned_rounds = made.get("total_rounds", options.first_round)
        if options.total_rounds is None:  # a longer training than planned stretches the schedule
            options.total_rounds = max(options.planned_rounds, options.first_round + options.num_rounds)
        for name in KEPT:
            if getattr(options, name) != made[name]:
                wanted = f"--{name} is {getattr(options, name)}, but {made[name]} in runs/{options.resume}"
                raise UserError(f"{wanted}: a run goes on with the data, sites, seed and algorithm that it began with")
    return options


def run_folder(name: str, runs: Path) -> Path:
    """A run's folder, by its name or by its path, as a shell completes it: `first`, `runs/first/`."""
    path = Path(name)
    return (runs / path if len(path.parts) == 1 else path).resolve()


def read_run(name: str) -> dict[str, Any]:
    """The results.json of a run to go on from, and its `folder`.

    Raises:
        UserError: there is none.
    """
    folder = run_folder(name, PROJECT / "runs")
    try:
        made = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        missing = [key for key in ("rounds", "model", *KEPT) if key not in made]
    except (OSError, TypeError, ValueError):
        raise UserError(f"--resume {name}: {folder} has no results.json: only a finished run can go on") from None
    if missing:
        raise UserError(f"--resume {name}: its results.json has no {missing[0]!r}: another version made it")
    return {**made, "folder": folder}


def stage_of(made: dict[str, Any]) -> dict[str, Any]:
    """How a run was trained, for its `stages`: its rounds, and what each of them was."""
    rounds = made["rounds"][-1]["round"] - made["rounds"][0]["round"]
    return {"rounds": rounds, **{name: made[name] for name in STAGE}}


def model_names() -> list[str]:
    """The classes of model.py that may derive from LightningModule. They are read, not imported, which takes seconds.

    A base class that comes from elsewhere can be anything: `check_model` decides once model.py is imported.

    Raises:
        UserError: model.py is not Python.
    """
    try:
        code = ast.parse((PROJECT / "model.py").read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"model.py, line {error.lineno}: {error.msg}") from None
    found = []
    others = set(dir(builtins))  # names that do not lead to a LightningModule
    for node in code.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = getattr(node, "module", None) or alias.name
                if module.split(".")[0] in NO_MODELS and alias.name != "LightningModule":
                    others.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ClassDef):
            bases = [re.split(r"[^\w.]", ast.unparse(base))[0] for base in node.bases]
            if all(base.split(".")[0] in others and not base.endswith(".LightningModule") for base in bases):
                others.add(node.name)
            else:
                found.append(node.name)
    return found


def check_model(name: str) -> None:
    """Import model.py, which takes seconds, and see that it has this LightningModule.

    Raises:
        UserError: it cannot be imported, or the class derives from something else.
    """
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    from pytorch_lightning import LightningModule

    try:
        import model
    except Exception as error:  # whatever a user's file raises
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"model.py cannot be imported ({fault}): see where with  python -c 'import model'") from None
    if not issubclass(getattr(model, name), LightningModule):
        raise UserError(f"--model is {name!r}: that class of model.py does not derive from LightningModule")


def validate(options: argparse.Namespace) -> None:
    """Refuse what cannot work, and resolve what depends on something else.

    Raises:
        UserError: the first fault found.
    """
    for name, minimum in MINIMUM.items():
        if getattr(options, name) is not None and getattr(options, name) < minimum:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be {minimum} or more")
    for name, (default, users) in OWN_FLAGS.items():
        if options.algorithm in users:
            if getattr(options, name) is None:
                setattr(options, name, default)
        elif getattr(options, name) is not None:
            raise UserError(
                f"--{name} is a flag of {' and '.join(users)}: --algorithm {options.algorithm} has no use for it"
            )
    n_rounds = options.first_round + options.num_rounds
    options.total_rounds = n_rounds if options.total_rounds is None else options.total_rounds
    if options.total_rounds < n_rounds:
        raise UserError(
            f"--total_rounds is {options.total_rounds}: it must be {n_rounds} or more, as this run ends there"
        )
    if options.env == "sim" and options.site_timeout is not None:
        raise UserError("--site_timeout is for sites that are processes of their own: add --env poc or --env prod")
    if options.site_timeout is None:
        options.site_timeout = settings.SITE_TIMEOUT
    if options.patience is not None and options.patience < 1:
        raise UserError(f"--patience is {options.patience}: it must be 1 or more")
    if options.server_momentum is not None and not 0 <= options.server_momentum < 1:
        raise UserError(f"--server_momentum is {options.server_momentum}: it must be from 0 to below 1")
    if options.resume is not None and options.check:
        raise UserError("--check is a run of its own: leave out --resume")
    for name in ("alpha", "learning_rate", "fedprox_mu", "server_learning_rate", "site_timeout"):
        if getattr(options, name) is None:
            continue
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name} is {getattr(options, name)}: it must be a number above 0")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}: it must be from 0 to {2**32 - 1}")
    if options.model_class not in (known := model_names()):
        raise UserError(f"--model is {options.model_class!r}: model.py has {', '.join(known) or 'no LightningModule'}")
    if options.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise UserError(f"--name is {options.name!r}: letters, digits, '.', '_' and '-' only")
    if options.name is not None and len(options.name) > MAX_NAME:
        raise UserError(f"--name has {len(options.name)} letters: it must have {MAX_NAME} or fewer")
    _validate_name(options)
    if re.search(UNFIT, str(PROJECT)):
        what = f"a folder whose path has spaces, quotes, \\ or #: move the project out of {str(PROJECT)!r}"
        raise UserError(f"NVFlare cannot run in {what}")
    own_roots = "{site}" in (options.data_root or "")
    if own_roots and options.partition not in (None, "none"):
        raise UserError(f"--partition {options.partition} deals images out, but with {{site}} each site has its own")
    _validate_environment(options)
    options.partition = options.partition or ("none" if own_roots else settings.PARTITION)
    if options.data_root:
        options.data_root = os.environ["FL_DATA_ROOT"] = os.path.abspath(os.path.expanduser(options.data_root))
    missing = [name for name in ("nvflare", "pytorch_lightning", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        own = PROJECT / ".venv"
        usable = (own / "bin" / "python").exists() and Path(sys.prefix) != own
        todo = ".venv/bin/python job.py" if usable else "python3 install.py"
        raise UserError(f"{sys.executable} has no {missing[0]}: use {todo}")
    if options.tracking != "none" and importlib.util.find_spec(options.tracking) is None:
        raise UserError(
            f"--tracking {options.tracking} needs a package: {sys.executable} -m pip install {options.tracking}"
        )


def _validate_name(options: argparse.Namespace) -> None:
    if options.overwrite and not options.name:
        raise UserError("--overwrite replaces a run: say which with --name")
    if options.name == "latest":
        raise UserError("--name latest is the link to the newest run: choose another")
    if options.name and (PROJECT / "runs" / options.name).exists():
        if not options.overwrite:
            raise UserError(f"runs/{options.name} exists: choose another --name, or add --overwrite to replace it")
        if options.name == options.resume:
            raise UserError(f"--resume {options.resume} needs runs/{options.name}: choose another --name")


def _validate_environment(options: argparse.Namespace) -> None:
    """Refuse what cannot work with real sites, and resolve who they are and who submits."""
    if options.env != "prod":
        for name in ("startup_kit", "username", "sites", "classes", "export"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for real sites: add --env prod")
        return
    if options.check or options.prepare_only:
        raise UserError("--check and --prepare_only work on this machine: leave --env prod out")
    if options.partition not in (None, "none"):
        raise UserError(f"--partition {options.partition} deals images out, but real sites have their own: use none")
    options.partition = "none"
    if options.data_root:
        raise UserError("each site sets its own FL_DATA_ROOT: leave --data_root out, and unset FL_DATA_ROOT here")
    names = options.sites.split(",") if options.sites else _sites_of_project()
    if unfit := [name for name in names if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)]:
        raise UserError(f"--sites has a name {unfit[0]!r}: names with commas between, and no spaces")
    if len(set(names)) < len(names):
        raise UserError(f"--sites names {max(names, key=names.count)} twice")
    options.sites, options.n_clients = names, len(names)
    if options.dataset == "image_folder" and not options.classes:
        raise UserError("--classes FILE is missing: the names of the classes, one a line, as the sites' folders")
    if options.classes and not Path(options.classes).is_file():
        raise UserError(f"--classes: there is no file {options.classes}")
    for name in ("classes", "export", "startup_kit"):  # relative to where the user is, not to the project
        if getattr(options, name):
            setattr(options, name, os.path.abspath(os.path.expanduser(getattr(options, name))))
    if options.export:
        if os.path.exists(options.export):
            raise UserError(f"--export: {options.export} exists: choose another folder")
        return
    if not options.startup_kit:
        raise UserError("--startup_kit DIR is missing: the folder that you were given, with startup/ in it")
    kit = Path(options.startup_kit, "startup", "fed_admin.json")
    if not kit.is_file():
        raise UserError(f"--startup_kit: {kit} is not there: name the folder that holds startup/, a submitter's kit")
    try:
        submitter = json.loads(kit.read_text(encoding="utf-8"))["admin"]["username"]
    except (OSError, ValueError, KeyError, TypeError):
        fault = f"{kit} does not name a submitter: unpack the kit that you were given again"
        raise UserError(f"--startup_kit: {fault}") from None
    options.username = options.username or submitter


def _sites_of_project() -> list[str]:
    import yaml

    try:
        project = yaml.safe_load((PROJECT / "deploy" / "project.yml").read_text(encoding="utf-8"))
        return [member["name"] for member in project["participants"] if member["type"] == "client"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"deploy/project.yml does not tell the sites ({error}): name them with --sites") from None
