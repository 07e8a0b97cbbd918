"""What one site does: receive the global model, validate it, train it on the site's images, test it, predict.

Apart from the lines marked (1) to (4), this is an ordinary Lightning script. federation/site/host.py calls `main` once
per task of a site. It also runs under NVFlare's own executor, which calls it once for all tasks.
"""

import os
from typing import Any

import federation.site.quick_start  # noqa: F401 (Lightning starts sooner)

# isort: split
import nvflare.client as flare_client
import nvflare.client.lightning as flare  # (1) import NVFlare's Lightning client API
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from pytorch_lightning import Callback, LightningModule, seed_everything

from data import SiteDataModule
from federation.protocol import HOLDS, LEDGER, PROGRESS, SKIPPED, TEST_IMAGES, VAL_IMAGES
from federation.site.budget import private
from federation.site.leak import membership
from federation.site.progress import Progress
from federation.site.scores import ScoreCounts
from settings import Options
from trainer import make_model, make_trainer, n_images, training_seed

FEW_SITES = 8  # for someone to look at each one
SHARE_VARIABLE = "FL_SHARE_COUNTS"  # a site sets it to 1 to share numbers of images per class


def main() -> None:
    flare.init()
    site, options = flare.get_site_name(), Options.of_job()
    print(f"batch_size={options.batch_size}, site={site}")
    while flare.is_running():  # (3) one iteration per task; everything is created for that task
        input_model = flare.receive()  # (4) the global model; the patched trainer loads it by itself
        round_ = input_model.current_round or 0
        data, model = open_data(site, options, round_), make_model(options, round_)
        seed_everything(training_seed(options.seed, site, round_), verbose=False)
        if flare_client.is_evaluate():
            flare_client.send(evaluate(input_model, model, data, options))
            continue
        model.__fl_meta__ = {**getattr(model, "__fl_meta__", {}), **weights(data)}
        trainer = make_trainer(options, options.local_epochs, callbacks(site, options, data, model))
        flare.patch(trainer, restore_state=False)  # (2) patch the trainer
        print(f"\n[Current Round={input_model.current_round}, Site = {site}]\n\n--- validate global model ---")
        trainer.validate(model, datamodule=data, verbose=is_watched(options))
        print("--- train new model ---")
        trainer.fit(model, datamodule=data)
        if is_watched(options):
            print("--- test new model ---")
            trainer.test(model, datamodule=data)
            print("--- prediction with new model ---")
            trainer.predict(model, datamodule=data)


def is_watched(options: Options) -> bool:
    """Whether somebody may follow a single site: a real one, one of a few, or one that sends its metrics to a tracker.

    The others skip the test of their own new model, which only their log and a tracker would show.
    """
    return not options.simulated or options.n_clients <= FEW_SITES or options.tracking != "none"


def callbacks(site: str, options: Options, data: SiteDataModule, model: LightningModule) -> list[Callback]:
    """The callbacks of a site's training: they announce its progress and, with `--dp_epsilon`, add DP-SGD."""
    config = flare.get_config()
    return [Progress(options.tracking, config.get(PROGRESS)), *private(site, options, data, model, config.get(LEDGER))]


def open_data(site: str, options: Options, round_: int) -> SiteDataModule:
    """The site's data, ready to use; shuffled differently in each round."""
    data = SiteDataModule(site, options)
    data.prepare_data()
    data.setup("fit")
    data.round = round_
    return data


def evaluate(received: FLModel, model: LightningModule, data: SiteDataModule, options: Options) -> FLModel:
    """Answer an evaluation task: metrics of the received model on the site's validation and test images.

    Includes the numbers of images, by which the server weights the metrics, and of unreadable ones if the site skips
    them. If the site shares them, also the numbers per class; then, and in every simulation, counts of how the test
    images were classified. With `--leak_test`, two numbers on membership inference.
    """
    print("--- evaluate global model ---")
    model.load_state_dict(received.params)
    scores = ScoreCounts(len(options.classes))
    evaluator = make_trainer(options, 1, [Progress("none", flare.get_config().get(PROGRESS), evaluating=True), scores])
    metrics: dict[str, Any] = {VAL_IMAGES: n_images(data, "val"), TEST_IMAGES: n_images(data, "test")}
    if skipped := getattr(data, "skipped", 0):
        metrics[SKIPPED] = skipped
    is_shared = os.environ.get(SHARE_VARIABLE) == "1"
    if is_shared:
        train, val = data.counts["train"], data.counts["val"]
        metrics |= {f"{HOLDS}{name}": train.get(name, 0) + val.get(name, 0) for name in options.classes}
    if options.leak_test:
        metrics |= membership(model, data, options.seed)
    for evaluate_on in (evaluator.validate, evaluator.test):
        metrics.update(*evaluate_on(model, datamodule=data, verbose=is_watched(options)))
    if is_shared or options.simulated:
        metrics |= scores.counts()
    return FLModel(metrics=metrics)


def weights(data: SiteDataModule) -> dict[str, int]:
    """The site's weight in the server's means: training images for its model, validation images for its metrics.

    As in McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data". NVFlare's
    default is the number of training steps.
    """
    return {MetaKey.NUM_STEPS_CURRENT_ROUND: n_images(data, "train"), VAL_IMAGES: n_images(data, "val")}


if __name__ == "__main__":
    main()
