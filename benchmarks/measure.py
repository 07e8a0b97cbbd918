"""Run a program and measure it from outside: wall time, and the memory of its processes."""

import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 2.0  # between two memory samples: each costs the program about 10 ms per process


class ProgramFailed(Exception):
    """The program did not end with the expected exit code."""


def run(
    command: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    code: int = 0,
    sampler: Callable[[psutil.Process], None] | None = None,
) -> tuple[float, float]:
    """Run a program to its end. Returns (start, end) in seconds since 1970.

    Args:
        code: the expected exit code.
        sampler: called with its psutil.Process every SAMPLE_S seconds.

    Raises:
        ProgramFailed: a different exit code; the message has the end of its output.
    """
    start = time.time()
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        over = threading.Event()

        def watch() -> None:
            while sampler and not over.wait(SAMPLE_S):
                sampler(psutil.Process(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            output, _ = process.communicate()
            end = time.time()
        except BaseException:
            process.terminate()  # job.py terminates its process tree
            raise
        finally:
            over.set()
            watcher.join()
    if process.returncode != code:
        raise ProgramFailed(f"{' '.join(command)}\nexit code {process.returncode}:\n{output[-3000:]}")
    return start, end


class MemorySampler:
    """Samples the memory of a process tree. `samples`: (time, {process ID: USS in bytes}, total PSS in bytes).

    USS is memory that no other process shares; PSS divides shared pages between their processes. Only Linux has PSS;
    elsewhere USS is used instead.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, dict[int, int], int]] = []

    def __call__(self, process: psutil.Process) -> None:
        own, total = {}, 0
        try:
            for one in [process, *process.children(recursive=True)]:
                memory = one.memory_full_info()
                own[one.pid] = memory.uss
                total += getattr(memory, "pss", memory.uss)
        except psutil.Error:
            return  # a process has just ended: wait for the next sample
        self.samples.append((time.time(), own, total))


def idle_uss(python: str, code: str, folder: Path) -> int:
    """USS in bytes of a Python process after it has run `code`."""
    command = [python, "-c", f"{code}\nprint('ready', flush=True)\ninput()"]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()  # type: ignore[union-attr]  # a pipe
            return psutil.Process(process.pid).memory_full_info().uss
        finally:
            process.communicate(b"\n")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, system, and the versions of the packages that matter."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    packages = ("torch", "lightning", "nvflare", "torchmetrics", "numpy")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
