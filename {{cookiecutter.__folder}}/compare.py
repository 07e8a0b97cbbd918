"""Compare a run with centralized and local training: `python compare.py [RUN]`, by default the newest.

Trains the run's model again in this one process, without NVFlare, so that a debugger works: centralized, on all sites'
images together, and at every site alone. Images, initial weights, settings, number of epochs (rounds x local epochs)
and test images are those of the run. One thing differs: here the optimizer keeps its state from start to end, as it
would without a federation, while a federated site starts every round with a new one.

Writes `compare.json` and `compare.png` into the run's folder.
"""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

import results
from federation.errors import UserError, exit_code
from federation.launch.model_file import model_names
from federation.launch.options import PROJECT, Command, read_arguments
from federation.protocol import write_json
from federation.run import schema
from federation.run.folder import RunFolder
from federation.run.metrics import MAX_SITES, weighted_mean
from settings import Options
from trainer import n_images

console = Console()


def main() -> None:
    run = click.Argument(["run"], default="latest")
    root = click.Option(["--data_root"], help="where the images are  [FL_DATA_ROOT, or the run's]")
    purpose = "Train a run's model without the federation. RUN is a folder under runs/, by default the newest."
    arguments = read_arguments(Command("compare.py", params=[run, root], help=purpose)).params
    folder = RunFolder.find(arguments["run"])
    result = schema.read(folder)
    if result["env"] == "prod":
        raise UserError(f"runs/{folder.name} used images that stay at its sites: choose a simulated run")
    comparison = compare(folder, result, arguments["data_root"] or os.environ.get("FL_DATA_ROOT"))
    write_json(folder.comparison, comparison, indent=2)
    plot(comparison, folder.comparison_plot)
    show(comparison)
    print(f"results: {os.path.relpath(folder.comparison)}, plot: {os.path.relpath(folder.comparison_plot)}")


def compare(folder: RunFolder, result: dict[str, Any], data_root: str | None = None) -> dict[str, Any]:
    """Train without the federation, and return the content of compare.json, which REFERENCE.md documents.

    Args:
        folder: the run.
        result: its results.json.
        data_root: where the images are now; None: where the run had them.

    Raises:
        UserError: the run's images or its model are gone or have changed.
    """
    options = Options.of(result)
    options.gpu = result["device"] != "cpu"
    if data_root:
        options.data_root = os.path.abspath(os.path.expanduser(data_root))
    stages = schema.stages(result)  # the runs that led to this model
    for name in schema.STAGE_OPTIONS:
        values = {str(stage.get(name)) for stage in stages}
        if len(values) > 1 and name != "local_epochs":
            change = f"runs/{folder.name} was resumed with a different --{name} ({', '.join(sorted(values))})"
            raise UserError(f"{change}: choose a run that kept it")
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    from data import SiteDataModule
    from federation.launch import distribution

    distribution.prepare(options)
    found = distribution.describe(options)
    options.classes = found.classes
    if schema.read_json(folder.partition) != json.loads(json.dumps(dataclasses.asdict(found))):
        raise UserError(f"the images differ from those of runs/{folder.name}: restore them, or set --data_root")
    if options.model_class not in model_names(PROJECT / "model.py"):
        raise UserError(f"runs/{folder.name} trained {options.model_class}, which is no longer in model.py")

    sites = {site: SiteDataModule(site, options) for site in result["test"]["sites"]}  # can be a sample
    pooled = SiteDataModule(None, options)
    modules = {"": pooled, **sites}
    for module in modules.values():
        module.prepare_data()
        module.setup("fit")
    epochs = sum(stage["rounds"] * stage["local_epochs"] for stage in stages)
    models = train(modules, epochs, options)

    console.print("Testing ...")
    images = {site: n_images(module, "test") for site, module in sites.items()}
    federated = {site: entry["accuracy"] for site, entry in result["test"]["sites"].items()}
    central = {site: test(models[""], module, options) for site, module in sites.items()}
    own = {site: test(models[site], module, options) for site, module in sites.items()}
    everywhere = {site: test(models[site], pooled, options) for site in sites}
    return {
        "version": 1,
        "run": folder.name,
        "model_class": options.model_class,
        "epochs": epochs,
        "seed": options.seed,
        "rows": {
            "centralized": {"all": weighted_mean(central, images), "sites": central},
            "federated": {"all": result["test"]["accuracy"], "sites": federated},
            "alone": {"all": weighted_mean(own, images), "sites": own},
            "alone_on_all": {"all": weighted_mean(everywhere, dict.fromkeys(sites, 1)), "sites": everywhere},
        },
    }


