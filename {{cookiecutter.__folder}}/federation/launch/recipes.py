"""Build an NVFlare recipe from the options: what the server and the sites will do."""

import json
from typing import Any

import torch
from nvflare.apis.job_def import ALL_SITES
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.app_opt.pt.recipes.fedopt import FedOptRecipe
from nvflare.app_opt.pt.recipes.fedprox import FedProxRecipe
from nvflare.app_opt.pt.recipes.scaffold import ScaffoldRecipe
from nvflare.recipe.spec import Recipe

from federation.launch.distribution import Distribution
from federation.launch.resume import Start
from federation.protocol import INITIAL, METRIC, OPTIONS
from federation.run.folder import RunFolder
from federation.server.aggregation import ExactScaffold, StartFromCheckpoint, WeightedMean
from federation.server.answers import AnswerCheck
from federation.server.audit import AuditLog
from federation.server.cohort import Cohort
from federation.server.evaluation import FinalEvaluation
from federation.server.heartbeat import DEAD_CLIENT_TIMING, HeartbeatMonitor
from federation.site.host import SiteHost
from federation.site.partition import hosts, site_names
from settings import Options
from trainer import load_model, make_model

TASK_INTERVAL_S = 0.5  # how often a site asks for its next task; NVFlare's default is 2
TASK_CHECK_S = 0.05  # how often the server checks whether a round is over; NVFlare's default is 0.5


def build(options: Options, distribution: Distribution, start: Start, run: RunFolder) -> Recipe:
    """The recipe for `options.algorithm`: sites are weighted by their training images.

    Args:
        options: the run's options, with the federation's `classes`.
        distribution: in a simulation, which images each site has.
        start: what the run starts from.
        run: the run's folder.
    """
    torch.manual_seed(options.seed)
    model = load_model(start.model, options) if start.model else make_model(options)
    run.bundle.mkdir()  # travels with the job, next to the code
    torch.save(model.state_dict(), run.bundle / INITIAL)
    (run.bundle / OPTIONS).write_text(json.dumps(options.of_run(), indent=2), encoding="utf-8")

    recipe = ALGORITHMS[options.algorithm](
        options,
        name=run.job.name,
        model={"class_path": "trainer.make_model", "args": {}},
        initial_ckpt=str(run.bundle / INITIAL),
        min_clients=options.n_hosts or options.n_clients,
        num_rounds=options.num_rounds,
        train_script="client.py",
    )
    server = _app(recipe, "server")
    for replaced in ("model_selector", "metrics_artifact_writer"):  # by FinalEvaluation
        server.components.pop(replaced, None)
    controller = server.workflows[0].controller
    vars(controller)["_start_round" if hasattr(controller, "_start_round") else "start_round"] = start.first_round
    vars(controller)["_task_check_period"] = TASK_CHECK_S
    recipe.add_client_file(str(run.bundle))
    _app(recipe, ALL_SITES).executors = []
    recipe._job.to_clients(SiteHost(), tasks=["*"])
    recipe.add_server_config({"server": {"task_request_interval": TASK_INTERVAL_S}})
    hosted = any(sites != [host] for host, sites in hosts(options).items())
    sampled = options.sites_per_round is not None
    evaluation = FinalEvaluation(options.evaluate_sites or options.n_clients, hosted, sampled)
    recipe._job.to_server(evaluation, id="final_evaluation")  # there is no public method
    images = {site: {part: len(own) for part, own in parts.items()} for site, parts in distribution.sites.items()}
    answer_check = AnswerCheck(options.algorithm, options.classes, start.first_round, images or None, hosted)
    recipe._job.to_server(answer_check, id="answer_check")
    recipe._job.to_server(AuditLog(hosted), id="audit_log")
    sizes = {AppConstants.TASK_TRAIN: options.sites_per_round, AppConstants.TASK_VALIDATION: options.evaluate_sites}
    if sizes := {task: size for task, size in sizes.items() if size}:
        names = site_names(options.n_clients) if options.simulated else None
        recipe._job.to_server(Cohort(options.seed, sizes, names), id="cohort")
    if options.env != "sim":  # there, simulator.py notices a process that is gone
        recipe.add_server_config(DEAD_CLIENT_TIMING)
        recipe._job.to_server(HeartbeatMonitor(options.site_timeout), id="heartbeat_monitor")
    return recipe


