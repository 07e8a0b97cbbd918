"""Where a federation runs: NVFlare's simulator, on this machine. Start it, follow it, stop it, bring home."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

PROJECT = Path(__file__).resolve().parent.parent
CLIENT_MEMORY = 1.2e9  # bytes for one client process: 0.9 to 1.1 GB were seen with a CUDA build of PyTorch
POLL_S = 0.2
SERVER = Path("server", "simulate_job")  # within the workspace


class RunFailed(Exception):
    """The federation did not end well. The message says which site and why, the root cause first."""


def simultaneous_clients(n_clients: int) -> int:
    """How many client processes fit into the memory that is free; the others wait for their turn."""
    return max(1, min(n_clients, int(psutil.virtual_memory().available / CLIENT_MEMORY)))


def threads_per_client(n_simultaneous: int) -> int:
    """The machine's cores shared out. Uncapped, every client would take all of them and run three times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // n_simultaneous)


def simulate(job: Path, run: Path, options, follow: Callable[[str, list[dict]], None]) -> None:
    """Run an exported job in NVFlare's simulator, with its output in `run/log.txt`.

    Args:
        job: the folder of the exported job.
        run: the run's folder; its path has no white space.
        options: the command line's; `n_clients` and `gpu` are used.
        follow: called a few times a second with what the log has got since, and the records of all rounds so far.

    Raises:
        RunFailed: a site failed, died or did not report.
        KeyboardInterrupt: passed on, once no process is left.
    """
    workspace, log = run / "workspace", run / "log.txt"
    threads = simultaneous_clients(options.n_clients)
    os.environ["OMP_NUM_THREADS"] = str(threads_per_client(threads))  # the clients inherit it
    gpus = None
    if options.gpu and torch.cuda.is_available():
        gpus = ",".join(str(i) for i in range(min(torch.cuda.device_count(), options.n_clients)))
    # A fork starts with all imports done, but only Linux forks safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    simulator = context.Process(
        target=_run_simulator, args=(str(job), str(workspace), str(log), options.n_clients, threads, gpus)
    )
    log.touch()
    try:
        simulator.start()
        with log.open(encoding="utf-8", errors="replace") as lines:
            while True:
                running = simulator.is_alive()
                follow(lines.read(), read_rounds(workspace))
                if died := _dead_client(workspace):
                    raise RunFailed(root_cause(workspace) or f"{died} died: its process is gone")
                if not running:
                    break
                simulator.join(POLL_S)
    finally:
        end_family()
    if simulator.exitcode != 0:
        raise RunFailed(root_cause(workspace) or f"the simulator ended with code {simulator.exitcode}")


def _run_simulator(job: str, workspace: str, log: str, n_clients: int, threads: int, gpus: str | None) -> None:
    """The body of the simulator's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # job.py ends the whole family
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)
    # NVFlare hands sys.path on to the clients: without the project's folder they see the job's files alone, as real
    # sites do.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != PROJECT]
    simulator = SimulatorRunner(
        job_folder=job,
        workspace=workspace,
        n_clients=n_clients,
        threads=threads,
        gpu=gpus,
        log_config="concise",
        max_clients=n_clients,
    )
    sys.exit(simulator.run())


def end_family(home: Path | None = None) -> None:
    """End every process that descends from this one, or was started with a path in the folder `home`.

    An impatient second Ctrl-C must not interrupt that.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    family = psutil.Process().children(recursive=True)
    for process in psutil.process_iter(["cmdline"]) if home else ():  # its parent may have died before
        if process not in family and any(word.startswith(f"{home}/") for word in process.info["cmdline"] or ()):
            family.append(process)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(family, timeout=3)[1]:
        process.kill()
    psutil.wait_procs(family, timeout=3)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _dead_client(workspace: Path) -> str | None:
    """A client whose process has vanished: NVFlare's server notes it and waits for ever."""
    log = workspace / "server" / "error_log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = re.search(r"(?:Subprocess died for|Communication error with) client ([^\s:,]+)", text)
    return found[1] if found else None


