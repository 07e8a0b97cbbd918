"""The model that the sites train together: `Net`, the network, and `LitNet`, its LightningModule.

Replace either, or both. What the rest of the project relies on:

- `LitNet(num_classes, learning_rate)` builds it, on the server too;
- `validation_step` logs `val_acc` and `val_loss`, `test_step` logs `test_acc` and `test_loss`;
- all that is learned is in its `state_dict()`: that is what travels.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from pytorch_lightning import LightningModule
from torchmetrics import Accuracy

MOMENTUM = 0.9
LOG_EVERY_N_STEPS = 50  # metrics at every step would cost more than many a layer of a small network

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

    def __init__(self, num_classes: int = 10, learning_rate: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.model = Net(num_classes)
        self.train_acc = Accuracy(task="multiclass", num_classes=num_classes)
        self.valid_acc = Accuracy(task="multiclass", num_classes=num_classes)
        # What is put here goes to the server with the weights; client.py adds the number of training images.
        self.__fl_meta__: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, labels = batch
        outputs = self(x)
        loss = criterion(outputs, labels)
        if batch_idx % LOG_EVERY_N_STEPS == 0:
            self.train_acc(outputs, labels)
            self.log("train_loss", loss)
            self.log("train_acc", self.train_acc, on_step=True, on_epoch=False)
        return loss

    def evaluate(self, batch, stage=None):
        x, labels = batch
        outputs = self(x)
        if stage:
            self.valid_acc(outputs, labels)
            self.log(f"{stage}_loss", criterion(outputs, labels), batch_size=len(labels))
            self.log(f"{stage}_acc", self.valid_acc, on_step=False, on_epoch=True, batch_size=len(labels))
        return outputs

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluate(batch)

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=MOMENTUM, fused=True)
