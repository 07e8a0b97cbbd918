"""Measure the speed of the rendered project: `make bench`, or `python benchmarks/speed.py --help`.

Alternates three programs on the same work: the lower bound (plain.py), the project as rendered, and the textbook way
(textbook/). Writes speed.json, speed.md and speed.png into benchmarks/results/. README.md explains how to read them.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import measure
import tables
import timeline
from workload import HERE, Programs, generate, subset

BUILD = HERE.parent / "build" / "bench"
IMPORTS = "import torch, pytorch_lightning, nvflare"
PARTS = ("speed", "textbook", "rounds", "clients")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of images, train|test/<class>/<image> [default: generated images]")
    add(
        "--quick",
        action="store_true",
        help="a small version of everything, for CI: shows that it works, measures nothing",
    )
    add("--repeats", type=int, help="runs of the plain loop and of the project [3, quick: 1]")
    add(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="measure only these parts, keep the results of the others",
    )
    add("--full", action="store_true", help="also run the textbook way on all images, not only on a subset: 16 minutes")
    add("--output", type=Path, help="folder for the results [benchmarks/results, quick: build/bench/results]")
    options = parser.parse_args(arguments)
    if options.data and not all((options.data / split).is_dir() for split in ("train", "test")):
        parser.error(f"{options.data} has no folders train and test: expected train|test/<class>/<image>")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: it must be at least 1")
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.output = options.output or (BUILD if options.quick else HERE) / "results"
    return options


class Benchmark:
    """The four parts. Each method returns its entry in speed.json."""

    def __init__(self, options: argparse.Namespace):
        quick = options.quick
        self.repeats, self.full = options.repeats, options.full
        self.divisor = 2 if quick else 10
        self.many_rounds = 5 if quick else 20
        self.client_counts = (3,) if quick else (2, 4, 8, 16)
        BUILD.mkdir(parents=True, exist_ok=True)
        per_class = {"train": 100, "test": 20} if quick else {"train": 5000, "test": 1000}
        source = options.data or generate(BUILD / f"generated-{per_class['train']}", per_class)
        images = source.resolve()
        if quick and options.data:
            images = subset(images, BUILD / "quick", 50)
        self.images, self.part = images, subset(images, BUILD / "part", self.divisor)
        self.programs = Programs(BUILD, batch_size=24, learning_rate=0.01)
        for folder in (self.images, self.part):
            self.programs.prepare(folder)
        self.predict_over_test = 1.0  # until the plain loop has run

    def run(
        self,
        what: str,
        images: Path,
        rounds: int = 2,
        n_clients: int = 2,
        partition: str = "none",
        seed: int = 0,
        sampler: measure.MemorySampler | None = None,
    ) -> dict[str, Any]:
        """Run one of the three programs once, and return its record for speed.json."""
        folder = self.programs.textbook if what == "textbook" else self.programs.project
        shutil.rmtree(folder / "runs", ignore_errors=True)
        command = self.programs.command(what, images, rounds, n_clients, partition, seed)
        load = os.getloadavg()[0]
        start, end = measure.run(command, folder, self.programs.environment, sampler=sampler)
        if what == "limit":
            report = json.loads((BUILD / "limit.json").read_text(encoding="utf-8"))
            self.predict_over_test = timeline.predict_over_test(report["phases"])
            sites, test = [timeline.without_predicted(site) for site in report["phases"]], report
        else:
            files = sorted((folder / "runs" / "run" / "workspace").glob("site-*/simulate_job/progress.jsonl"))
            sites = [timeline.read_phases(file.read_text(encoding="utf-8")) for file in files]
            test = json.loads((folder / "runs" / "run" / "results.json").read_text(encoding="utf-8"))["test"]
        n_images = sum(1 for _ in (images / "train").glob("*/*")) // (1 if partition == "none" else n_clients)
        n_train = n_images - round(n_images / 5)  # a fifth is for validation
        record = {
            **{"what": what, "n_clients": n_clients, "n_train": n_train, "seed": seed, "load_before": round(load, 2)},
            "wall_s": end - start,
            **{name: test[name] for name in ("accuracy", "loss")},
            **timeline.cost(start, end, sites, -(-n_train // self.programs.batch_size), self.predict_over_test),
        }
        print(f"{what:8} {n_clients} clients, {n_train} images each, {rounds} rounds: {end - start:6.1f} s", flush=True)
        return record

    def speed(self) -> dict[str, Any]:
        runs, commands = [], []
        job = [sys.executable, "job.py"]
        for seed in range(self.repeats):
            runs += [self.run(what, self.images, seed=seed) for what in ("limit", "project")]
            for what, command, code in (
                ("imports", [sys.executable, "-c", IMPORTS], 0),
                ("help", [*job, "--help"], 0),
                ("wrong flag", [*job, "--wrong"], 2),
            ):
                start, end = measure.run(command, self.programs.project, self.programs.environment, code)
                commands.append({"what": what, "wall_s": end - start})
        return {"runs": runs, "commands": commands}

    def textbook(self) -> dict[str, Any]:
        runs = [self.run("textbook", self.part)]
        for seed in range(self.repeats):
            runs += [self.run(what, self.part, seed=seed) for what in ("limit", "project")]
        return {"divisor": self.divisor, "runs": runs, "full": self.run("textbook", self.images) if self.full else None}

    def rounds(self) -> dict[str, Any]:
        """A long run: does its time match the prediction from two rounds, and does memory grow?"""
        imports = measure.idle_uss(sys.executable, IMPORTS, self.programs.project)
        found: dict[str, Any] = {"imports_uss": imports, "divisor": self.divisor, "runs": []}
        for images in (self.images, self.part):
            memory = measure.MemorySampler()
            record = self.run("project", images, rounds=self.many_rounds, sampler=memory)
            found["runs"].append({**record, **self.client_memory(memory)})
        return found

    def clients(self) -> dict[str, Any]:
        runs = []
        for n_clients in self.client_counts:
            for what in ("limit", "project"):
                memory = measure.MemorySampler()
                record = self.run(what, self.images, n_clients=n_clients, partition="iid", sampler=memory)
                peak = max((total for _, _, total in memory.samples), default=None)
                more = self.client_memory(memory) if what == "project" else {}
                runs.append({**record, "peak_pss": peak, **more})
        return {"runs": runs}

    def client_memory(self, memory: measure.MemorySampler) -> dict[str, Any]:
        """USS in bytes of a client process in the latest run: its median, early and late in the rounds."""
        workspace = self.programs.project / "runs" / "run" / "workspace"
        logs, files = workspace.glob("site-*/log.txt"), workspace.glob("site-*/simulate_job/progress.jsonl")
        clients = set().union(*(timeline.read_process_ids(log.read_text(encoding="utf-8")) for log in logs))
        phases = [timeline.read_phases(file.read_text(encoding="utf-8")) for file in files]
        rounds = [one for site in phases for one in timeline.split_rounds(site)]
        first, last = min(one["train"] for one in rounds), max(one["end"] for one in rounds)
        seen = [
            (time, median(own[pid] for pid in clients & own.keys()))
            for time, own, _ in memory.samples
            if first <= time <= last and clients & own.keys()
        ]
        if len(seen) < 4:  # the run is too short
            return {"uss": median(uss for _, uss in seen) if seen else None, "uss_early": None, "uss_late": None}
        values, quarter = [uss for _, uss in seen], len(seen) // 4
        return {
            "uss": median(values),
            "uss_early": median(values[quarter : 2 * quarter]),  # the first quarter is the warm-up
            "uss_late": median(values[-quarter:]),
        }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    benchmark = Benchmark(options)
    setting = {
        "machine": measure.describe_machine(),
        "work": {
            "images": str(options.data and options.data.name) if options.data else "generated",
            **{"clients": 2, "batch_size": 24, "rounds": 2, "local_epochs": 1, "quick": options.quick},
        },
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "speed.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if {name: results.get(name) for name in setting} != setting:  # do not mix results of different settings
        results = {**setting, "parts": {}}
    for name in options.only:
        date = time.strftime("%Y-%m-%d")
        results["parts"][name] = {"date": date, **getattr(benchmark, name)()}
        results["metrics"] = tables.metrics(results["parts"])
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (options.output / "speed.md").write_text(tables.markdown(results), encoding="utf-8")
        tables.plot(results, options.output / "speed.png")
    print((options.output / "speed.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except measure.ProgramFailed as error:
        sys.exit(f"speed.py: {error}")
