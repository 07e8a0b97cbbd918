"""What all contestants share: the work, the network, images in memory, the partition, batches and evaluation.

peers.py passes the work as JSON in BENCHMARK_WORK, and has a rendered project in PYTHONPATH.
"""

import json
import os
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from federation.site.partition import split
from settings import Options

EVALUATION_BATCH, MOMENTUM = 500, 0.9  # as in the project

WORK = json.loads(os.environ["BENCHMARK_WORK"])
OPTIONS = Options.of(WORK["options"])  # of the project's job.py
STORE = Path(WORK["store"])  # the images, converted by the project
OPTIONS.classes = (STORE / "classes.txt").read_text(encoding="utf-8").splitlines()
N_SITES = OPTIONS.n_clients
COHORT, EVALUATORS = OPTIONS.sites_per_round or N_SITES, OPTIONS.evaluate_sites or N_SITES

Batch = tuple[torch.Tensor, torch.Tensor]  # float32 (B, 3, S, S) in [-1, 1], channels last, and int64 (B,)


@cache
def arrays(part: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of `train` or `test`, uint8 (N, 3, S, S), and their labels; `val` is a share of `train`."""
    name = "test" if part == "test" else "train"
    return np.asarray(np.load(STORE / f"{name}-images.npy", mmap_mode="r")), np.load(STORE / f"{name}-labels.npy")


@cache
def rows_of(site: int) -> dict[str, np.ndarray]:
    """The rows of a site's images, from 0, of `train`, `val` and `test`, as in the project."""
    return split(arrays("train")[1], arrays("test")[1], f"site-{site + 1}", OPTIONS)


class Batches:
    """A site's images of `train`, `val` or `test`, a whole batch at a time. Shuffles `train`, by the round."""

    def __init__(self, site: int, part: str, round_: int = 0):
        rows = rows_of(site)[part]
        if part == "train":
            rows = np.random.default_rng((OPTIONS.seed, site, round_)).permutation(rows)
        self.part, self.rows = part, rows
        self.size = OPTIONS.batch_size if part == "train" else EVALUATION_BATCH

    @property
    def n_images(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        images, labels = arrays(self.part)
        for first in range(0, len(self.rows), self.size):
            chosen = self.rows[first : first + self.size]
            pixels = torch.from_numpy(images[chosen]).to(torch.float32, memory_format=torch.channels_last)
            yield pixels.mul_(1 / 127.5).sub_(1), torch.from_numpy(labels[chosen])


def cohort(round_: int | None) -> list[int]:
    """The sites that train in a round, or evaluate after the last (None)."""
    size = EVALUATORS if round_ is None else COHORT
    key = (OPTIONS.seed, OPTIONS.num_rounds if round_ is None else round_)
    return sorted(np.random.default_rng(key).permutation(N_SITES)[:size].tolist())


@cache
def net_class() -> type[nn.Module]:
    """The project's Net, without Lightning, which model.py imports for LitNet."""
    lightning = "pytorch_lightning"
    absent = [lightning, f"{lightning}.utilities", f"{lightning}.utilities.types", "torchmetrics"]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda attribute: nn.Module  # type: ignore[method-assign]
    from model import Net

    for name in absent:
        del sys.modules[name]
    return Net


def make_net() -> nn.Module:
    torch.manual_seed(OPTIONS.seed)
    return net_class()(len(OPTIONS.classes))


def make_optimizer(parameters: Iterator[nn.Parameter], lr: float = OPTIONS.learning_rate) -> torch.optim.Optimizer:
    """As in LitNet.configure_optimizers."""
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, fused=True)


def train(net: nn.Module, batches: Batches) -> None:
    optimizer, criterion = make_optimizer(net.parameters()), nn.CrossEntropyLoss()
    for x, y in batches:
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()


@torch.inference_mode()
def evaluate(net: nn.Module, batches: Batches) -> float:
    """The number of images that are classified correctly; also computes the loss, as the others do."""
    right, loss = 0, 0.0
    for x, y in batches:
        outputs = net(x)
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        right += int((outputs.argmax(1) == y).sum())
    return right


def report(accuracy: float) -> None:
    """Tell peers.py the test accuracy of the final model."""
    Path(WORK["report"]).write_text(json.dumps({"accuracy": accuracy}), encoding="utf-8")
