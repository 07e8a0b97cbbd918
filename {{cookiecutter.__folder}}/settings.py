"""Every option of this project, a line each: flags, checks, what a site gets, results.json, resuming and compare.py
follow from it. Change the defaults here.

To add an option, add a line; `weight_decay` then is `options.weight_decay` in model.py, data.py and trainer.py:

    weight_decay: float = training(0.0, "of the sites' optimizer", least=0.0, resume=INHERITED)

This file travels to the sites, and so imports the standard library only. Values travel as options.json.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

PROJECT_NAME = "{{ cookiecutter.project_name | replace('\\', '\\\\') | replace('"', '\\x22') }}"  # noqa: E501

DATASETS = ("cifar10", "fashion_mnist", "bloodmnist", "digits", "image_folder")
PARTITIONS = ("iid", "dirichlet", "shards", "none")
ALGORITHMS = {"fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "fedopt": "FedOpt"}
TRACKERS = ("none", "tensorboard", "mlflow", "wandb")
FIXED, INHERITED = "fixed", "inherited"


def option(group: str, default: Any, help: str, **rules: Any) -> Any:
    """An option of job.py.

    Args:
        group: its heading in `--help`.
        default: its value if nobody says otherwise.
        help: what `--help` says.
        rules: of these, those that hold:
            `least`, `above`, `below`, `most`: bounds of a number;
            `choices`: the values to choose from;
            `algorithms`: those that use it; with others its flag is refused, and results.json leaves it out;
            `resume`: FIXED, if `--resume` keeps it; INHERITED, if it does unless the flag is given;
            `local`: True, if it concerns the user's machine alone: no site gets it and results.json leaves it out;
            `flag`: its flag, where that is not its name; None: it has none, job.py sets it;
            `metavar`: what stands for its value in `--help`;
            `env`: the environment variable that gives its default.
    """
    value: dict[str, Any] = {"default_factory": list} if default == [] else {"default": default}
    return field(**value, metadata={"group": group, "help": help, "flag": ..., **rules})


data = partial(option, "data")
training = partial(option, "training")
federated = partial(option, "algorithm")
simulation = partial(option, "simulation")
sites = partial(option, "real sites")
output = partial(option, "output")


@dataclass
class Options:
    """The options of a run; of a finished run or a job, those that it was made with."""

    dataset: str = data("{{ cookiecutter.dataset }}", "what to train on", choices=DATASETS, resume=FIXED)
    data_root: str | None = data(None, "raw data; {site} is a site's name", env="FL_DATA_ROOT", resume=INHERITED)
    image_size: int = data(32, "width and height of the images in pixels", least=16, resume=FIXED)
    partition: str = data("iid", "how to split the images between the sites", choices=PARTITIONS, resume=FIXED)
    alpha: float = data(0.5, "dirichlet: the smaller, the less alike the sites", above=0, resume=FIXED)
    shards_per_site: int = data(2, "shards: how many each site gets", least=1, resume=FIXED)

    model_class: str = training("LitNet", "a LightningModule of model.py", flag="model", resume=FIXED)
    num_rounds: int = training({{ cookiecutter.rounds | int }}, "rounds of training", least=1, resume=INHERITED)
    local_epochs: int = training(1, "a site's passes over its images in a round", least=1, resume=INHERITED)
    batch_size: int = training(16, "images in a training step", least=1, resume=INHERITED)
    learning_rate: float = training(0.01, "of the sites' optimizer", above=0, resume=INHERITED)
    total_rounds: int | None = training(None, "of a learning-rate schedule, with a later --resume  [--num_rounds]")
    seed: int = training(0, "of weights, partition and shuffling", least=0, most=2**32 - 1, resume=FIXED)
    max_batches: int | None = training(None, "training batches per epoch; None: all", flag=None)
    gpu: bool = training({{ cookiecutter.use_gpu }}, "use NVIDIA GPUs where there are any")

    algorithm: str = federated("fedavg", "how the sites learn together", choices=(*ALGORITHMS,), resume=FIXED)
    fedprox_mu: float = federated(0.01, "mu of Li et al. 2020", above=0, algorithms=("fedprox",), resume=INHERITED)
    server_learning_rate: float = federated(1.0, "the server's eta", above=0, algorithms=("fedopt",), resume=INHERITED)
    server_momentum: float = federated(0.9, "beta 1", least=0, below=1, algorithms=("fedopt",), resume=INHERITED)
    sites_per_round: int | None = federated(None, "random sites in each round  [all]", least=1, resume=INHERITED)
    evaluate_sites: int | None = federated(None, "random sites in the final evaluation  [all]", least=1)
    patience: int | None = federated(None, "stop N rounds after the best", least=1, algorithms=("fedavg", "fedprox"))

    env: str = simulation("sim", "simulator, POC on this machine, or real sites", choices=("sim", "poc", "prod"))
    n_clients: int = simulation({{ cookiecutter.num_clients | int }}, "number of sites", least=1, resume=FIXED)
    n_hosts: int | None = simulation(None, "processes that run the sites  [one per core; POC: per site]", least=1)
    threads: int | None = simulation(None, "of PyTorch, for each site; None: each site's own", flag=None)

    startup_kit: str | None = sites(None, "the submitter's start-up kit", metavar="DIR", local=True)
    username: str | None = sites(None, "who submits  [the kit's own]", local=True)
    site_names: list[str] = sites([], "names, with commas between  [deploy/project.yml's]", flag="sites", local=True)
    classes_file: str | None = sites(None, "class names, one per line", flag="classes", metavar="FILE", local=True)
    classes: list[str] = sites([], "names of the federation's classes, in the order of the labels", flag=None)
    wait: float = sites(60.0, "seconds to wait for server and sites", above=0, local=True)
    site_timeout: float = sites(86_400.0, "seconds for a site's round, then the job continues; POC too", above=0)
    export: str | None = sites(None, "write the job to DIR, for someone else to submit", metavar="DIR", local=True)

    resume: str | None = output(None, "continue from the model of runs/RUN", metavar="RUN", local=True)
    name: str | None = output(None, "the run's folder is runs/NAME  [date and time]", local=True)
    overwrite: bool = output(False, "replace runs/NAME, if there is one", local=True)
    tracking: str = output("none", "experiment tracker", choices=TRACKERS)
    verbose: bool = output(False, "show NVFlare's own log", local=True)
    prepare_only: bool = output(False, "get the data ready and stop", local=True)
    debug: str | None = output(None, "run a task of this site in job.py's process", metavar="SITE", local=True)
    check: bool = output(False, "see in one short round whether everything works here", local=True)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Options":
        """The options of a job or a finished run: what it does not know has its default."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    @classmethod
    def of_job(cls) -> "Options":
        """The options that came with the job, for what runs in it. A real site has its images where it says itself."""
        options = cls.of(json.loads(Path(__file__).with_name("options.json").read_text(encoding="utf-8")))
        if options.env == "prod":
            options.data_root = os.environ.get("FL_DATA_ROOT")
        return options

    def of_run(self) -> dict[str, Any]:
        """The options that concern the run: they travel with its job and stand in its results.json."""
        rules = {each.name: each.metadata for each in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if not rules[name].get("local") and self.algorithm in rules[name].get("algorithms", ALGORITHMS)
        }
