"""Run a program and measure it from outside: wall time, CPU time, and memory of its process tree."""

import contextlib
import os
import platform
import resource
import subprocess
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 1.0  # between two samples: each costs about 10 ms per process


class ProgramFailed(Exception):
    """The program did not end with exit code 0, or not in time."""


class Sampler(threading.Thread):
    """Samples a process tree until it is stopped.

    `peak_pss`: bytes. PSS divides shared pages between their processes; only Linux has it, elsewhere it is USS, memory
    that no other process shares. `cpu`: process ID -> its CPU seconds.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root, self.over, self.peak_pss = psutil.Process(pid), threading.Event(), 0
        self.cpu: dict[int, float] = {}
        self.seen: dict[int, psutil.Process] = {}

    def run(self) -> None:
        while not self.over.wait(SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        total = 0
        with contextlib.suppress(psutil.Error):  # a process has just ended: wait for the next sample
            for one in [self.root, *self.root.children(recursive=True)]:
                self.seen.setdefault(one.pid, one)
                memory, times = one.memory_full_info(), one.cpu_times()
                total += getattr(memory, "pss", memory.uss)
                self.cpu[one.pid] = times.user + times.system
            self.peak_pss = max(self.peak_pss, total)

    def stop(self) -> None:
        """Also ends the processes that the program has left behind."""
        self.over.set()
        self.join()
        # is_running() compares the start time: never another process with the same number
        left = [one for one in self.seen.values() if one != self.root and one.is_running()]
        for one in left:
            one.kill()
        psutil.wait_procs(left, timeout=10)


def run(command: list[str], folder: Path, environment: dict[str, str], log: Path, timeout: float) -> dict[str, float]:
    """Run a program to its end.

    Args:
        log: file for its output.
        timeout: seconds.

    Returns:
        `wall_s`; `cpu_s`, at least: short-lived processes that nobody waited for are missing; `peak_pss` in bytes, 0 if
        it was over before the first sample.

    Raises:
        ProgramFailed: the message has the end of its output.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        sampler = Sampler(process.pid)
        sampler.start()
        try:
            code: int | None = process.wait(timeout)
        except BaseException as error:
            sampler.sample()  # whom to end
            process.terminate()  # job.py, Ray and torchrun end their processes
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        finally:
            end = time.monotonic()
            sampler.stop()
    if code != 0:
        ending = f"not over after {timeout:.0f} s" if code is None else f"exit code {code}"
        raise ProgramFailed(f"{ending}, output in {log}:\n{log.read_text(errors='replace')[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": end - start, "cpu_s": max(waited, sum(sampler.cpu.values())), "peak_pss": sampler.peak_pss}


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
