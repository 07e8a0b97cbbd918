"""Other data: scikit-learn's breast-cancer table. Takes the place of data.py in a test; see there for the contract."""

from dataclasses import dataclass

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_breast_cancer
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Holdings:
    classes: list
    sites: dict
    counts: dict


def _table():
    table = load_breast_cancer()
    return table.data.astype(np.float32), table.target.astype(np.int64), [str(name) for name in table.target_names]


def prepare(options):
    pass


def _sites(options):
    order = np.random.RandomState(options.seed).permutation(len(_table()[1]))
    parts = np.array_split(order, options.n_clients)
    cut = [(len(part) * 6 // 10, len(part) * 8 // 10) for part in parts]
    return {
        f"site-{i + 1}": {"train": part[:a].tolist(), "val": part[a:b].tolist(), "test": part[b:].tolist()}
        for i, (part, (a, b)) in enumerate(zip(parts, cut, strict=True))
    }


def describe(options):
    _, labels, classes = _table()
    sites = _sites(options)
    counts = {
        site: dict(zip(classes, np.bincount(labels[own["train"] + own["val"]], minlength=2).tolist(), strict=True))
        for site, own in sites.items()
    }
    return Holdings(classes, sites, counts)


class SiteDataModule(LightningDataModule):
    def __init__(self, site, classes, options):
        super().__init__()
        self.options = options
        self.round = 0
        sites = _sites(options)
        own = [sites[site]] if site else list(sites.values())
        self.rows = {name: sum((part[name] for part in own), []) for name in ("train", "val", "test")}
        # Of a site's own training rows: nothing of other sites, or of the rows that judge the model, enters training.
        seen = _table()[0][self.rows["train"]]
        self.mean, self.std = seen.mean(axis=0), seen.std(axis=0)

    def loader(self, name, shuffle=False):
        x, labels, _ = _table()
        rows = self.rows[name]
        table = TensorDataset(torch.from_numpy((x[rows] - self.mean) / self.std), torch.from_numpy(labels[rows]))
        generator = torch.Generator().manual_seed(self.options.seed + self.round)
        return DataLoader(table, batch_size=self.options.batch_size, shuffle=shuffle, generator=generator)

    def shared_counts(self):
        return {}

    n_train = property(lambda self: len(self.rows["train"]))
    n_val = property(lambda self: len(self.rows["val"]))
    n_test = property(lambda self: len(self.rows["test"]))

    def train_dataloader(self):
        return self.loader("train", shuffle=True)

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")

    predict_dataloader = test_dataloader


def known_classes(options):
    return _table()[2]


def pooled(classes, options):
    return SiteDataModule(None, classes, options)
