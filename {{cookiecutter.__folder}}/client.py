"""What one site does: receive the global model, validate it, train it on its own images, test it, predict.

NVFlare runs this file at every site. It is an ordinary Lightning script but for the lines marked (1) to (4).
"""

import argparse
from pathlib import Path
from typing import Any

import federation.site.quick_start  # noqa: F401 (Lightning starts sooner)

# isort: split
import nvflare.client as flare_client
import nvflare.client.lightning as flare  # (1) import NVFlare's Lightning client API
import torch
from nvflare.app_common.abstract.fl_model import MetaKey
from nvflare.app_opt.lightning.api import FLCallback
from pytorch_lightning import Callback, seed_everything

import model as models
from data import SiteDataModule
from federation.site.progress import Telemetry
from trainer import make_trainer, training_seed


def define_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One site of the federation. job.py says how it is called.")
    parser.add_argument("--model_class", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--num_rounds", type=int, required=True)
    parser.add_argument("--local_epochs", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--max_batches", type=int)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--partition", required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--shards_per_site", type=int, required=True)
    parser.add_argument("--n_clients", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tracking", required=True)
    return parser


def main() -> None:
    args = define_parser().parse_args()

    flare.init()
    site = flare.get_site_name()
    print(f"batch_size={args.batch_size}, site={site}")
    if args.gpu and not torch.cuda.is_available():
        print("WARNING: --gpu was asked for, but this site has no CUDA GPU: training on the CPU")
    classes = Path(__file__).with_name("classes.txt").read_text(encoding="utf-8").splitlines()

    nvflares: list[Callback] = []  # its callback is kept: it holds SCAFFOLD's control variate
    while flare.is_running():  # (3) one iteration per task; everything is created for that task
        input_model = flare.receive()  # (4) the global model; the patched trainer loads it by itself
        round_ = input_model.current_round or 0
        data = SiteDataModule(site, classes, args)
        data.prepare_data()
        data.setup("fit")
        model = getattr(models, args.model_class)(num_classes=len(classes), learning_rate=args.learning_rate)
        model.num_rounds = args.num_rounds
        data.round = model.round = round_
        seed_everything(training_seed(args.seed, site, round_), verbose=False)

        if flare_client.is_evaluate():  # the server asks what a global model is worth, nothing more
            print(f"[Site = {site}] --- evaluate global model ---")
            model.load_state_dict(input_model.params)
            evaluator = make_trainer(args, args.local_epochs)
            metrics: dict[str, float] = {"val_images": data.n_val, "test_images": data.n_test, **data.shared_counts()}
            for result in evaluator.validate(model, datamodule=data) + evaluator.test(model, datamodule=data):
                metrics.update(result)
            flare_client.send(flare_client.FLModel(metrics=metrics))
            print("--- wait for the server ---")
            continue

        # FedAvg weighs a site by its training images (McMahan et al. 2017); NVFlare's own default counts its steps.
        # Validation metrics are weighted by the number of validation images.
        counts = {MetaKey.NUM_STEPS_CURRENT_ROUND: data.n_train, "val_images": data.n_val}
        model.__fl_meta__ = {**getattr(model, "__fl_meta__", {}), **counts}
        trainer: Any = make_trainer(args, args.local_epochs, [Telemetry(args.tracking), *nvflares])
        flare.patch(trainer, restore_state=False)  # (2) patch the trainer
        nvflares = [callback for callback in trainer.callbacks if isinstance(callback, FLCallback)]

        print(f"\n[Current Round={input_model.current_round}, Site = {site}]\n")
        print("--- validate global model ---")
        trainer.validate(model, datamodule=data)
        print("--- train new model ---")
        trainer.fit(model, datamodule=data)
        print("--- test new model ---")
        trainer.test(model, datamodule=data)
        print("--- prediction with new model ---")
        trainer.predict(model, datamodule=data)
        print("--- wait for the server ---")


if __name__ == "__main__":
    main()
