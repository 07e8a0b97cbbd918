"""Other data: scikit-learn's breast-cancer table. Replaces data.py in a test; see there for the contract."""

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from federation.site.partition import split

table = load_breast_cancer()
classes = [str(name) for name in table.target_names]
x_train, x_test, y_train, y_test = train_test_split(table.data, table.target, test_size=0.2, random_state=0)


class SiteDataModule(LightningDataModule):
    round = 0

    def __init__(self, site, options):
        super().__init__()
        self.site, self.options = site, options

    def setup(self, stage=None):
        self.indices = split(y_train, y_test, self.site, self.options)
        # By the site's own training rows: nothing of other sites, or of the rows that judge the model, enters training.
        own = x_train[self.indices["train"]]
        self.tables, self.counts = {}, {}
        for part, rows in self.indices.items():
            x, labels = (x_test[rows], y_test[rows]) if part == "test" else (x_train[rows], y_train[rows])
            x = torch.tensor((x - own.mean(axis=0)) / own.std(axis=0), dtype=torch.float32)
            self.tables[part] = TensorDataset(x, torch.tensor(labels))
            self.counts[part] = dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.options.seed + self.round)
        return DataLoader(self.tables["train"], batch_size=self.options.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self):
        return DataLoader(self.tables["val"], batch_size=self.options.batch_size)

    def test_dataloader(self):
        return DataLoader(self.tables["test"], batch_size=self.options.batch_size)

    predict_dataloader = test_dataloader