def train(modules: dict[str, Any], epochs: int, options: Options) -> dict[str, Any]:
    """Train one model per data module, on its images only. All start from the federation's initial weights.

    Args:
        modules: site -> its data module; "" is that of all sites together.
        epochs: passes over the images.
        options: of the run.
    """
    import torch
    from pytorch_lightning import seed_everything
    from pytorch_lightning.callbacks import LambdaCallback

    from trainer import make_model, make_trainer, training_seed

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    # As many threads as each site had: the last bits depend on it, and small networks gain nothing from more.
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // options.n_clients))  # or: an older run
    batches = {site: len(module.train_dataloader()) for site, module in modules.items()}
    steps = {site: epochs * min(n, options.max_batches or n) for site, n in batches.items()}
    one_fit = dataclasses.replace(options, total_rounds=1)  # one optimizer for all epochs
    models = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(steps.values()))
        step_done = LambdaCallback(on_train_batch_end=lambda *_: bar.advance(task))
        for site, module in modules.items():
            name = f"{site} alone" if site else "centralized"
            bar.update(task, description=name)
            started = time.monotonic()
            torch.manual_seed(options.seed)
            model = make_model(one_fit)
            seed_everything(training_seed(options.seed, site, 0), verbose=False)
            try:
                make_trainer(options, epochs, [step_done]).fit(model, datamodule=module)
            except SystemExit:  # Lightning turns Ctrl-C into this
                raise KeyboardInterrupt from None
            models[site] = model
            effort = f"epochs: {epochs}, steps: {steps[site]}, {time.monotonic() - started:.0f} s"
            if len(models) <= 1 + MAX_SITES:
                bar.console.print(f"{name}: trained on {n_images(module, 'train')} images, {effort}")
    if (n_more := len(models) - 1 - MAX_SITES) > 0:
        console.print(f"and {n_more:,} more sites alone")
    return models


def test(model: Any, module: Any, options: Options) -> float | None:
    """Accuracy on a data module's test images; None if it has none."""
    from trainer import make_trainer

    if not n_images(module, "test"):
        return None
    return make_trainer(options, 1).test(model, datamodule=module, verbose=False)[0].get("test_acc")


def show(comparison: dict[str, Any]) -> None:
    """Print a compare.json as a table, and the differences that matter."""
    rows = comparison["rows"]
    title = f"Test accuracy ({comparison['model_class']}, epochs: {comparison['epochs']})"
    results.print_by_site(
        title, {name: (rows[key]["all"], rows[key]["sites"]) for key, name in schema.COMPARED.items()}
    )
    federated = rows["federated"]["all"]
    if federated is None:
        return
    gain = {key: f"{federated - rows[key]['all']:+.3f}" for key in schema.COMPARED}
    alone = {site: value for site, value in rows["alone"]["sites"].items() if value is not None}
    n_gains = sum(rows["federated"]["sites"][site] > value for site, value in alone.items())
    print(f"\nFederated minus alone, own test images: {gain['alone']} ({n_gains:,} of {len(alone):,} sites gain)")
    print(f"Federated minus alone, all test images: {gain['alone_on_all']}")
    print(f"Federated minus centralized: {gain['centralized']}")


def plot(comparison: dict[str, Any], file: Path) -> None:
    """Plot the table."""
    from federation.report import plots  # matplotlib takes a second to import

    plots.baselines(comparison).savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(exit_code("compare.py", main))
