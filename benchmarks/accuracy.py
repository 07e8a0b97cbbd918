"""Compare the algorithms' accuracy: `python benchmarks/accuracy.py --data DIR`, with DIR/train|test/<class>/<image>.

Runs every algorithm on every partition with every seed, through job.py of a rendered project, and writes accuracy.json
and accuracy.md into benchmarks/results/. If interrupted, it resumes: build/accuracy/ keeps finished runs, which are not
repeated.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cookiecutter.main import cookiecutter

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "build" / "accuracy" / "fl-accuracy"
ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fedopt")
PARTITIONS = {
    "iid": ["--partition", "iid"],
    "dirichlet-0.5": ["--partition", "dirichlet", "--alpha", "0.5"],
    "dirichlet-0.1": ["--partition", "dirichlet", "--alpha", "0.1"],
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of images, train|test/<class>/<image> [default: digits, no folder needed]")
    add("--n_clients", type=int, default=5, help="sites [%(default)s]")
    add("--num_rounds", type=int, default=5, help="rounds of one local epoch [%(default)s]")
    add("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... [%(default)s]")
    add("--minutes", type=float, default=30, help="start no new run after this; call again to resume [%(default)s]")
    add("--output", type=Path, default=HERE / "results", help="folder for the results [%(default)s]")
    options = parser.parse_args(arguments)
    if options.data and not all((options.data / split).is_dir() for split in ("train", "test")):
        parser.error(f"{options.data} has no folders train and test: expected train|test/<class>/<image>")
    return options


def command(options: argparse.Namespace, algorithm: str, partition: str, seed: int) -> tuple[str, list[str]]:
    """A run's name, which contains all that it depends on, and its command line."""
    data = ["--dataset", "image_folder", "--data_root", str(options.data.resolve())] if options.data else []
    name = f"{algorithm}-{partition}-{options.n_clients}x{options.num_rounds}-{seed}"
    if options.data:
        name = f"{options.data.resolve().name}-{name}"
    size = ["--n_clients", str(options.n_clients), "--num_rounds", str(options.num_rounds), "--seed", str(seed)]
    return name, ["job.py", "--name", name, "--algorithm", algorithm, *PARTITIONS[partition], *data, *size]


def main() -> int:
    options = parse()
    cookiecutter(
        str(HERE.parent),
        no_input=True,
        overwrite_if_exists=True,  # keeps runs/
        output_dir=str(PROJECT.parent),
        extra_context={"project_name": "Accuracy", "project_slug": PROJECT.name, "dataset": "digits", "setup": "skip"},
    )
    start, missing, rows = time.monotonic(), 0, []
    for seed, partition, algorithm in itertools.product(range(options.seeds), PARTITIONS, ALGORITHMS):
        name, arguments = command(options, algorithm, partition, seed)
        finished = PROJECT / "runs" / name / "results.json"
        if not finished.exists():
            if time.monotonic() - start > 60 * options.minutes:
                missing += 1
                continue
            if finished.parent.exists():  # interrupted
                finished.parent.rename(finished.parent.with_name(f"{name}-interrupted-{time.time_ns()}"))
            print(" ".join(["python", *arguments]), flush=True)
            run = subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True)
            if run.returncode:
                print(f"exit code {run.returncode}:\n{run.stderr[-2000:]}", file=sys.stderr)
                return 1
        result = json.loads(finished.read_text(encoding="utf-8"))
        rows.append(
            {
                **{"algorithm": algorithm, "partition": partition, "seed": seed},
                **{"final": result["test"]["accuracy"], "best": result["best"]["test"]["accuracy"]},
                **{"worst_site": result["test"]["sites"][result["test"]["worst"]]["accuracy"]},
                **{"wall_s": result["wall_s"], "sha256": result["sha256"]},
            }
        )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "accuracy.json").write_text(json.dumps({"options": describe(options), "runs": rows}, indent=2))
    text = markdown(describe(options), rows)
    (options.output / "accuracy.md").write_text(text, encoding="utf-8")
    print(text)
    if missing:
        print(f"{missing} runs left: run the same command again to resume")
    return 0


def describe(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": options.data.name if options.data else "digits",
        **{name: getattr(options, name) for name in ("n_clients", "num_rounds", "seeds")},
    }


def markdown(options: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A table with one row per algorithm and one column per partition: mean and standard deviation over the seeds."""
    lines = [
        "# Accuracy",
        "",
        "Measured by `benchmarks/accuracy.py`; [how to read it](../README.md#accuracy).",
        "",
        f"Images: {options['data']}. {options['n_clients']} sites, {options['num_rounds']} rounds of one local epoch. "
        "Test accuracy of the final global model over all sites' test images: mean ± standard deviation (seeds).",
        "",
        f"| | {' | '.join(PARTITIONS)} |",
        f"|---|{'---|' * len(PARTITIONS)}",
    ]
    for algorithm in ALGORITHMS:
        cells = []
        for partition in PARTITIONS:
            own = [row["final"] for row in rows if (row["algorithm"], row["partition"]) == (algorithm, partition)]
            spread = f" ± {stdev(own):.3f}" if len(own) > 1 else ""
            cells.append(f"{mean(own):.3f}{spread} ({len(own)})" if own else "-")
        lines.append(f"| {algorithm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
