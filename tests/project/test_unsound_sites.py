"""Federations in which a site sends unusable results, or training diverges."""

import json

import pytest
import torch

from programs import Project

pytestmark = pytest.mark.slow

USUAL = ("--dataset", "digits", "--n_clients", "3", "--num_rounds", "3")
POISON = '''
from pytorch_lightning import Callback


class Poison(Callback):
    """Corrupts the weights of some sites in the second round, just before they are sent."""

    def __init__(self, site, round_):
        self.active = round_ == 1 and site in {sites}

    def on_train_end(self, trainer, module):
        if self.active:
            module.model.fc3.bias.data[0] = float("nan")


def main('''


def poison(project: Project, sites: set[str]) -> None:
    """Make some of a project's sites send NaN in the second round."""
    project.replace("client.py", "data, model))", "data, model) + [Poison(site, round_)])")
    project.replace("client.py", "def main(", POISON.replace("{sites}", repr(sites)))


def result_of(project: Project, name: str) -> dict:
    """results.json, which has to be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (project.folder / "runs" / name / "results.json").read_text()
    return json.loads(text, parse_constant=refuse)


def test_a_round_continues_without_a_site_whose_answer_is_unusable(project):
    poison(project, {"site-3"})
    run = project.run("job.py", *USUAL, "--name", "one")
    assert run.returncode == 0, run.stderr
    reason = "tensor model.fc3.bias is not finite"
    assert f"site-3: answer rejected: {reason}\n" in run.stdout
    assert f"WARNING: the server rejected the answer of site-3 in round 2: {reason}\n" in run.stdout
    assert "WARNING: the means after round 1 exclude site-3\n" in run.stdout
    result = result_of(project, "one")
    assert result["rejected"] == [{"round": 1, "site": "site-3", "task": "train", "reason": reason}]
    assert [entry["missing"] for entry in result["rounds"]] == [[], ["site-3"], [], []]
    assert set(result["test"]["sites"]) == {"site-1", "site-2", "site-3"}
    final = torch.load(project.folder / "runs" / "one" / "final.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in final.values())


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedopt"])
def test_a_run_with_too_few_sites_left_ends_and_keeps_its_last_model(project, algorithm):
    poison(project, {"site-1", "site-3"})
    run = project.run("job.py", *USUAL, "--algorithm", algorithm, "--name", "two")
    assert run.returncode == 1
    first, kept, log = run.stderr.splitlines()
    assert first.startswith("job.py: round 2: 1 of 3 sites sent a usable answer, and more than half must (site-1: ")
    assert "site-3: tensor model.fc3.bias is not finite): lower --learning_rate" in first
    assert kept == (
        "runs/two/last.pt is the global model after round 1, the last that finished; "
        "resume with: python job.py --resume two"
    )
    last = torch.load(project.folder / "runs" / "two" / "last.pt", weights_only=True)
    initial = torch.load(project.folder / "runs" / "two" / "bundle" / "initial.pt", weights_only=True)
    assert not torch.equal(last["model.fc3.bias"], initial["model.fc3.bias"])
    assert project.processes() == []


def test_a_far_too_high_learning_rate_ends_the_run_at_once_and_its_name_can_be_reused(project):
    few = ("--dataset", "digits", "--num_rounds", "9", "--name", "high")
    run = project.run("job.py", *few, "--learning_rate", "1e20")
    assert run.returncode == 1
    assert "job.py: round 1: 0 of 2 sites sent a usable answer" in run.stderr
    assert "lower --learning_rate" in run.stderr
    assert not (project.folder / "runs" / "latest").exists()
    assert not (project.folder / "runs" / "high" / "results.json").exists()
    again = project.run("job.py", "--dataset", "digits", "--num_rounds", "1", "--name", "high")
    assert again.returncode == 2
    assert "runs/high exists: choose another --name, or add --overwrite to replace it" in again.stderr
    assert (
        project.run("job.py", "--dataset", "digits", "--num_rounds", "1", "--name", "high", "--overwrite").returncode
        == 0
    )
    assert (project.folder / "runs" / "latest").resolve().name == "high"


def test_a_model_that_logs_no_accuracy_has_a_result(project):
    project.replace("model.py", 'self.log(f"{stage}_acc"', 'self.log(f"{stage}_f1"')
    run = project.run("job.py", "--dataset", "digits", "--name", "f1")
    assert run.returncode == 0, run.stderr
    result = result_of(project, "f1")
    assert result["test"]["accuracy"] is None and result["test"]["loss"] > 0
    assert [entry["accuracy"] for entry in result["rounds"]] == [None, None, None]
    assert project.run("results.py", "f1", "--html").returncode == 0
    assert project.run("compare.py", "f1").returncode == 0
    check = project.run("job.py", "--check", "--dataset", "digits")
    assert (check.returncode, "CHECK PASSED" in check.stdout) == (0, True)


def test_a_model_that_logs_nothing_is_trained_too(project):
    for name in ("loss", "acc"):
        project.replace("model.py", f'self.log(f"{{stage}}_{name}"', "(lambda *_, **__: None)(0")
    run = project.run("job.py", "--dataset", "digits", "--name", "mute")
    assert run.returncode == 0, run.stderr
    result = result_of(project, "mute")
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    assert (result["test"]["accuracy"], result["test"]["loss"]) == (None, None)


def test_a_models_own_metadata_arrives_and_no_site_learns_about_another(project):
    project.replace("model.py", "__fl_meta__: dict[str, Any] = {}", '__fl_meta__: dict[str, Any] = {"scanner": "MR 3"}')
    project.replace(
        "client.py", "round_ = input_model", "print(f'meta received: {input_model.meta}')\n        round_ = input_model"
    )
    run = project.run("job.py", "--dataset", "digits", "--name", "meta")
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in (project.folder / "runs" / "meta" / "audit.jsonl").read_text().splitlines()]
    assert {record["meta"]["scanner"] for record in records if record["task"] == "train"} == {"str, length 4"}
    log = (project.folder / "runs" / "meta" / "log.txt").read_text()
    received = [line.split("meta received: ")[1] for line in log.splitlines() if "meta received: " in line]
    assert len(received) >= 4
    assert not any("site-1" in line and "site-2" in line or "val_images" in line for line in received)
