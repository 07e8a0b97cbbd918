"""Finished runs of made-up numbers, of any number of sites and rounds, with the files that job.py writes."""

import json
from pathlib import Path

import numpy as np
import torch

from federation.protocol import (
    CALIBRATION,
    CONFUSION,
    DONE,
    N_CONFIDENCES,
    N_SCORES,
    PROGRESS,
    SCORES,
    STARTING,
    TRAINING,
    VALIDATING,
    WAITING,
)
from federation.run import schema, timing
from federation.run.folder import RunFolder
from federation.run.metrics import weighted_mean
from model import LitNet
from settings import Options

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
N_HOSTS = 4


def write_run(
    folder: Path,
    n_sites: int,
    n_rounds: int = 3,
    cohort: int | None = None,
    tested: int | None = None,
    classes: list[str] = CLASSES,
    seed: int = 0,
) -> RunFolder:
    """Write a run in which `cohort` random sites train and validate in each round, and `tested` are in the final test.

    The images are spread as by `--partition dirichlet`. With up to eight sites, each has its own process.
    """
    random = np.random.default_rng(seed)
    run = RunFolder(folder)
    sites = [f"site-{i + 1}" for i in range(n_sites)]
    hosts = sites if n_sites <= 8 else [f"host-{i + 1}" for i in range(N_HOSTS)]
    counts = np.floor(
        random.dirichlet(np.full(len(classes), 0.5), n_sites) * random.lognormal(4, 1, (n_sites, 1)) + 0.5
    )
    counts[:, 0] += 5  # at least one to train and one to validate on
    images = dict(zip(sites, counts.sum(axis=1).astype(int).tolist(), strict=True))
    skill = random.beta(6, 4, n_sites)  # how easy a site's images are

    def chosen(number):
        return sorted(random.choice(n_sites, number, replace=False).tolist()) if number else range(n_sites)

    def metrics(members, after):
        accuracies = {sites[i]: float(skill[i] * (1 - 0.9 * 0.97**after)) for i in members}
        losses = {site: 2.3 - 1.5 * accuracy for site, accuracy in accuracies.items()}
        return accuracies, losses, weighted_mean(accuracies, images), weighted_mean(losses, images)

    def test(members, after):
        accuracies, losses, accuracy, loss = metrics(members, after)
        own = {
            site: {"accuracy": accuracies[site], "loss": losses[site], "images": images[site]} for site in accuracies
        }
        return {"accuracy": accuracy, "loss": loss, "sites": own, "worst": min(accuracies, key=accuracies.get)}

    rounds, audit = [], []
    tensors = [
        {"name": name, "shape": list(weight.shape), "dtype": "float32", "bytes": 4 * weight.numel()}
        for name, weight in LitNet(len(classes), Options()).state_dict().items()
    ]
    for number in range(n_rounds + 1):
        members = chosen(cohort)
        accuracies, losses, accuracy, loss = metrics(members, number)
        names = list(accuracies)
        entry = {"round": number, "accuracy": accuracy, "sites": accuracies, "loss": loss, "losses": losses}
        rounds.append({**entry, "missing": [], "participants": names if cohort and number else None})
        for k in range(len(hosts) if number else 0):
            share = names[k :: len(hosts)]
            answer = {"round": number - 1, "tensors": tensors, "metrics": ["val_loss", "val_acc"]}
            described = {"meta": {"NUM_STEPS_CURRENT_ROUND": "int"}, "headers": {"rc": "str", "current_round": "int"}}
            audit += [{"sites": share, "task": "train", **answer, **described}] if share else []
    final = test(chosen(tested), n_rounds)
    options = Options(dataset="fashion_mnist", partition="dirichlet", n_clients=n_sites, num_rounds=n_rounds).of_run()
    result = {
        "version": schema.VERSION,
        **{name: value for name, value in options.items() if name != "classes"},
        **{"sites_per_round": cohort, "evaluate_sites": tested, "n_hosts": len(hosts)},
        **{"device": "cpu", "rounds": rounds, "test": final, "model": "final.pt", "wall_s": 1234.5, "sha256": "12ab"},
        "best": {"round": n_rounds - 1, "model": "best.pt", "test": test(chosen(tested), n_rounds - 1)},
        "leak": {site: {"auc": 0.53, "tpr": 0.02} for site in final["sites"]},
        "privacy": {site: {"epsilon": 7.9, "delta": 1e-4, "noise": 0.8, "seeded": False} for site in final["sites"]},
        "images": {site: {"train": n - n // 5, "val": n // 5} for site, n in images.items()},
    }
    indices = {
        site: {"train": [*range(n - n // 5)], "val": [0] * (n // 5), "test": [0] * n} for site, n in images.items()
    }
    tested_counts = {}
    for i, (site, row) in enumerate(zip(sites, counts.astype(int), strict=True)):
        if site in final["sites"]:  # its classes are taken for each other, but the last for none
            spread = skill[i] * np.eye(len(classes)) + (1 - skill[i]) / len(classes)
            spread[:, -1] = 0
            confusion = np.floor(row[:, None] * spread / spread.sum(axis=1, keepdims=True)).astype(int)
            confusion[:, 0] += row - confusion.sum(axis=1)
            scores = np.zeros((len(classes), 2, N_SCORES), int)
            for c, n in enumerate(row):
                for is_class, (size, center) in enumerate(((row.sum() - n, 55), (n, 70))):
                    bell = np.exp(-((np.arange(N_SCORES) - center) ** 2) / 200)
                    scores[c, is_class] = random.multinomial(size, bell / bell.sum())
            correct, n = np.trace(confusion), row.sum()
            calibration = np.zeros((3, N_CONFIDENCES))
            calibration[0] = random.multinomial(n, np.full(N_CONFIDENCES, 1 / N_CONFIDENCES))
            calibration[1] = np.minimum(np.floor(calibration[0] * correct / max(n, 1)), calibration[0])
            calibration[2] = calibration[0] * (np.arange(N_CONFIDENCES) + 0.5) / N_CONFIDENCES
            arrays = {CONFUSION: confusion, SCORES: scores, CALIBRATION: calibration}
            tested_counts[site] = {name: array.tolist() for name, array in arrays.items()}
    final["never_predicted"] = [classes[-1]]
    own = {site: dict(zip(classes, map(int, row), strict=True)) for site, row in zip(sites, counts, strict=True)}
    run.server.mkdir(parents=True)
    folder.joinpath("partition.json").write_text(json.dumps({"classes": classes, "sites": indices, "counts": own}))
    run.test_counts.write_text(json.dumps({"classes": classes, "sites": tested_counts}))
    run.audit_log.write_text("".join(f"{json.dumps(line)}\n" for line in audit))
    torch.save(LitNet(len(classes), Options()).state_dict(), run.final)
    write_progress(run.server / PROGRESS, [(0.0, STARTING), (1234.0, DONE)])
    per_round = 1200.0 / n_rounds
    for host in hosts:
        phases = []
        for number in range(n_rounds):
            begins = np.linspace(0, 0.9 * per_round, max(2, (cohort or n_sites) // len(hosts)), endpoint=False)
            for begin in (30 + number * per_round + begins + random.uniform(0, 0.01)).tolist():
                phases += [(begin, VALIDATING), (begin + 0.2 * (begins[1] - begins[0]), TRAINING)]
            phases.append((30 + (number + 0.9) * per_round, WAITING))
        write_progress(run.progress(host), phases)
    result["timing"] = timing.totals(timing.phases(run))
    run.results.write_text(json.dumps(result))
    return run


def write_progress(file: Path, phases: list[tuple[float, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"time": 1_700_000_000 + time, "phase": phase}) for time, phase in phases)
    file.write_text("".join(f"{line}\n" for line in lines))
