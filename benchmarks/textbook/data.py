"""The textbook way to load images, replacing the project's data.py, which is next to this file as images.py.

As in torchvision's examples and NVFlare's hello-lightning: a dataset that transforms image by image, DataLoaders with
two workers, the training batch size for evaluation as well, and PyTorch's default number of threads.
"""

import os
from typing import Any

import images
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Arrays in memory, read one image at a time, like torchvision.datasets.CIFAR10."""

    def __init__(self, part: images.Images):
        self.pixels = part.images[part.rows].transpose(0, 2, 3, 1)
        self.labels = part.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return TRANSFORM(Image.fromarray(self.pixels[index])), int(self.labels[index])


class SiteDataModule(images.SiteDataModule):
    def setup(self, stage: str | None = None) -> None:
        torch.set_num_threads(os.cpu_count() or 1)  # PyTorch's default, which the project lowers
        super().setup(stage)

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any]:
        images, size = Images(self.parts[part]), self.options.batch_size
        return DataLoader(images, batch_size=size, shuffle=shuffle, num_workers=2)  # keywords: Lightning re-creates it

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")
