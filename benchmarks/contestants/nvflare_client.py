"""One site of nvflare_job.py: the loop and the Trainer of NVFlare's hello-lightning, one process per site.

With "as_published" in the work, also its way to load images: transformed one by one, in DataLoaders, with the training
batch size for evaluation and PyTorch's default number of threads. Otherwise, batches in memory as everyone else.
"""

import os
from typing import Any

import nvflare.client.lightning as flare
import torch
from PIL import Image
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common import N_SITES, OPTIONS, WORK, Batches, arrays
from model import LitNet

TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])


class PeerNet(LitNet):
    """LitNet as NVFlare's recipe can rebuild it: without arguments."""

    def __init__(self) -> None:
        super().__init__(len(OPTIONS.classes), OPTIONS)


class Images(Dataset[tuple[torch.Tensor, int]]):
    """One image at a time, like torchvision.datasets.CIFAR10."""

    def __init__(self, batches: Batches):
        images, labels = arrays(batches.part)
        self.pixels, self.labels = images[batches.rows].transpose(0, 2, 3, 1), labels[batches.rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return TRANSFORM(Image.fromarray(self.pixels[index])), int(self.labels[index])


def load(site: int, part: str, round_: int) -> Any:
    batches = Batches(site, part, round_)
    return DataLoader(Images(batches), batch_size=OPTIONS.batch_size) if WORK.get("as_published") else batches


def main() -> None:
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    if not WORK.get("as_published"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // N_SITES))
    model, trainer = PeerNet(), Trainer(max_epochs=1, accelerator="cpu", devices=1)
    flare.patch(trainer)
    while flare.is_running():
        round_ = flare.receive().current_round
        trainer.validate(model, load(site, "val", round_))
        trainer.fit(model, load(site, "train", round_))
        trainer.test(ckpt_path="best", dataloaders=load(site, "test", round_))
        trainer.predict(ckpt_path="best", dataloaders=load(site, "test", round_))


if __name__ == "__main__":
    main()
