"""Compare the rendered project with its peers on the same work: `python benchmarks/peers.py --data_root DIR`.

Each run is a whole program, measured from outside; contestants alternate. Writes peers.json, peers.md and peers.png
into benchmarks/results/. If interrupted, the same command resumes. README.md explains how to read them.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import measure
import tables
from tables import CONTESTANTS, WORKS
from workload import HERE, Project, generate, subset

BUILD = HERE.parent / "build" / "peers"
REQUIREMENTS = {"flower": "flwr[simulation]==1.42.0", "pfl": "pfl==0.6.0"}
CORES = os.cpu_count() or 1
LEARNING_RATE = 0.01
SAMPLE = 10  # slow contestants do one run with 1/SAMPLE of the images
TIMEOUT_S = 3600.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_root", type=Path, help="folder of images, train|test/<class>/<image> [default: generated images]")
    add("--work", nargs="+", choices=WORKS, default=[*WORKS], help="only these [all]")
    add("--only", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], help="only these contestants [all]")
    add("--repeats", type=int, default=3, help="runs of each contestant [%(default)s]")
    add("--again", action="store_true", help="discard the earlier runs of this work")
    add("--quick", action="store_true", help="a few generated images and sites: shows that it works, measures nothing")
    add("--output", type=Path, help="folder for the results [benchmarks/results, quick: build/peers/results]")
    options = parser.parse_args(arguments)
    root = options.data_root
    if root and not all((root / split).is_dir() for split in ("train", "test")):
        parser.error(f"{root} has no folders train and test: expected train|test/<class>/<image>")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: it must be at least 1")
    options.output = options.output or (BUILD if options.quick else HERE) / "results"
    return options


def make_environment(name: str) -> str:
    """The Python of a peer's environment, created if it is missing.

    A venv with the peer and what it requires; PyTorch, Lightning, ... are those of the Python that runs this program.
    """
    folder = BUILD / f"env-{name}"
    python, ready = folder / "bin" / "python", folder / REQUIREMENTS[name]
    if not ready.exists():
        print(f"installing {REQUIREMENTS[name]} into {folder}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "shared.pth").write_text(sysconfig.get_path("purelib"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", REQUIREMENTS[name]], check=True)
        ready.touch()
    return str(python)


class Benchmark:
    """Runs contestants, one at a time."""

    def __init__(self, options: argparse.Namespace):
        self.quick = options.quick
        per_class = {"train": 100, "test": 20} if self.quick else {"train": 5000, "test": 1000}
        if self.quick or not options.data_root:
            self.images = generate(BUILD / f"generated-{per_class['train']}", per_class)
        else:
            self.images = options.data_root.resolve()
        self.sample = subset(self.images, BUILD / "sample", SAMPLE)
        self.project = Project(BUILD)
        self.stores = {images: self.project.prepare(images) for images in (self.images, self.sample)}
        self.modules: list[str] = []

    def setting(self, work: str) -> dict[str, Any]:
        """Runs with different settings are not mixed."""
        return {
            "machine": measure.describe_machine(),
            "peers": REQUIREMENTS,
            "project": self.project.version,
            "images": self.images.name,
            "quick": self.quick,
            "options": WORKS[work].options,
        }

    def options(self, work: str, contestant: str, repeat: int) -> dict[str, Any]:
        """The options of job.py, which are the work of every contestant."""
        options = {"learning_rate": LEARNING_RATE, "num_rounds": 2, "seed": repeat, **WORKS[work].options}
        if sites := contestant.partition(":")[2]:
            options["n_clients"] = int(sites)
        if CONTESTANTS[contestant].is_sample and options["n_clients"] > SAMPLE:
            options["n_clients"] //= SAMPLE
        if self.quick:
            for name in {"n_clients", "sites_per_round", "evaluate_sites"} & options.keys():
                options[name] = max(2, options[name] // 25)
            options["num_rounds"] = 2
        return options

    def run(self, work: str, name: str, repeat: int) -> dict[str, Any]:
        """Run a contestant once. Returns its record for peers.json, with `error` if it failed."""
        contestant, options = CONTESTANTS[name], self.options(work, name, repeat)
        images = self.sample if contestant.is_sample else self.images
        scratch = BUILD / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        report, environment = scratch / "report.json", dict(self.project.environment)
        folder, python = self.project.folder, sys.executable
        if contestant.environment:
            python = make_environment(contestant.environment)
        if name == "imports":
            (scratch / "imports.py").write_text(self.importing())
            command, environment["PYTHONPATH"] = [python, str(scratch / "imports.py")], str(folder)
        elif contestant.program:
            folder = HERE / "contestants"
            task = {"options": options, "store": str(self.stores[images]), "report": str(report)}
            task |= {"scratch": str(scratch), **contestant.task}
            environment["BENCHMARK_WORK"] = json.dumps(task)
            environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(self.project.folder)])
            environment |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={CORES}"]
            command = [python, *(launcher if contestant.is_distributed else []), contestant.program]
        else:
            report = folder / "runs" / "run" / "results.json"
            command = [python, *self.job(options, images)]
        record: dict[str, Any] = {"contestant": name, "repeat": repeat, "load_before": round(os.getloadavg()[0], 2)}
        try:
            record |= measure.run(command, folder, environment, BUILD / f"{work}-{name}.txt", TIMEOUT_S)
            if name != "imports":
                result = json.loads(report.read_text(encoding="utf-8"))
                record["accuracy"] = result.get("test", result)["accuracy"]
        except (measure.ProgramFailed, OSError) as error:
            record["error"] = str(error)
        return record

    def job(self, options: dict[str, Any], images: Path) -> list[str]:
        shutil.rmtree(self.project.folder / "runs", ignore_errors=True)
        data = {"dataset": "image_folder", "data_root": images}
        flags = [str(part) for name, value in (data | options).items() for part in (f"--{name}", value)]
        return ["job.py", "--name", "run", *flags]

    def importing(self) -> str:
        """A program that imports the modules that a run imports, Lightning in the project's own quick way."""
        if not self.modules:
            options = self.options("digits", "ours", 0)
            done = subprocess.run(
                [sys.executable, "-X", "importtime", *self.job(options, self.images)],
                cwd=self.project.folder,
                env=self.project.environment,
                capture_output=True,
                text=True,
                check=True,
            )
            self.modules = [*dict.fromkeys(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))]
        return (
            f"import federation.site.quick_start, contextlib, importlib, os\nfor name in {self.modules}:\n"
            " with contextlib.suppress(Exception): importlib.import_module(name)\n"
            "os._exit(0)  # as job.py: skip interpreter teardown"
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process is left behind
    BUILD.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(BUILD / "lock", timeout=0):
            return measure_all(options)
    except KeyboardInterrupt:
        print("peers.py: interrupted: the same command resumes", file=sys.stderr)
        return 130
    except Timeout:
        print(f"peers.py: another one is running in {BUILD}: wait for its end", file=sys.stderr)
        return 2


def measure_all(options: argparse.Namespace) -> int:
    benchmark = Benchmark(options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "peers.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for work in options.work:
        setting = json.loads(json.dumps(benchmark.setting(work)))
        if options.again or results.get(work, {}).get("setting") != setting:
            results[work] = {"setting": setting, "runs": []}
        runs = results[work]["runs"]
        for repeat in range(options.repeats):
            for name in WORKS[work].contestants:
                done = [run for run in runs if (run["contestant"], run["repeat"]) == (name, repeat)]
                if name not in options.only or (repeat and CONTESTANTS[name].is_sample):
                    continue
                if done and "error" not in done[0]:
                    continue
                runs[:] = [run for run in runs if run not in done]
                runs.append({**benchmark.run(work, name, repeat), "date": time.strftime("%Y-%m-%d")})
                print(tables.line(work, runs[-1]), flush=True)
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (options.output / "peers.md").write_text(tables.markdown(results), encoding="utf-8")
    tables.plot(results, options.output / "peers.png")
    print((options.output / "peers.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
