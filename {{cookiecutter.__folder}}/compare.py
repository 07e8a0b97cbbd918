"""Was the federation worth it? `python compare.py [RUN]`: the same training without it; the newest run by default.

Trains the run's model in this one process, without NVFlare, so that a debugger works: centralised, on all sites'
images together, and at every site alone. Images, initial weights, settings, number of epochs (rounds x local epochs)
and test images are the run's. One thing is not: here an optimizer is kept from beginning to end, as anyone would who
trains without a federation, while a federated site begins every round with a fresh one.

Writes `compare.json` and `compare.png` into the run's folder.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import results
from federation.errors import UserError, exit_code
from federation.launch.options import Parser, model_names
from federation.protocol import write_json
from federation.run import schema
from federation.run.metrics import as_text, weighted_mean

ROWS = {
    "centralised": "centralised",
    "federated": "federated",
    "alone": "alone, own test images",
    "alone_on_all": "alone, all test images",
}
COLOURS = ("#0072b2", "#009e73", "#d55e00", "#e69f00")  # Okabe & Ito: the colour-blind can tell them apart
console = Console()


def main() -> None:
    parser = Parser(prog="compare.py", description="What a run would have been without the federation.")
    add = parser.add_argument
    add("run", nargs="?", default="latest", help="a finished run: the name of a folder under runs/ [the newest]")
    add("--data_root", default=os.environ.get("FL_DATA_ROOT"), help="that of the run [FL_DATA_ROOT, or the cache]")
    arguments = parser.parse_args()
    folder, result = find_run(arguments.run)
    if result["env"] == "prod":
        raise UserError(f"the images of runs/{folder.name} are at its sites: compare a simulated run")
    if root := arguments.data_root or result["data_root"]:
        os.environ["FL_DATA_ROOT"] = os.path.abspath(os.path.expanduser(root))
    comparison = compare(folder, result)
    write_json(folder / "compare.json", comparison, indent=2)
    plot(comparison, folder / "compare.png")
    show(comparison)
    print(f"runs/{folder.name}/compare.json has all figures, runs/{folder.name}/compare.png the plot")


def find_run(name: str) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder and what its results.json says.

    Raises:
        UserError: there is no such run, or it has no result.
    """
    name = Path(name).name  # runs/NAME, as a shell completes it, means NAME
    folder = (results.RUNS / name).resolve()
    if not folder.is_dir():
        raise UserError(f"there is no runs/{name}: finish a run with python job.py, or name one that is there")
    return folder, schema.read(folder)


def compare(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Train without the federation, and put the accuracies beside the federation's.

    Args:
        folder: the run's.
        result: its results.json.

    Returns:
        What compare.json holds; README.md documents it.

    Raises:
        UserError: the run's images or its model are not there any more, or not as they were.
    """
    options = argparse.Namespace(
        **{name: result[name] for name in ("dataset", *schema.CONFIGURATION)},
        model_class=result["model_class"] or "LitNet",  # the one that there was, for an older file
        max_batches=result["max_batches"],
        n_threads=result["threads"] or max(1, (os.cpu_count() or 1) // result["n_clients"]),
        gpu=result["device"] != "cpu",
    )
    # The runs that led to this model; an older file has none, and only the number of its last round.
    stages = result["stages"] or [{**result, "rounds": result["rounds"][-1]["round"]}]
    for name in ("batch_size", "learning_rate"):
        if len(values := {stage[name] for stage in stages}) > 1:
            raise UserError(
                f"runs/{folder.name} was resumed with another --{name} ({', '.join(map(str, sorted(values)))}): "
                "compare a run that had one"
            )
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    import data

    data.prepare(options)
    holdings = data.describe(options)
    kept = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    if kept != json.loads(json.dumps(dataclasses.asdict(holdings))):
        raise UserError(f"the images are not those of runs/{folder.name}: bring them back, or give their --data_root")
    if options.model_class not in model_names():
        raise UserError(f"runs/{folder.name} trained {options.model_class}, which model.py does not have any more")

    pooled = data.pooled(holdings.classes, options)
    sites = {site: data.SiteDataModule(site, holdings.classes, options) for site in holdings.sites}
    for module in (pooled, *sites.values()):
        module.prepare_data()
        module.setup("fit")
    epochs = sum(stage["rounds"] * stage["local_epochs"] for stage in stages)
    centralised, *alone = train([pooled, *sites.values()], ["", *sites], len(holdings.classes), epochs, options)

    console.print("Testing ...")
    images = {site: module.n_test for site, module in sites.items()}
    federated = {site: entry["accuracy"] for site, entry in result["test"]["sites"].items()}
    central = {site: test(centralised, module, options) for site, module in sites.items()}
    own = {site: test(model, module, options) for model, (site, module) in zip(alone, sites.items(), strict=True)}
    everywhere = {site: test(model, pooled, options) for model, site in zip(alone, sites, strict=True)}
    return {
        "version": 1,
        "run": folder.name,
        "model_class": options.model_class,
        "epochs": epochs,
        "seed": options.seed,
        "rows": {
            "centralised": {"all": weighted_mean(central, images), "sites": central},
            "federated": {"all": result["test"]["accuracy"], "sites": federated},
            "alone": {"all": weighted_mean(own, images), "sites": own},
            "alone_on_all": {"all": weighted_mean(everywhere, dict.fromkeys(sites, 1)), "sites": everywhere},
        },
    }


def train(modules: list[Any], sites: list[str], n_classes: int, epochs: int, options: argparse.Namespace) -> list[Any]:
    """A model for each data module, trained on its images alone. All begin with the federation's initial weights."""
    import torch
    from pytorch_lightning import seed_everything
    from pytorch_lightning.callbacks import LambdaCallback

    import model as models
    from trainer import make_trainer, training_seed

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    # As many threads as each of the sites had: the last bits depend on it, and small networks gain nothing from more.
    torch.set_num_threads(options.n_threads)
    steps = [min(len(module.train_dataloader()), options.max_batches or sys.maxsize) * epochs for module in modules]
    trained = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(steps))
        step_done = LambdaCallback(on_train_batch_end=lambda *_: bar.advance(task))
        for module, site, n_steps in zip(modules, sites, steps, strict=True):
            name = f"{site} alone" if site else "centralised"
            bar.update(task, description=name)
            started = time.monotonic()
            torch.manual_seed(options.seed)
            model = getattr(models, options.model_class)(num_classes=n_classes, learning_rate=options.learning_rate)
            seed_everything(training_seed(options.seed, site, 0), verbose=False)
            module.round, model.round, model.num_rounds = 0, 0, 1  # one `fit`, and so one optimizer, for all epochs
            try:
                make_trainer(options, epochs, [step_done]).fit(model, datamodule=module)
            except SystemExit:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            trained.append(model)
            took = f"{time.monotonic() - started:.0f} s"
            bar.console.print(f"{name}: trained on {module.n_train} images, epochs: {epochs}, steps: {n_steps}, {took}")
    return trained