def notes(options: Options, run: RunFolder) -> list[str]:
    """Messages for the user: who takes part, in how many processes, and what SCAFFOLD keeps on disk."""
    found, n_hosts = [], len(hosts(options))
    if options.simulated and n_hosts < options.n_clients:
        found.append(f"{n_hosts} {'process runs' if n_hosts == 1 else 'processes run'} the sites, one after the other")
    if options.sites_per_round:
        found.append(f"each round trains {options.sites_per_round} random sites of {options.n_clients}")
    if options.evaluate_sites:
        found.append(f"the final model is evaluated by {options.evaluate_sites} random sites of {options.n_clients}")
    if options.algorithm == "scaffold":
        size = (run.bundle / INITIAL).stat().st_size * options.n_clients / 1e6
        found.append(f"SCAFFOLD keeps a control variate for each site on disk, {size:,.0f} MB in all")
    return found


def fedavg(options: Options, **shared: Any) -> FedAvgRecipe:
    """McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"."""
    return FedAvgRecipe(aggregator=WeightedMean(_sites_per_round(options)), **_early_stopping(options), **shared)


def fedprox(options: Options, **shared: Any) -> FedProxRecipe:
    """Li et al. 2020, "Federated Optimization in Heterogeneous Networks": mu pulls toward the global model."""
    own = {"aggregator": WeightedMean(_sites_per_round(options)), "fedprox_mu": options.fedprox_mu}
    return FedProxRecipe(**own, **_early_stopping(options), **shared)


def scaffold(options: Options, **shared: Any) -> ScaffoldRecipe:
    """Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", option II.

    One difference: in the paper, sites use plain SGD. The models in model.py use momentum, which makes a site's control
    variate larger than its mean gradient.
    """
    recipe = ScaffoldRecipe(**shared)
    sizes = {"n_sites": _sites_per_round(options), "n_all": options.n_clients}
    own = ExactScaffold(**sizes, num_clients=shared["min_clients"], num_rounds=options.num_rounds)
    _app(recipe, "server").workflows[0].controller = own  # the recipe takes no aggregator
    return recipe


def fedopt(options: Options, **shared: Any) -> FedOptRecipe:
    """Reddi et al. 2021, "Adaptive Federated Optimization": the server uses the sites' mean update as a gradient.

    Its optimizer is SGD with momentum, which is the paper's FedAvgM.
    """
    sgd = {"lr": options.server_learning_rate, "momentum": options.server_momentum}
    optimizer = {"path": "torch.optim.SGD", "args": sgd}
    shared["model"] = make_model(options)  # this recipe needs an object
    aggregator = WeightedMean(_sites_per_round(options))
    recipe = FedOptRecipe(aggregator=aggregator, optimizer_args=optimizer, device="cpu", **shared)
    # NVFlare exports an object by its class name: this one has to name the factory.
    _app(recipe, "server").components["model"] = type("make_model", (), {"__module__": "trainer"})()
    recipe._job.to_server(StartFromCheckpoint(), id="start_from_checkpoint")
    return recipe


ALGORITHMS = {"fedavg": fedavg, "fedprox": fedprox, "scaffold": scaffold, "fedopt": fedopt}


def _sites_per_round(options: Options) -> int:
    return options.sites_per_round or options.n_clients


def _early_stopping(options: Options) -> dict[str, Any]:
    # NVFlare uses `patience` only together with a condition: this one is never met.
    stop = {"stop_cond": f"{METRIC} > inf", "patience": options.patience} if options.patience else {}
    return {"key_metric": METRIC, **stop}


def _app(recipe: Recipe, target: str) -> Any:
    """The recipe's app for the server or the sites. NVFlare has no public access to it; recipe.utils does the same."""
    return recipe._job._deploy_map[target].app_config
