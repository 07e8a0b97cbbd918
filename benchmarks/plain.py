"""The lower bound: federated averaging as a plain PyTorch loop, without Lightning or NVFlare. speed.py runs it.

The same network, images, steps and evaluations as the project's client.py, with one process per client and the cores
divided between them. The clients' weights are in shared memory, so averaging costs only a barrier. Whatever else a
federation takes is overhead.
"""

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Iterable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it, which takes 1 s: keep that out of `fit`, and do it once
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

EVALUATION_BATCH, VALIDATION_SHARE, MOMENTUM = 500, 0.2, 0.9  # as in the project

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels


def import_project(folder: str) -> tuple[type[nn.Module], types.ModuleType]:
    """The project's network and partition module, without Lightning, which model.py imports for LitNet."""
    lightning = "pytorch_lightning"
    absent = (lightning, f"{lightning}.utilities", f"{lightning}.utilities.types", "torchmetrics")
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda attribute: nn.Module  # type: ignore[method-assign]
    sys.path.insert(0, folder)
    from federation.site import partition
    from model import Net

    for name in absent:
        del sys.modules[name]
    return Net, partition


def batches(images: np.ndarray, labels: np.ndarray, order: np.ndarray, size: int) -> Iterator[Batch]:
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        pixels = torch.from_numpy(images[chosen]).to(torch.float32, memory_format=torch.channels_last)
        yield pixels.mul_(1 / 127.5).sub_(1), torch.from_numpy(labels[chosen])


@torch.inference_mode()
def evaluate(net: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    """Accuracy, and mean loss over the images."""
    right, n_images, loss = 0, 0, 0.0
    for x, y in loader:
        outputs = net(x)
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        right += int((outputs.argmax(1) == y).sum())
        n_images += len(y)
    return {"accuracy": right / n_images, "loss": loss / n_images, "images": n_images}


def train(net: nn.Module, loader: Iterable[Batch], learning_rate: float) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=MOMENTUM, fused=True)
    criterion = nn.CrossEntropyLoss()
    for x, y in loader:
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()


def client(site: int, reports: "Queue[Any]", barrier: Barrier, *arguments: Any) -> None:
    """Run a site. If it fails, it aborts the others, which ends the whole program."""
    try:
        reports.put((site, *run_site(site, barrier, *arguments)))
    except BaseException:
        barrier.abort()
        raise


def run_site(
    site: int,
    barrier: Barrier,
    parts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    options: argparse.Namespace,
    net: nn.Module,
    weights: torch.Tensor,
    shares: torch.Tensor,
) -> tuple[list[tuple[float, str]], dict[str, float]]:
    """Run all rounds of a site. Returns its phases and the test of the final model.

    Args:
        parts: (images, labels, indices) of `train`, `val` and `test`.
        weights: (clients, parameters) in shared memory: each client writes its own row and reads all.
        shares: (clients,), each client's share of all training images.
    """
    torch.set_num_threads(options.threads)
    net = copy.deepcopy(net)  # unless processes are forked, its tensors are shared
    phases = []

    def begin(name: str) -> None:
        phases.append((time.time(), name))

    def evaluation(part: str) -> Iterator[Batch]:
        return batches(*parts[part], EVALUATION_BATCH)

    for number in range(options.rounds):
        begin("validate")
        evaluate(net, evaluation("val"))
        begin("train")
        images, labels, indices = parts["train"]
        order = np.random.default_rng((options.seed, site, number)).permutation(indices)
        train(net, batches(images, labels, order, options.batch_size), options.learning_rate)
        begin("test")
        evaluate(net, evaluation("test"))
        begin("predict")
        with torch.inference_mode():
            for x, _ in evaluation("test"):
                net(x)
        begin("predicted")
        with torch.no_grad():
            weights[site] = parameters_to_vector(net.parameters())
            barrier.wait()
            mean = shares @ weights
            barrier.wait()  # no client writes before all have read
            vector_to_parameters(mean, net.parameters())
    begin("evaluate")
    evaluate(net, evaluation("val"))
    return phases, evaluate(net, evaluation("test"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", required=True, help="folder of a rendered project")
    parser.add_argument("--store", required=True, type=Path, help="its converted images")
    parser.add_argument("--output", required=True, type=Path, help="file for phases and accuracy")
    for name in ("n_clients", "rounds", "batch_size", "seed"):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--learning_rate", required=True, type=float)
    parser.add_argument("--partition", required=True)
    options = parser.parse_args()
    n_clients = options.n_clients
    options.threads = max(1, (os.cpu_count() or 1) // n_clients)

    Net, partition = import_project(options.project)
    split = {}
    for name in ("train", "test"):
        images = np.asarray(np.load(options.store / f"{name}-images.npy", mmap_mode="r"))
        labels = np.load(options.store / f"{name}-labels.npy")
        split[name] = images, labels, partition.partition(labels, n_clients, options.partition, options.seed)
    parts = []
    for own, tested in zip(split["train"][2], split["test"][2], strict=True):
        kept, held_out = partition.split_off(own, VALIDATION_SHARE, options.seed)
        train_data, test_data = split["train"][:2], split["test"][:2]
        parts.append({"train": (*train_data, kept), "val": (*train_data, held_out), "test": (*test_data, tested)})

    torch.manual_seed(options.seed)
    net = Net(len((options.store / "classes.txt").read_text(encoding="utf-8").splitlines()))
    weights = parameters_to_vector(net.parameters()).detach().repeat(n_clients, 1).share_memory_()
    n_images = torch.tensor([len(part["train"][2]) for part in parts], dtype=torch.float32)
    # A forked process has all imports done, but forking is safe only on Linux.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    barrier, reports = context.Barrier(n_clients), context.Queue()
    shared = (options, net, weights, n_images / n_images.sum())
    sites = [context.Process(target=client, args=(i, reports, barrier, parts[i], *shared)) for i in range(n_clients)]
    for process in sites:
        process.start()
    for process in sites:
        process.join()  # before reading the reports: they are small enough to wait in the pipe
    if any(process.exitcode for process in sites):
        sys.exit("plain.py: a client failed: see above")
    results = sorted(reports.get() for _ in sites)
    tests = [test for _, _, test in results]
    tested = sum(test["images"] for test in tests)
    report = {"phases": [phases for _, phases, _ in results]}
    for name in ("accuracy", "loss"):
        report[name] = sum(test[name] * test["images"] for test in tests) / tested
    options.output.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
