"""From the command line's options to an NVFlare recipe: what the server and the sites will do."""

from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

import model as models
from federation.aggregator import OrderedMean
from federation.evaluation import FinalEvaluation
from federation.receipt import Receipt

CLIENT_OPTIONS = (
    "model",
    "batch_size",
    "num_rounds",
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


def fedavg(options, classes: list[str], run: Path) -> FedAvgRecipe:
    """Federated averaging (McMahan et al. 2017): all sites in each round, weighted by their training images.

    Args:
        options: the command line's.
        classes: names of the classes, in order.
        run: the run's folder, relative to the working directory: NVFlare bundles files only by a relative path.
    """
    model_args = {"num_classes": len(classes), "learning_rate": options.learning_rate}
    torch.manual_seed(options.seed)
    bundle = run / "bundle"  # travels with the job, beside the code
    bundle.mkdir()
    torch.save(getattr(models, options.model)(**model_args).state_dict(), bundle / "initial.pt")
    (bundle / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")

    recipe = FedAvgRecipe(
        name="job",
        model={"class_path": f"model.{options.model}", "args": model_args},
        initial_ckpt=str(bundle / "initial.pt"),
        min_clients=options.n_clients,
        num_rounds=options.num_rounds,
        train_script="client.py",
        train_args=client_arguments(options),
        aggregator=OrderedMean(),
        key_metric="",  # FinalEvaluation finds the best model, with the last one among the candidates
    )
    recipe.add_client_file(str(bundle))
    recipe.add_server_config({"server": {"task_request_interval": TASK_INTERVAL_S}})
    recipe._job.to_server(FinalEvaluation(), id="final_evaluation")  # no public method does it
    recipe._job.to_server(Receipt(), id="receipt")
    return recipe


def client_arguments(options) -> str:
    """client.py's command line. NVFlare splits it at white space, so no value may contain any."""
    arguments = [f"--{name} {getattr(options, name)}" for name in CLIENT_OPTIONS]
    if options.gpu:
        arguments.append("--gpu")
    if options.max_batches:
        arguments.append(f"--max_batches {options.max_batches}")
    return " ".join(arguments)
