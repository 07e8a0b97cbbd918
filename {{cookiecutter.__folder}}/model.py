"""The models: `LitNet`, the small default, and `LitResNet`, a ResNet-18.

Replace them or add your own: `--model NAME` accepts any LightningModule defined here. The rest of the project relies on
this:

- `NAME(num_classes, options)` builds it, also on the server; `options` are those of settings.py.
- `validation_step` logs `val_acc` and `val_loss`; `test_step` logs `test_acc` and `test_loss`, and returns the logits
  (B, num_classes), from which the report has sensitivity, AUROC and the like.
- Everything learned is in `state_dict()`, which is what travels: each round creates a new model.

For schedules over the whole run, the attribute `round` (from 0) is set, and `options.total_rounds` is known. Random
numbers, as for dropout and augmentation, are seeded before each `fit`.
"""

import math
from types import MethodType
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
LOG_EVERY_N_STEPS = 50  # metrics at every step cost more than a layer of a small network

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels

criterion = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Two convolutions and three dense layers, for small color images.

    Maps a float tensor (batch, 3, S, S), S >= 16, to logits (batch, num_classes). Designed for S = 32, as in PyTorch's
    tutorial "Training a Classifier" and NVFlare's hello-lightning; other sizes are pooled to the 5 x 5 grid that the
    dense layers expect.
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
        # Sent to the server with the weights; client.py adds the numbers of images.
        self.__fl_meta__: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        x, labels = batch
        outputs = self(x)
        loss = criterion(outputs, labels)
        if batch_idx % LOG_EVERY_N_STEPS == 0 and len(labels):
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

    def test_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.evaluate(batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optim.SGD(self.parameters(), lr=self.options.learning_rate, momentum=MOMENTUM, fused=True)


class LitResNet(LitNet):
    """ResNet-18 (He et al. 2016) for images of any size, with the steps and metrics of `LitNet`.

    - The first layer is a 3 x 3 convolution without pooling, as in the paper's network for CIFAR-10, so that 32 x 32
      images are not downsampled before the first block.
    - GroupNorm (Wu & He 2018, 32 groups) replaces BatchNorm, whose batch statistics differ between sites with different
      classes (Hsieh et al. 2020, "The Non-IID Data Quagmire of Decentralized Machine Learning").
    - SGD with momentum and weight decay; the learning rate follows a half cosine (Loshchilov & Hutter 2017, without
      restarts) over all rounds, updated at each step.
    - Training batches are padded, cropped, and flipped. If mirroring changes the meaning of an image, as with letters,
      remove the flip from `augment`.
    """

    def __init__(self, num_classes: int, options: Options):
        super().__init__(num_classes, options)
        # Here, because the import takes seconds and LitNet does not need it.
        from torchvision.models.resnet import BasicBlock, resnet18

        self.model = resnet18(num_classes=num_classes, norm_layer=lambda channels: nn.GroupNorm(32, channels))
        self.model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.model.maxpool = nn.Identity()
        for module in self.model.modules():  # no in-place operations, which --dp_epsilon does not allow
            if isinstance(module, nn.ReLU):
                module.inplace = False
            elif isinstance(module, BasicBlock):
                module.forward = MethodType(residual, module)
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
            """Factor on the initial learning rate after `step` steps of this round."""
            return 0.5 * (1 + math.cos(math.pi * (self.round + step / steps) / (self.options.total_rounds or 1)))

        schedule = optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def residual(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of torchvision's BasicBlock, without its in-place addition."""
    out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def augment(x: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Randomly shift each image by up to `padding` pixels, with reflected borders, and flip half of them.

    Maps a float tensor (B, C, S, S) to one of the same shape. Random numbers come from torch's CPU generator, so a seed
    gives the same images on every device.
    """
    n_images, _, _, side = x.shape
    padded = F.pad(x, (padding,) * 4, mode="reflect")
    down, right = torch.randint(0, 2 * padding + 1, (2, n_images, 1))
    flipped = torch.rand(n_images, 1) < 0.5
    along = torch.arange(side)
    rows = (down + along).to(x.device)  # (B, S): rows of the padded image to keep
    columns = (right + torch.where(flipped, along.flip(0), along)).to(x.device)
    images = torch.arange(n_images, device=x.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
