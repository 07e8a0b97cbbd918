"""What differential privacy costs: `python benchmarks/privacy.py [--data DIR]`, with DIR/train|test/<class>/<image>.

Runs job.py of a rendered project for several ε on digits, and on DIR if given, and writes privacy.json, privacy.md and
privacy.png into benchmarks/results/. If interrupted, it resumes: build/privacy/ keeps finished runs.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from cookiecutter.main import cookiecutter

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "build" / "privacy" / "fl-privacy"
EPSILONS = (None, 16.0, 8.0, 4.0, 2.0, 1.0)  # None: without differential privacy
SETTING = ["--n_clients", "2", "--num_rounds", "5", "--batch_size", "64", "--learning_rate", "0.05"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of images, train|test/<class>/<image>, besides digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... [%(default)s]")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for the results [%(default)s]")
    return parser.parse_args()


def run(images: Path | None, epsilon: float | None, seed: int) -> dict[str, Any]:
    """Run job.py, unless that is done, and return what matters of its result."""
    data = ["--dataset", "image_folder", "--data_root", str(images.resolve())] if images else ["--dataset", "digits"]
    name = f"{images.name if images else 'digits'}-{epsilon or 'none'}-{seed}"
    budget = ["--dp_epsilon", str(epsilon)] if epsilon else []
    finished = PROJECT / "runs" / name / "results.json"
    if not finished.exists():
        command = ["job.py", "--name", name, "--overwrite", *data, *SETTING, "--seed", str(seed), *budget]
        print(" ".join(["python", *command]), flush=True)
        subprocess.run([sys.executable, *command], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(finished.read_text(encoding="utf-8"))
    return {
        **{"images": images.name if images else "digits", "epsilon": epsilon, "seed": seed},
        "accuracy": result["test"]["accuracy"],
        "leak": median(site["auc"] for site in result["leak"].values()),
        "training_s": mean(host["computing"] for host in result["timing"].values()),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one row per set of images and ε: means over the seeds, and the lowest and highest accuracy."""
    lines = [
        "# Differential privacy",
        "",
        "Measured by `benchmarks/privacy.py`, which has the settings; simulated, so the noise is seeded.",
        "",
        "| images | ε per site | test accuracy | leak test, AUC | training, times that without |",
        "|---|---:|---:|---:|---:|",
    ]
    for images, epsilon in dict.fromkeys((row["images"], row["epsilon"]) for row in rows):
        own, plain = ([row for row in rows if (row["images"], row["epsilon"]) == (images, e)] for e in (epsilon, None))
        accuracies = [row["accuracy"] for row in own]
        cost = mean(row["training_s"] for row in own) / mean(row["training_s"] for row in plain)
        lines.append(
            f"| {images} | {epsilon or 'no DP'} | {mean(accuracies):.3f} ({min(accuracies):.3f} to"
            f" {max(accuracies):.3f}) | {mean(row['leak'] for row in own):.3f} | {cost:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against ε, one line per set of images; dashed: without differential privacy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for images, color in zip(dict.fromkeys(row["images"] for row in rows), ("tab:blue", "tab:orange"), strict=False):
        own = [row for row in rows if row["images"] == images]
        epsilons = sorted({row["epsilon"] for row in own if row["epsilon"]})
        values = [[row["accuracy"] for row in own if row["epsilon"] == epsilon] for epsilon in epsilons]
        axes.plot(epsilons, [mean(each) for each in values], "o-", color=color, label=images)
        axes.fill_between(epsilons, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
        without = mean(row["accuracy"] for row in own if row["epsilon"] is None)
        axes.axhline(without, color=color, ls="--", lw=1, label=f"{images}, no DP")
    axes.set(xscale="log", xlabel="ε of each site (less is more private)", ylabel="test accuracy", ylim=(0, 1))
    axes.set_xticks([epsilon for epsilon in EPSILONS if epsilon], [f"{e:g}" for e in EPSILONS if e], minor=False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    options = parse()
    extra = {"project_name": "Privacy", "project_slug": PROJECT.name, "dataset": "digits", "setup": "skip"}
    cookiecutter(
        str(HERE.parent), no_input=True, overwrite_if_exists=True, output_dir=str(PROJECT.parent), extra_context=extra
    )
    folders = [None, *([options.data] if options.data else [])]
    rows = [run(*each) for each in itertools.product(folders, EPSILONS, range(options.seeds))]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "privacy.json").write_text(json.dumps({"setting": SETTING, "runs": rows}, indent=2))
    (options.output / "privacy.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, options.output / "privacy.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
