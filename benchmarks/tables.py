"""The work, the contestants and the targets; and how measured runs become a Markdown page and a plot."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """Who does the work.

    `name`: in the tables; `program`: a file of contestants/, the project's job.py if empty; `environment`: one of
    peers.REQUIREMENTS, ours if empty; `task`: what common.WORK gets; `is_distributed`: torchrun starts one worker per
    core; `is_sample`: slow, so it runs once, on a tenth of the images, and on a tenth of the sites if there are more
    than ten.
    """

    name: str
    program: str = ""
    environment: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    is_distributed: bool = False
    is_sample: bool = False


@dataclass(frozen=True)
class Target:
    """An upper bound: of the ratio of two contestants' `value`, or with `below` empty, of one contestant's."""

    above: str
    below: str
    most: float
    value: str = "wall_s"


@dataclass(frozen=True)
class Work:
    """`options`: of job.py; two rounds unless they say otherwise. `contestants`: in the order that they alternate."""

    title: str
    options: dict[str, Any]
    contestants: tuple[str, ...]
    targets: tuple[Target, ...]


CONTESTANTS = {  # README.md tells what each does more or less than the others
    "ours": Contestant("this project"),
    "plain": Contestant("plain loop", "plain.py"),
    "flower": Contestant("Flower", "flower_app.py", "flower"),
    "flower-lean": Contestant("Flower, least", "flower_app.py", "flower", {"lean": True}),
    "pfl": Contestant("pfl-research, a worker per core", "pfl_loop.py", "pfl", {"threads": 1}, is_distributed=True),
    "pfl-threads": Contestant("pfl-research, two threads", "pfl_loop.py", "pfl", {"threads": 2}),
    "pfl-single": Contestant("pfl-research, one thread", "pfl_loop.py", "pfl", {"threads": 1}),
    "nvflare": Contestant("NVFlare's simulator", "nvflare_job.py", is_sample=True),
    "hello-lightning": Contestant(
        "NVFlare's simulator, images as in hello-lightning",
        "nvflare_job.py",
        task={"as_published": True},
        is_sample=True,
    ),
    "ours:5": Contestant("this project, 5 sites"),
    "ours:500": Contestant("this project, 500 sites"),
    "imports": Contestant("importing the same modules"),
}
PEERS = ("flower", "flower-lean", "pfl", "pfl-threads", "pfl-single")
WORKS = {
    "two": Work(
        "2 sites, each with all images, four fifths of them for training; batches of 24; 2 rounds",
        {"n_clients": 2, "partition": "none", "batch_size": 24},
        ("plain", "ours", *PEERS, "nvflare", "hello-lightning"),
        (Target("ours", "plain", 1.4), Target("ours", "flower", 0.65)),
    ),
    "hundred": Work(
        "100 sites, Dirichlet 0.5; batches of 16; 2 rounds; all evaluate",
        {"n_clients": 100, "partition": "dirichlet", "alpha": 0.5, "batch_size": 16},
        ("ours", "plain", *PEERS, "nvflare"),
        (Target("ours", "flower", 0.55),),
    ),
    "thousand": Work(
        "1,000 sites, IID; batches of 16; 20 rounds of 50 random sites; 100 sites evaluate",
        {
            **{"n_clients": 1000, "partition": "iid", "batch_size": 16, "num_rounds": 20},
            **{"sites_per_round": 50, "evaluate_sites": 100},
        },
        ("ours", "plain", *PEERS),
        (Target("ours", "flower", 0.4), Target("ours", "", 2.5e9, "peak_pss")),
    ),
    "spread": Work(
        "the same images on 5 and on 500 sites, IID; batches of 16; 2 rounds",
        {"partition": "iid", "batch_size": 16},
        ("ours:5", "ours:500"),
        (Target("ours:500", "ours:5", 1.8),),
    ),
    "digits": Work(
        "digits; 2 sites; batches of 16; 2 rounds",
        {"dataset": "digits", "n_clients": 2, "partition": "iid", "batch_size": 16},
        ("imports", "ours"),
        (Target("ours", "imports", 2.2),),
    ),
}


def line(work: str, run: dict[str, Any]) -> str:
    """What is printed after a run."""
    text = f"{work:9} {run['contestant']:16} {run['repeat']}: "
    if "error" in run:
        return f"{text}FAILED, {run['error']}"
    text += f"{run['wall_s']:6.1f} s, {run['cpu_s']:6.1f} CPU s, peak PSS {run['peak_pss'] / 1e9:5.2f} GB"
    return text + (f", accuracy {run['accuracy']:.3f}" if "accuracy" in run else "")


def finished(runs: Iterable[dict[str, Any]], contestant: str) -> dict[int, dict[str, Any]]:
    """Repeat -> the run of a contestant, without failed ones."""
    return {run["repeat"]: run for run in runs if run["contestant"] == contestant and "error" not in run}


def measured(target: Target, runs: list[dict[str, Any]]) -> list[float]:
    """The values that a target bounds, one per repeat; ratios are of runs that alternated."""
    above, below = finished(runs, target.above), finished(runs, target.below)
    if not target.below:
        return [run[target.value] for run in above.values()]
    return [run[target.value] / below[repeat][target.value] for repeat, run in above.items() if repeat in below]


def spread(values: list[float], unit: str = "", digits: int = 1, scale: float = 1) -> str:
    """Median (minimum to maximum)."""
    low, middle, high = (f"{scale * pick(values):.{digits}f}" for pick in (min, median, max))
    return f"{middle}{unit}" + (f" ({low} to {high})" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def judge(results: dict[str, Any]) -> list[list[str]]:
    """One row per target that has been measured."""
    rows = []
    for work, found in results.items():
        for target in WORKS[work].targets:
            if values := measured(target, found["runs"]):
                name, is_ratio = CONTESTANTS[target.above].name, bool(target.below)
                what = f"{name} / {CONTESTANTS[target.below].name}" if is_ratio else f"{name}, peak memory in GB"
                scale = 1 if is_ratio else 1e-9
                verdict = "met" if median(values) <= target.most else "missed"
                rows.append([work, what, spread(values, "", 2, scale), f"{scale * target.most:g} or less", verdict])
    return rows


def markdown(results: dict[str, Any]) -> str:
    text = "# Peers\n\nMeasured by `make bench`; [what each contestant does, how to read it](../README.md).\n"
    if judged := judge(results):
        text += "\n" + table(["work", "what", "median (minimum to maximum)", "target", ""], judged)
    for work, found in results.items():
        setting, runs = found["setting"], found["runs"]
        if not runs:
            continue
        machine, loads = setting["machine"], [run["load_before"] for run in runs]
        text += f"\n## {work}: {WORKS[work].title}\n\n"
        if setting["quick"]:
            text += "**A quick run on a part of it: it shows that the benchmark works; its numbers mean nothing.**\n\n"
        rows: list[list[str]] = []
        samples: list[list[str]] = []
        for name in WORKS[work].contestants:
            contestant, done = CONTESTANTS[name], [*finished(runs, name).values()]
            failed = sum(1 for run in runs if run["contestant"] == name and "error" in run)
            if not done:
                rows += [[contestant.name, *["failed"] * 4, "0"]] if failed else []
                continue
            walls = [run["wall_s"] for run in done]
            accuracies = [run["accuracy"] for run in done if "accuracy" in run]
            row = [
                contestant.name + (" (a tenth of the work)" if contestant.is_sample else ""),
                spread(walls, " s"),
                spread([run["cpu_s"] for run in done], " s", 0),
                spread([run["peak_pss"] for run in done], " GB", 2, 1e-9),
                spread(accuracies, "", 3) if accuracies else "-",
                f"{len(done)}" + (f", {failed} failed" if failed else ""),
            ]
            (samples if contestant.is_sample else rows).append(row)
        text += table(["", "wall time", "CPU time", "peak memory (PSS)", "test accuracy", "runs"], rows + samples)
        text += f"\n{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        text += f"Python {machine['python']}, torch {machine['torch']}, lightning {machine['lightning']}, nvflare "
        text += f"{machine['nvflare']}, {', '.join(setting['peers'].values())}; {runs[-1]['date']}. Images: "
        text += f"{setting['images']}. Load average before the runs: {min(loads)} to {max(loads)}.\n"
    return text


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the wall times, one panel per work that peers have done in full."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, float]] = {}
    for work, found in results.items():
        names = [name for name in ("plain", "ours", *PEERS) if finished(found["runs"], name)]
        if len(names) > 1 and work != "digits":
            panels[work] = {
                name: median(run["wall_s"] for run in finished(found["runs"], name).values()) for name in names
            }
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 1 + 1.9 * len(panels)), squeeze=False)
    for axis, (work, walls) in zip(axes[:, 0], panels.items(), strict=True):
        labels = [CONTESTANTS[name].name for name in walls][::-1]
        colors = ["#3d7ea6" if name == "ours" else "#9aa5b1" for name in walls][::-1]
        bars = axis.barh(labels, [*walls.values()][::-1], color=colors)
        axis.bar_label(bars, fmt=" %.0f s")
        axis.set_xlim(0, 1.12 * max(walls.values()))
        axis.set_title(WORKS[work].title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
