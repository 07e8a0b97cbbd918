"""What this machine offers a simulation: cores, memory, and so the number of processes and threads."""

import contextlib
import os
import re
import sys
from pathlib import Path

import psutil
import torch

from settings import Options

FORKS = sys.platform == "linux"  # forking is unsafe elsewhere, and with CUDA anywhere
FORKED_MEMORY, STARTED_MEMORY = 0.5e9, 1.2e9  # bytes per host; measured with LitNet: 0.2 and 1.1 GB
HOSTS_ON_ONE_GPU = 2  # one computes while the other prepares; with several GPUs, each has one host


def n_hosts(options: Options) -> int:
    """How many processes run the sites: `--n_hosts`, or one per core as far as the memory allows; at most the sites."""
    if options.n_hosts:
        return options.n_hosts
    if options.env == "poc":  # it rehearses real sites, which have a process each
        return options.n_clients
    n_gpus = torch.cuda.device_count() if options.gpu else 0
    fitting = int(free_memory() / (FORKED_MEMORY if FORKS and not n_gpus else STARTED_MEMORY))
    useful = {0: cores(), 1: HOSTS_ON_ONE_GPU}.get(n_gpus, n_gpus)
    return max(1, min(options.n_clients, useful, fitting))


def n_threads(n_sites: int) -> int:
    """PyTorch's threads per process. They change the last bits, so they do not follow from the number of processes.

    If each of as many sites as there are cores used all of them, each would run three times slower.
    """
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // n_sites))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that are available: on the machine, or in the container or batch job (cgroup) that this process runs in.

    As container engines count, what the kernel can drop from its file cache is available. Source: the kernel's
    admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst.

    Args:
        cgroups: where the hierarchies of control groups are mounted.
        own: lists this process's group in each hierarchy.
    """
    free = float(psutil.virtual_memory().available)
    groups = own.read_text(encoding="utf-8").splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        root, names = cgroups, ("memory.max", "memory.current")
        if controllers == "memory":
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):  # in a container, the group can be mounted as the root itself
            with contextlib.suppress(OSError, ValueError):  # no limit: no such file, or "max"
                limit, used = (float((folder / name).read_text()) for name in names)
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE
                )
                free = min(free, limit - used + (float(cached[1]) if cached else 0))
    return free
