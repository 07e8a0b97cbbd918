"""From the command line's options to an NVFlare recipe: what the server and the sites will do."""

import argparse
from pathlib import Path
from typing import Any

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.app_opt.pt.recipes.fedopt import FedOptRecipe
from nvflare.app_opt.pt.recipes.fedprox import FedProxRecipe
from nvflare.app_opt.pt.recipes.scaffold import ScaffoldRecipe
from nvflare.recipe.spec import Recipe

import model as models
from data import Holdings
from federation.protocol import METRIC
from federation.server.aggregation import OrderedMean, OrderedScaffold
from federation.server.answers import AnswerCheck
from federation.server.audit import Receipt
from federation.server.evaluation import FinalEvaluation
from federation.server.fedopt import StartFromCheckpoint
from federation.server.heartbeat import PATIENCE, Watch

CLIENT_OPTIONS = (
    "model_class",
    "batch_size",
    "local_epochs",
    "learning_rate",
    "dataset",
    "image_size",
    "partition",
    "alpha",
    "shards_per_site",
    "n_clients",
    "seed",
    "tracking",
)
TASK_INTERVAL_S = 0.5  # how often a site asks for its next task; NVFlare's default is 2


def build(options: argparse.Namespace, holdings: Holdings, run: Path) -> Recipe:
    """The recipe of `options.algorithm`: all sites take part in each round, weighted by their training images.

    Args:
        options: the command line's.
        holdings: the classes, and in a simulation who has which images.
        run: the run's folder, relative to the working directory: NVFlare bundles files only by a relative path.
    """
    classes = holdings.classes
    model_args = {"num_classes": len(classes), "learning_rate": options.learning_rate}
    torch.manual_seed(options.seed)
    if options.resume:
        weights = torch.load(options.resume_from, weights_only=True)
    else:
        weights = getattr(models, options.model_class)(**model_args).state_dict()
    bundle = run / "bundle"  # travels with the job, beside the code
    bundle.mkdir()
    torch.save(weights, bundle / "initial.pt")
    (bundle / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")

    recipe = ALGORITHMS[options.algorithm](
        options,
        name="job",
        model={"class_path": f"model.{options.model_class}", "args": model_args},
        initial_ckpt=str(bundle / "initial.pt"),
        min_clients=options.n_clients,
        num_rounds=options.num_rounds,
        train_script="client.py",
        train_args=client_arguments(options),
    )
    server = _server(recipe)
    for replaced in ("model_selector", "metrics_artifact_writer"):  # FinalEvaluation does what they do
        server.components.pop(replaced, None)
    controller = server.workflows[0].controller
    vars(controller)["_start_round" if hasattr(controller, "_start_round") else "start_round"] = options.first_round
    recipe.add_client_file(str(bundle))
    recipe.add_server_config({"server": {"task_request_interval": TASK_INTERVAL_S}})
    recipe._job.to_server(FinalEvaluation(options.n_clients), id="final_evaluation")  # no public method does it
    images = {site: {part: len(own) for part, own in parts.items()} for site, parts in holdings.sites.items()}
    answer_check = AnswerCheck(options.algorithm, classes, options.first_round, images or None)
    recipe._job.to_server(answer_check, id="answer_check")
    recipe._job.to_server(Receipt(), id="receipt")
    if options.env != "sim":  # there, clients that take turns have no process in between; simulator.py sees to it
        recipe.add_server_config(PATIENCE)
        recipe._job.to_server(Watch(options.site_timeout), id="watch")
    return recipe


def fedavg(options: argparse.Namespace, **shared: Any) -> FedAvgRecipe:
    """McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"."""
    return FedAvgRecipe(aggregator=OrderedMean(options.n_clients), **_early_stopping(options), **shared)


def fedprox(options: argparse.Namespace, **shared: Any) -> FedProxRecipe:
    """Li et al. 2020, "Federated Optimization in Heterogeneous Networks": mu weighs the pull to the global model."""
    own = {"aggregator": OrderedMean(options.n_clients), "fedprox_mu": options.fedprox_mu}
    return FedProxRecipe(**own, **_early_stopping(options), **shared)


def scaffold(options: argparse.Namespace, **shared: Any) -> ScaffoldRecipe:
    """Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", after option II.

    Not quite the paper's: there, a site takes plain SGD steps. The models of model.py have momentum, with which a
    site's control variate is larger than its mean gradient.
    """
    recipe = ScaffoldRecipe(**shared)
    own = OrderedScaffold(num_clients=options.n_clients, num_rounds=options.num_rounds)
    _server(recipe).workflows[0].controller = own  # the recipe takes no aggregator
    return recipe


def fedopt(options: argparse.Namespace, **shared: Any) -> FedOptRecipe:
    """Reddi et al. 2021, "Adaptive Federated Optimization": the server takes the sites' mean change for a gradient.

    Its optimizer is SGD with momentum, which makes it the paper's FedAvgM.
    """
    sgd = {"lr": options.server_learning_rate, "momentum": options.server_momentum}
    optimizer = {"path": "torch.optim.SGD", "args": sgd}
    recipe = FedOptRecipe(aggregator=OrderedMean(options.n_clients), optimizer_args=optimizer, device="cpu", **shared)
    # NVFlare exports those of a model's arguments that it has as attributes, and the model's defaults for others.
    vars(_server(recipe).components["model"]).update(shared["model"]["args"])
    recipe._job.to_server(StartFromCheckpoint(), id="start_from_checkpoint")
    return recipe


ALGORITHMS = {"fedavg": fedavg, "fedprox": fedprox, "scaffold": scaffold, "fedopt": fedopt}


def _early_stopping(options: argparse.Namespace) -> dict[str, Any]:
    # NVFlare heeds `patience` only beside a condition: this one never holds.
    stop = {"stop_cond": f"{METRIC} > inf", "patience": options.patience} if options.patience else {}
    return {"key_metric": METRIC, **stop}


def _server(recipe: Recipe) -> Any:
    """What the recipe has built for the server. NVFlare has no public door to it; its own recipe.utils go this way."""
    return recipe._job._deploy_map["server"].app_config


def client_arguments(options: argparse.Namespace) -> str:
    """client.py's command line. NVFlare splits it at white space, so no value may contain any."""
    arguments = [f"--{name} {getattr(options, name)}" for name in CLIENT_OPTIONS]
    arguments.append(f"--num_rounds {options.total_rounds}")
    if options.gpu:
        arguments.append("--gpu")
    if options.max_batches:
        arguments.append(f"--max_batches {options.max_batches}")
    return " ".join(arguments)