def root_cause(workspace: Path) -> str:
    """The error that came first at any site: its last line, then where in the project's files. Empty if none."""
    errors = []
    for log in workspace.glob("*/log.txt"):
        text = log.read_text(encoding="utf-8", errors="replace")
        for time, traceback, error in re.findall(
            r"^(\d{4}-\S+ \S+) .*Traceback .*:\n((?:[ \t].*\n|\n)+)(\S.*)\n", text, re.MULTILINE
        ):
            frames = re.findall(r'File ".*/custom/(.*)", line (\d+), in (\S+)\n *(.*)', traceback)
            where = "".join(f"\n  {file}, line {line}, in {name}: {code}" for file, line, name, code in frames)
            errors.append((log.parent.name == "server", time, f"{log.parent.name} failed: {error}{where}"))
    return min(errors)[2] if errors else ""  # the server only fails after its sites


def read_rounds(workspace: Path) -> list[dict]:
    """The records that NVFlare has written so far, one a finished round."""
    path = workspace / SERVER / "metrics" / "round_metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def bring_home(run: Path, num_rounds: int, tolerant: bool = False) -> dict:
    """Gather what NVFlare left in its workspace: the metrics of every round and the final model.

    Args:
        run: the run's folder. `final.pt`, a plain dict of tensors, is written into it.
        num_rounds: how many there should be.
        tolerant: whether sites may have been lost on the way.

    Returns:
        `rounds`, `test`, `model` and `lost`, as results.json documents them, and `counts`: site -> class -> number of
        images, where sites have told (those that have not: empty), else empty.

    Raises:
        RunFailed: something is missing.
    """
    workspace = run / "workspace"
    rounds = read_rounds(workspace)
    if len(rounds) != num_rounds:
        raise RunFailed(f"only {len(rounds)} of {num_rounds} rounds were finished")
    evaluation = workspace / SERVER / "cross_site_val" / "cross_val_results.json"
    if not evaluation.exists():
        raise RunFailed("no site evaluated the final model")
    reports = {
        site: models["SRV_FL_global_model.pt"]
        for site, models in sorted(json.loads(evaluation.read_text(encoding="utf-8")).items(), key=_by_number)
        if "SRV_FL_global_model.pt" in models
    }
    lost = sorted({site["name"] for record in rounds for site in record["sites"]} - set(reports))
    if lost and not tolerant:
        raise RunFailed(f"{', '.join(lost)} did not evaluate the final model")

    checkpoint = torch.load(workspace / SERVER / "app_server" / "FL_global_model.pt", weights_only=True)
    torch.save({name: torch.as_tensor(value) for name, value in checkpoint["model"].items()}, run / "final.pt")
    val_images = {site: report["val_images"] for site, report in reports.items()}
    curve = []
    for record in rounds:  # NVFlare counts from 0 and records what the sites got: the model before the round
        metrics = {s["name"]: {m["name"]: m["value"] for m in s["metrics"]} for s in record["sites"]}
        curve.append({site: metrics.get(site, {}).get("val_acc") for site in (*reports, *lost)})
    curve.append({site: reports.get(site, {}).get("val_acc") for site in (*reports, *lost)})
    counts = {
        site: {name.removeprefix("holds "): n for name, n in report.items() if name.startswith("holds ")}
        for site, report in reports.items()
    }
    tests = {
        site: {"accuracy": report.get("test_acc"), "loss": report.get("test_loss"), "images": report["test_images"]}
        for site, report in reports.items()
    }
    tested = {site: test for site, test in tests.items() if test["images"]}
    test_images = {site: test["images"] for site, test in tested.items()}
    return {
        "rounds": [{"round": k, "accuracy": _mean(sites, val_images), "sites": sites} for k, sites in enumerate(curve)],
        "test": {
            "accuracy": _mean({site: test["accuracy"] for site, test in tested.items()}, test_images),
            "loss": _mean({site: test["loss"] for site, test in tested.items()}, test_images),
            "sites": tests,
            "worst": min(tested, key=lambda site: tested[site]["accuracy"], default=None),
        },
        "model": "final.pt",
        "lost": lost,
        "counts": counts if any(counts.values()) else {},
    }


def _by_number(item: tuple[str, object]) -> tuple[int, str]:
    """site-2 before site-10."""
    digits = re.search(r"\d+$", item[0])
    return (int(digits[0]) if digits else 0, item[0])


def _mean(values: dict[str, float], weights: dict[str, int]) -> float | None:
    known = {site: value for site, value in values.items() if value is not None and site in weights}
    total = sum(weights[site] for site in known)
    return sum(value * weights[site] for site, value in known.items()) / total if total else None
