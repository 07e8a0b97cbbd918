"""The lower bound: federated averaging as a plain PyTorch loop, without Lightning and without a server.

The same evaluations as the project: validate, train, test and predict at each site in each round, and a final
evaluation. One process per core, at most one per site; the sums of weights are in shared memory.
"""

import multiprocessing
import os
import sys
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it, which takes 1 s: do it once
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import common
from common import OPTIONS, Batches


def run_worker(rank: int, n_workers: int, barrier: Barrier, sums: torch.Tensor, tests: torch.Tensor) -> None:
    """Run a share of the sites, one after the other. If it fails, it aborts the others.

    Args:
        sums: float64 (workers, parameters + 1) in shared memory: the sum of weights times images, and the images.
        tests: float64 (workers, 2): correct and all test images.
    """
    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_workers))
        net = common.make_net()
        weights = parameters_to_vector(net.parameters()).detach()
        for round_ in range(OPTIONS.num_rounds):
            sums[rank] = 0
            for site in common.cohort(round_)[rank::n_workers]:
                vector_to_parameters(weights.clone(), net.parameters())
                common.evaluate(net, Batches(site, "val"))
                batches = Batches(site, "train", round_)
                common.train(net, batches)
                common.evaluate(net, Batches(site, "test"))
                with torch.inference_mode():
                    for x, _ in Batches(site, "test"):
                        net(x)
                sums[rank, :-1] += batches.n_images * parameters_to_vector(net.parameters()).detach().double()
                sums[rank, -1] += batches.n_images
            barrier.wait()
            total = sums.sum(0)
            weights = (total[:-1] / total[-1]).float()
            barrier.wait()  # no worker writes before all have read
        vector_to_parameters(weights, net.parameters())
        for site in common.cohort(None)[rank::n_workers]:
            common.evaluate(net, Batches(site, "val"))
            batches = Batches(site, "test")
            tests[rank] += torch.tensor([common.evaluate(net, batches), batches.n_images])
    except BaseException:
        barrier.abort()
        raise


def main() -> None:
    n_workers = min(os.cpu_count() or 1, common.COHORT)
    n_parameters = sum(each.numel() for each in common.make_net().parameters())
    sums = torch.zeros(n_workers, n_parameters + 1, dtype=torch.float64).share_memory_()
    tests = torch.zeros(n_workers, 2, dtype=torch.float64).share_memory_()
    # A forked process has all imports done, but forking is safe only on Linux.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    shared = (n_workers, context.Barrier(n_workers), sums, tests)
    workers = [context.Process(target=run_worker, args=(rank, *shared)) for rank in range(n_workers)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        sys.exit("plain.py: a worker failed: see above")
    right, n_images = tests.sum(0).tolist()
    common.report(right / n_images)


if __name__ == "__main__":
    main()
