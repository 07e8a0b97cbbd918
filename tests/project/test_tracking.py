"""What is sent to an experiment tracker, read back with the tracker's own library."""

import importlib.util
import json
import sys

import pytest
from pytorch_lightning import Trainer

from data import SiteDataModule
from federation.errors import UserError
from federation.launch import tracking
from federation.launch.options import parse
from federation.protocol import read_json_lines
from federation.run.folder import RunFolder
from federation.site import progress
from programs import Project, read_events
from settings import TRACKERS
from trainer import make_model

RESULT: dict = {
    "rounds": [
        {"round": 0, "accuracy": 0.125, "sites": {}},
        {"round": 1, "accuracy": 0.25, "sites": {}},
        {"round": 2, "accuracy": 0.5, "sites": {}},
    ],
    "test": {"accuracy": 0.75, "loss": 1.5},
}
GLOBAL = {
    "val/acc": [(0, 0.125), (1, 0.25), (2, 0.5)],
    "test/acc": [(2, 0.75)],
    "test/loss": [(2, 1.5)],
}


class Writer:
    """Replaces NVFlare's SummaryWriter, which needs a server."""

    def __init__(self):
        self.sent, self.steps = {}, []

    def add_scalar(self, tag, value, global_step):
        self.steps.append(global_step)
        self.sent.setdefault(tag, []).append((global_step, value))


@pytest.fixture
def train(options, monkeypatch, tmp_path):
    """Train at one site for two rounds, as client.py does; return what was sent."""
    monkeypatch.setattr(progress, "SummaryWriter", Writer)
    monkeypatch.setattr("model.LOG_EVERY_N_STEPS", 5)

    def run(tracker, batches=6, epochs=1):
        data = SiteDataModule("site-1", options(n_clients=1))
        model = make_model(options(n_clients=1))
        callback = progress.Progress(tracker, tmp_path / "progress.jsonl")
        for data.round in range(2):
            trainer = Trainer(
                accelerator="cpu",
                callbacks=[callback],
                max_epochs=epochs,
                limit_train_batches=batches,
                log_every_n_steps=5,
                check_val_every_n_epoch=sys.maxsize,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                logger=False,
            )
            if tracker != "none":
                trainer.validate(model, datamodule=data, verbose=False)
            trainer.fit(model, datamodule=data)
            if tracker != "none":
                trainer.test(model, datamodule=data, verbose=False)
        return callback.writer

    return run


