"""Every option of this project, one per line. Change the defaults here.

The flags of job.py, their checks, what the sites receive, results.json, resuming and compare.py all follow from these
lines. To add an option, add a line:

    weight_decay: float = training(0.0, "weight decay of the sites' optimizer", least=0.0, resume=INHERITED)

It is then `options.weight_decay` in model.py, data.py and trainer.py. This file travels to the sites, so it imports
only the standard library. The values travel as options.json.
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
FITS = {"stretch": "stretched", "pad": "padded with black", "crop": "cropped around their center"}
ALGORITHMS = {"fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "fedopt": "FedOpt"}
TRACKERS = ("none", "tensorboard", "mlflow", "wandb")
FIXED, INHERITED = "fixed", "inherited"


def option(group: str, default: Any, help: str, **rules: Any) -> Any:
    """An option of job.py.

    Args:
        group: its heading in `--help`.
        default: its value unless the flag is given.
        help: its text in `--help`.
        rules: any of these:
            `least`, `above`, `below`, `most`: bounds of a number;
            `choices`: the allowed values;
            `algorithms`: those that use it; others reject its flag, and results.json leaves it out;
            `resume`: FIXED if `--resume` always keeps the run's value, INHERITED if it does unless the flag is given;
            `local`: True if it concerns only the user's machine: sites and results.json do not get it;
            `flag`: the name of its flag if different from its own; None: no flag, job.py sets it;
            `metavar`: the placeholder for its value in `--help`;
            `env`: the environment variable with its default.
    """
    value: dict[str, Any] = {"default_factory": list} if default == [] else {"default": default}
    return field(**value, metadata={"group": group, "help": help, "flag": ..., **rules})


data = partial(option, "data")
training = partial(option, "training")
federated = partial(option, "algorithm")
simulation = partial(option, "simulation")
sites = partial(option, "real sites")
privacy = partial(option, "privacy")
output = partial(option, "output")


@dataclass
class Options:
    """The options of a run, or those that a finished run or a job was made with."""

    dataset: str = data("{{ cookiecutter.dataset }}", "data set to train on", choices=DATASETS, resume=FIXED)
    data_root: str | None = data(None, "raw data; {site} is a site's name", env="FL_DATA_ROOT", resume=INHERITED)
    image_size: int = data(32, "width and height of the images, in pixels", least=16, resume=FIXED)
    image_fit: str = data("stretch", "how images of your own become square", choices=(*FITS,), resume=FIXED)
    image_white: int | None = data(None, "white, in gray images of more than 8 bits", least=1, most=65535, resume=FIXED)
    skip_unreadable: float = data(0.0, "share of unreadable files to skip", least=0, below=1, env="FL_SKIP_UNREADABLE")
    partition: str = data("iid", "how to partition the images", choices=(*PARTITIONS, "site"), resume=FIXED)
    alpha: float = data(0.5, "dirichlet: the smaller, the less similar the sites", above=0, resume=FIXED)
    shards_per_site: int = data(2, "shards: number per site", least=1, resume=FIXED)

    model_class: str = training("LitNet", "LightningModule in model.py", flag="model", resume=FIXED)
    num_rounds: int = training({{ cookiecutter.rounds | int }}, "rounds of training", least=1, resume=INHERITED)
    local_epochs: int = training(1, "passes over a site's images in a round", least=1, resume=INHERITED)
    batch_size: int = training(16, "images per training step", least=1, resume=INHERITED)
    learning_rate: float = training(0.01, "learning rate of the sites' optimizer", above=0, resume=INHERITED)
    total_rounds: int | None = training(None, "rounds that a learning-rate schedule spans  [--num_rounds]")
    seed: int = training(0, "seed of weights, partition, cohorts and shuffling", least=0, most=2**32 - 1, resume=FIXED)
    max_batches: int | None = training(None, "training batches per epoch; None: all", flag=None)
    gpu: bool = training({{ cookiecutter.use_gpu }}, "use NVIDIA GPUs if available")

    algorithm: str = federated("fedavg", "federated algorithm", choices=(*ALGORITHMS,), resume=FIXED)
    fedprox_mu: float = federated(0.01, "proximal weight mu", above=0, algorithms=("fedprox",), resume=INHERITED)
    server_learning_rate: float = federated(1.0, "server step size", above=0, algorithms=("fedopt",), resume=INHERITED)
    server_momentum: float = federated(0.9, "momentum", least=0, below=1, algorithms=("fedopt",), resume=INHERITED)
    sites_per_round: int | None = federated(None, "random sites in each round  [all]", least=1, resume=INHERITED)
    evaluate_sites: int | None = federated(None, "random sites in the last evaluation  [all]", least=1)
    patience: int | None = federated(None, "stop N rounds after the best", least=1, algorithms=("fedavg", "fedprox"))

    env: str = simulation("sim", "simulator, POC on this machine, or real sites", choices=("sim", "poc", "prod"))
    n_clients: int = simulation({{ cookiecutter.num_clients | int }}, "number of sites", least=1, resume=FIXED)
    n_hosts: int | None = simulation(None, "processes that run the sites  [cores; POC: sites]", least=1)
    threads: int | None = simulation(None, "PyTorch threads per site; None: each site decides", flag=None)
    host_names: list[str] = simulation([], "names of the processes; none: host-1, ...", flag=None)

    simulate: bool = sites(False, "the real sites run --n_clients simulated ones")
    startup_kit: str | None = sites(None, "submitter's startup kit", metavar="DIR", local=True)
    username: str | None = sites(None, "submitter's name  [the kit's]", local=True)
    site_names: list[str] = sites([], "comma-separated names  [those in deploy/project.yml]", flag="sites", local=True)
    classes_file: str | None = sites(None, "class names, one per line", flag="classes", metavar="FILE", local=True)
    classes: list[str] = sites([], "class names in label order", flag=None)
    wait: float = sites(60.0, "seconds to wait for the server and the sites", above=0, local=True)
    site_timeout: float = sites(86_400.0, "seconds a site may take for a round; POC, too", above=0)
    export: str | None = sites(None, "write the job to DIR instead of submitting it", metavar="DIR", local=True)

    dp_epsilon: float | None = privacy(None, "differential privacy: ε of each site in this job", above=0)
    dp_delta: float | None = privacy(None, "its δ, below 1 / n for n training images  [0.1 / n]", above=0, below=1)
    dp_clip: float = privacy(1.0, "norm to which it clips the gradient of each image", above=0)
    leak_test: bool | None = privacy(None, "measure what the final model's loss gives away  [simulator: yes]")

    resume: str | None = output(None, "resume runs/RUN from its last model", metavar="RUN", local=True)
    name: str | None = output(None, "write the run to runs/NAME  [date and time]", local=True)
    overwrite: bool = output(False, "replace runs/NAME if it exists", local=True)
    tracking: str = output("none", "experiment tracker", choices=TRACKERS)
    verbose: bool = output(False, "show NVFlare's log", local=True)
    prepare_only: bool = output(False, "prepare the data and stop", local=True)
    debug: str | None = output(None, "run one task of a site in this process", metavar="SITE", local=True)
    check: bool = output(False, "check in one short round that everything works", local=True)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Options":
        """The options of a job or a finished run; those that it lacks have their defaults."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    @classmethod
    def of_job(cls) -> "Options":
        """The options of the job that this code runs in. A real site chooses its own data root and what to skip."""
        options = cls.of(json.loads(Path(__file__).with_name("options.json").read_text(encoding="utf-8")))
        if options.env == "prod":
            options.data_root = os.environ.get("FL_DATA_ROOT")
            options.skip_unreadable = float(os.environ.get("FL_SKIP_UNREADABLE") or 0)
        return options

    @property
    def simulated(self) -> bool:
        """Whether sites are simulated: `n_clients` parts of one data set, not real sites with their own images."""
        return self.env != "prod" or self.simulate

    def of_run(self) -> dict[str, Any]:
        """The options that travel with the job and appear in results.json."""
        rules = {each.name: each.metadata for each in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if not rules[name].get("local") and self.algorithm in rules[name].get("algorithms", ALGORITHMS)
        }
