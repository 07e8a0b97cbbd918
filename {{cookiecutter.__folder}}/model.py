"""The models that the sites can train together: `LitNet`, a small one and the default, and `LitResNet`, a larger one.

Replace them, or add your own: `--model NAME` takes any LightningModule that is defined here. What the rest of the
project relies on:

- `NAME(num_classes, options)` builds it, on the server too; `options` are those of settings.py;
- `validation_step` logs `val_acc` and `val_loss`, `test_step` logs `test_acc` and `test_loss`;
- all that is learned is in its `state_dict()`: that is what travels. Each round makes the model anew.

What a model may use, or not care about: its attribute `round` (from 0) is set, for what changes over the whole run of
`options.total_rounds`, and before each `fit` torch's random numbers are seeded, for dropout and augmentation.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torchmetrics import Accuracy

from settings import Options

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # of LitResNet
LOG_EVERY_N_STEPS = 50  # metrics at every step would cost more than many a layer of a small network

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels

criterion = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Two convolutions and three dense layers, for small colour images.

    Takes a float tensor (batch, 3, S, S), S of at least 16, and returns the logits (batch, num_classes).
    Laid out for S = 32, as in PyTorch's tutorial "Training a Classifier" and NVFlare's hello-lightning;
    any other size is pooled to the grid of 5 x 5 that the dense layers expect.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        if x.shape[-1] != 5:
            x = F.adaptive_avg_pool2d(x, 5)
        x = torch.flatten(x, 1)  # flatten all dimensions except batch
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class LitNet(LightningModule):
    """`Net` with its loss, metrics and optimizer. A batch is (images, labels): float (B, 3, S, S), int64 (B,)."""

    def __init__(self, num_classes: int, options: Options):
        super().__init__()
        self.options = options
        self.model = Net(num_classes)
        self.train_acc = Accuracy(task="multiclass", num_classes=num_classes)
        self.valid_acc = Accuracy(task="multiclass", num_classes=num_classes)
        # What is put here goes to the server with the weights; client.py adds the number of training images.
        self.__fl_meta__: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        x, labels = batch
        outputs = self(x)
        loss = criterion(outputs, labels)
        if batch_idx % LOG_EVERY_N_STEPS == 0:
            self.train_acc(outputs, labels)
            self.log("train_loss", loss)
            self.log("train_acc", self.train_acc, on_step=True, on_epoch=False)
        return loss

    def evaluate(self, batch: Batch, stage: str | None = None) -> torch.Tensor:
        x, labels = batch
        outputs = self(x)
        if stage:
            self.valid_acc(outputs, labels)
            self.log(f"{stage}_loss", criterion(outputs, labels), batch_size=len(labels))
            self.log(f"{stage}_acc", self.valid_acc, on_step=False, on_epoch=True, batch_size=len(labels))
        return outputs

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.evaluate(batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optim.SGD(self.parameters(), lr=self.options.learning_rate, momentum=MOMENTUM, fused=True)


class LitResNet(LitNet):
    """ResNet-18 (He et al. 2016) for small images, with the steps and metrics of `LitNet`; images of any size.

    - A 3 x 3 convolution without pooling comes first, as in that paper's network for CIFAR-10, so that images of
      32 x 32 are not shrunk before the first block.
    - GroupNorm (Wu & He 2018, 32 groups) in place of BatchNorm, whose statistics of a batch differ between sites that
      hold different classes (Hsieh et al. 2020, "The Non-IID Data Quagmire of Decentralized Machine Learning").
    - SGD with momentum and weight decay. The learning rate falls along a half cosine (Loshchilov & Hutter 2017,
      without restarts) over all rounds, step by step.
    - Training images are padded, cropped and flipped, a whole batch at once. A picture that means something else in
      the mirror, such as a letter, needs `augment` without the flip.
    """

    def __init__(self, num_classes: int, options: Options):
        super().__init__(num_classes, options)
        from torchvision.models import resnet18  # here, since the import takes seconds that LitNet does not need

        self.model = resnet18(num_classes=num_classes, norm_layer=lambda channels: nn.GroupNorm(32, channels))
        self.model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.model.maxpool = nn.Identity()
        self.round = 0

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        x, labels = batch
        return (augment(x) if self.trainer.training else x), labels

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = optim.SGD(
            self.parameters(),
            lr=self.options.learning_rate,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        steps = self.trainer.estimated_stepping_batches  # of this round

        def share(step: int) -> float:
            """The learning rate as a share of the first one, after so many steps of this round."""
            return 0.5 * (1 + math.cos(math.pi * (self.round + step / steps) / (self.options.total_rounds or 1)))

        schedule = optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def augment(x: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Shift each image by up to `padding` pixels, its border mirrored, and flip every other one, at random.

    Takes and returns a float tensor (B, C, S, S). The random numbers are drawn on the CPU from torch's own generator:
    one seed gives the same images on every device.
    """
    n_images, _, _, side = x.shape
    padded = F.pad(x, (padding,) * 4, mode="reflect")
    down, right = torch.randint(0, 2 * padding + 1, (2, n_images, 1))
    flipped = torch.rand(n_images, 1) < 0.5
    along = torch.arange(side)
    rows = (down + along).to(x.device)  # (B, S): which rows of the padded image are kept
    columns = (right + torch.where(flipped, along.flip(0), along)).to(x.device)
    images = torch.arange(n_images, device=x.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