class TestASite:
    def test_sends_its_metrics_under_clean_tags(self, train):
        sent = train("tensorboard").sent
        assert set(sent) == {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc"}

    def test_counts_training_in_steps_and_evaluation_in_rounds(self, train):
        sent = train("tensorboard", epochs=2).sent
        assert [step for step, _ in sent["train/loss"]] == [1, 6, 7, 12, 13, 18, 19, 24]
        assert [step for step, _ in sent["val/acc"]] == [0, 1]  # the global model after n rounds
        assert [step for step, _ in sent["test/acc"]] == [1, 2]

    def test_never_decreases_the_step_for_wandb(self, train):
        """It drops values whose step is lower than an earlier one."""
        sent = train("wandb", epochs=2)
        assert sent.steps == sorted(sent.steps)
        assert sent.sent["round"] == [(0, 0), (12, 1), (12, 1), (24, 2)]
        assert [step for step, _ in sent.sent["test/acc"]] == [12, 24]

    def test_sends_nothing_unless_asked(self, train):
        assert train("none", batches=2) is None

    def test_announces_its_speed(self, train, tmp_path):
        train("none", batches=20)
        records = read_json_lines(tmp_path / "progress.jsonl")
        speeds = [record for record in records if "step" in record]
        assert (speeds[-1]["step"], speeds[-1]["steps"]) == (20, 20)
        assert all(record["speed"] > 0 for record in speeds)


def test_the_global_models_curves_are_written_for_tensorboard(tmp_path):
    tracking.add_global_curves("tensorboard", RunFolder(tmp_path), RESULT, {})
    assert read_events(tmp_path) == {"tensorboard/global": GLOBAL}


def test_the_global_models_loss_is_written_where_it_is_known(tmp_path):
    result = {**RESULT, "rounds": [{**entry, "loss": 2.0} for entry in RESULT["rounds"]]}
    tracking.add_global_curves("tensorboard", RunFolder(tmp_path), result, {})
    assert read_events(tmp_path)["tensorboard/global"]["val/loss"] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_without_a_tracker_nothing_is_written(tmp_path):
    tracking.add_global_curves("none", RunFolder(tmp_path), RESULT, {})
    tracking.collect("none", RunFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tracker", TRACKERS[1:])
def test_a_missing_tracker_package_is_named(monkeypatch, tracker):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else real(name))
    with pytest.raises(UserError, match=f"^--tracking {tracker} needs a package: .* -m pip install {tracker}$"):
        parse(["--tracking", tracker])


EXPORT = """
import importlib.machinery, importlib.util, sys
from unittest.mock import MagicMock

parts = {"mlflow": ["entities", "tracking", "tracking.client"], "wandb": []}
for tracker in parts:  # mock what is not installed: only names are looked up in it
    if importlib.util.find_spec(tracker) is None:
        for name in (tracker, *(f"{tracker}.{part}" for part in parts[tracker])):
            sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
import job
from federation.errors import exit_code
sys.exit(exit_code("job.py", job.main))
"""
ADDRESS = "https://ann:s3cret@mlflow.example"


def texts_in(value) -> list[str]:
    """All texts in a piece of JSON."""
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(("tracker", "address"), [*((tracker, None) for tracker in TRACKERS), ("mlflow", ADDRESS)])
def test_a_job_carries_no_password_and_no_path_of_the_submitters_machine(project, tmp_path, tracker, address):
    flags = ["--env", "prod", "--dataset", "digits", "--tracking", tracker, "--export", str(tmp_path / "job")]
    surroundings = {"WANDB_MODE": "offline", **({"MLFLOW_TRACKING_URI": address} if address else {})}
    run = project.run("-c", EXPORT, *flags, **surroundings)
    assert run.returncode == 0, run.stderr
    files = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert b"s3cret" not in content and str(tmp_path).encode() not in content, path
        texts = texts_in(json.loads(content)) if path.suffix == ".json" else []
        assert [text for text in texts if text.startswith("/") or "://" in text] == [], path


def test_the_server_uses_the_mlflow_of_its_own_environment(project, tmp_path, monkeypatch):
    from nvflare.fuel.utils.json_scanner import JsonScanner
    from nvflare.fuel.utils.wfconf import resolve_var_refs

    flags = ["--env", "prod", "--dataset", "digits", "--tracking", "mlflow", "--export", str(tmp_path / "job")]
    assert project.run("-c", EXPORT, *flags).returncode == 0

    def address() -> str | None:
        config = json.loads((tmp_path / "job" / "app" / "config" / "config_fed_server.json").read_text())
        resolve_var_refs(JsonScanner(config), {})  # as NVFlare's server does before it builds its components
        [receiver] = [component for component in config["components"] if component["path"].endswith("MLflowReceiver")]
        return receiver["args"]["tracking_uri"]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    assert address() == ADDRESS
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert address() is None  # a database in the job's folder on the server


def federate(tmp_path_factory, tracker, **environment) -> Project:
    """Two sites and three rounds in a copy of the project."""
    project = Project(tmp_path_factory.mktemp(tracker) / "project")
    flags = ["--dataset", "digits", "--n_clients", "2", "--num_rounds", "3", "--name", "tracked"]
    run = project.run("job.py", *flags, "--tracking", tracker, **environment)
    assert run.returncode == 0, run.stderr
    project.screen, project.errors = run.stdout, run.stderr
    project.result = json.loads((project.folder / "runs" / "tracked" / "results.json").read_text())
    return project


SITE_TAGS = {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc"}


@pytest.mark.slow
class TestWithTensorBoard:
    @pytest.fixture(scope="class")
    def project(self, tmp_path_factory, shared_cache):
        return federate(tmp_path_factory, "tensorboard")

    def test_all_curves_of_a_run_are_under_its_name(self, project):
        runs = {run for run in read_events(project.folder / "runs") if not run.startswith("latest/")}
        assert runs == {f"tracked/tensorboard/{name}" for name in ("global", "site-1", "site-2")}

    def test_a_sites_curves_match_the_result(self, project):
        curves = read_events(project.folder / "runs" / "tracked" / "tensorboard")
        for site in ("site-1", "site-2"):
            assert set(curves[site]) == SITE_TAGS
            known = [(entry["round"], pytest.approx(entry["sites"][site])) for entry in project.result["rounds"][:3]]
            assert curves[site]["val/acc"] == known
            assert [step for step, _ in curves[site]["test/acc"]] == [1, 2, 3]

    def test_the_global_models_curve_is_next_to_them(self, project):
        curves = read_events(project.folder / "runs" / "tracked" / "tensorboard")
        known = [(entry["round"], pytest.approx(entry["accuracy"])) for entry in project.result["rounds"]]
        assert curves["global"]["val/acc"] == known
        assert curves["global"]["test/acc"] == [(3, pytest.approx(project.result["test"]["accuracy"]))]

    def test_two_sites_and_three_rounds_print_at_most_30_lines(self, project):
        assert project.errors == ""
        assert len(project.screen.splitlines()) <= 30


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_site_and_the_global_model(tmp_path_factory, shared_cache):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    project = federate(tmp_path_factory, "mlflow")
    assert project.errors == ""
    client = MlflowClient(f"sqlite:///{project.folder}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "project"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(name.split("-tracked")[0][:6] for name in runs) == ["global", "site-1", "site-2"]
    for name, run in runs.items():
        assert run.data.tags["run_name"].endswith("tracked")
        assert set(run.data.metrics) >= ({"val/acc", "test/acc"} if name.startswith("global") else SITE_TAGS)
    (own,) = [run for name, run in runs.items() if name.startswith("global")]
    curve = [(m.step, m.value) for m in client.get_metric_history(own.info.run_id, "val/acc")]
    assert curve == [(entry["round"], pytest.approx(entry["accuracy"])) for entry in project.result["rounds"]]


@pytest.mark.slow
def test_wandb_works_offline(tmp_path_factory, shared_cache):
    pytest.importorskip("wandb")
    project = federate(tmp_path_factory, "wandb", WANDB_MODE="offline")
    assert project.errors == ""
    stored = dict(map(read_wandb, wandb_files(project)))
    assert sorted(name[:6] for name in stored) == ["global", "site-1", "site-2"]
    for name, history in stored.items():
        tags = {"val/acc", "test/acc"} if name.startswith("global") else SITE_TAGS
        assert set().union(*history) >= tags
    assert not (project.folder / "wandb").exists()


def wandb_files(project):
    return sorted((project.folder / "runs" / "tracked").glob("wandb/offline-run-*/*.wandb"))


def read_wandb(path):
    """(the run's name, its history) of an offline run's file: wandb's own messages in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    stored, name, history, message = path.read_bytes(), "", [], b""
    at, block = 7, 32768  # a header, then records that do not cross block boundaries
    while at + 7 <= len(stored):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(stored[at + 4 : at + 6], "little"), stored[at + 6]
        message += stored[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, message = wandb_internal_pb2.Record.FromString(message), b""
            name = record.run.display_name or name
            history.append({"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item})
    return name, history