def test(model: Any, module: Any, options: argparse.Namespace) -> float | None:
    """The accuracy on a data module's test images; None if it has none."""
    from trainer import make_trainer

    if not module.n_test:
        return None
    return make_trainer(options, 1).test(model, datamodule=module, verbose=False)[0].get("test_acc")


def show(comparison: dict[str, Any]) -> None:
    """Print the table of a compare.json, and what it says."""
    rows = comparison["rows"]
    sites = list(rows["federated"]["sites"])[: results.MAX_COLUMNS]
    table = results.new_table()
    for name in ("", "all sites", *sites):
        results.add_column(table, name, left=not name)
    for key, title in ROWS.items():
        table.add_row(title, *map(as_text, [rows[key]["all"], *(rows[key]["sites"][site] for site in sites)]))
    print(f"\nTest accuracy ({comparison['model_class']}, epochs: {comparison['epochs']})")
    console.print(table, crop=False)
    if len(sites) < len(rows["federated"]["sites"]):
        print("(not all fits here: compare.json has the rest)")
    central, federated, alone = (rows[key]["all"] for key in ("centralised", "federated", "alone"))
    if federated is not None:
        gains = [
            rows["federated"]["sites"][site] > value
            for site, value in rows["alone"]["sites"].items()
            if value is not None
        ]
        print(f"\nAgainst staying alone, on each site's own test images: {federated - alone:+.3f};", end=" ")
        print(f"{sum(gains)} of {len(gains)} sites gain")
        print(f"Against staying alone, on all sites' test images: {federated - rows['alone_on_all']['all']:+.3f}")
        print(f"Against pooling the images: {federated - central:+.3f}")


def plot(comparison: dict[str, Any], file: Path) -> None:
    """Draw the table: a group of bars for all sites, and one for each of them."""
    from matplotlib.figure import Figure  # without pyplot, no window is ever opened

    rows = comparison["rows"]
    groups = ["all", *list(rows["federated"]["sites"])]
    figure = Figure(figsize=(max(6, 2 + 1.2 * len(groups)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(ROWS)
    for i, (key, title) in enumerate(ROWS.items()):
        heights = [rows[key]["all"], *(rows[key]["sites"][site] for site in groups[1:])]
        places = [group + (i - (len(ROWS) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, [height or 0 for height in heights], width, label=title, color=COLOURS[i])
        axes.bar_label(bars, map(as_text, heights), fontsize=7)
    axes.set_xticks(range(len(groups)), ["all sites", *groups[1:]])
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{comparison['run']}: {comparison['model_class']}, epochs: {comparison['epochs']}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(exit_code("compare.py", main))
