"""Another model: two dense layers for tabular data. Replaces model.py in a test."""

import torch
import torch.nn as nn
from pytorch_lightning import LightningModule
from torchmetrics import Accuracy


class LitNet(LightningModule):
    def __init__(self, num_classes, options):
        super().__init__()
        self.options = options
        self.layers = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, num_classes))
        self.accuracy = Accuracy(task="multiclass", num_classes=num_classes)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, labels = batch
        return nn.functional.cross_entropy(self(x), labels)

    def score(self, batch, stage):
        x, labels = batch
        logits = self(x)
        self.accuracy(logits, labels)
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, labels))
        self.log(f"{stage}_acc", self.accuracy, on_step=False, on_epoch=True)
        return logits

    def validation_step(self, batch, batch_idx):
        self.score(batch, "val")

    def test_step(self, batch, batch_idx):
        return self.score(batch, "test")  # from these, the metrics by class are computed

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.options.learning_rate)
