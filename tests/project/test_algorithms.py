"""The algorithms: rejected flags, FedOpt's start, and whole federations, repeated and resumed."""

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_opt.pt.fedopt import PTFedOptModelShareableGenerator

from federation.errors import UserError
from federation.launch import options as command_line
from federation.launch import recipes
from federation.run.folder import RunFolder
from federation.server.aggregation import ExactScaffold, StartFromCheckpoint
from programs import Project
from settings import ALGORITHMS
from trainer import make_model

MADE = {
    "dataset": "digits",
    **{"algorithm": "fedavg", "model_class": "LitNet"},
    **{"partition": "iid", "alpha": 0.5, "shards_per_site": 2, "n_clients": 2, "image_size": 32, "seed": 0},
    **{"num_rounds": 2, "batch_size": 8, "local_epochs": 3, "learning_rate": 0.02},
    "rounds": [{"round": number, "sites": {}} for number in range(3)],
    "model": "final.pt",
}
REFUSED = {
    "an unknown algorithm": (["--algorithm", "fedsgd"], "Invalid value for '--algorithm': 'fedsgd' is not one of"),
    "mu without fedprox": (["--fedprox_mu", "0.1"], "--fedprox_mu is a flag of fedprox: --algorithm fedavg does not"),
    "mu with scaffold": (["--algorithm", "scaffold", "--fedprox_mu", "1"], "--fedprox_mu is a flag of fedprox"),
    "a server's rate without a server's optimizer": (
        ["--algorithm", "fedprox", "--server_learning_rate", "1"],
        "--server_learning_rate is a flag of fedopt: --algorithm fedprox does not use it",
    ),
    "a server's momentum with fedavg": (["--server_momentum", "0.9"], "--server_momentum is a flag of fedopt"),
    "patience with scaffold": (
        ["--algorithm", "scaffold", "--patience", "3"],
        "--patience is a flag of fedavg and fedprox: --algorithm scaffold does not use it",
    ),
    "patience with fedopt": (
        ["--algorithm", "fedopt", "--patience", "3"],
        "--patience is a flag of fedavg and fedprox",
    ),
    "no patience at all": (["--patience", "0"], "Invalid value for '--patience': 0 is not in the range x>=1"),
    "a mu of zero": (
        ["--algorithm", "fedprox", "--fedprox_mu", "0"],
        "Invalid value for '--fedprox_mu': 0.0 is not in the range x>0",
    ),
    "a server that does not learn": (
        ["--algorithm", "fedopt", "--server_learning_rate", "0"],
        "Invalid value for '--server_learning_rate': 0.0 is not in the range x>0",
    ),
    "a momentum of one": (
        ["--algorithm", "fedopt", "--server_momentum", "1"],
        "Invalid value for '--server_momentum': 1.0 is not in the range 0<=x<1",
    ),
    "a missing run": (
        ["--resume", "nowhere"],
        "--resume nowhere: ",
    ),
    "an interrupted run": (["--resume", "broken"], "runs/broken/results.json does not exist: finish a run"),
    "a run of a newer version": (["--resume", "newer"], "has version 99, but this project reads up to 2"),
    "a broken result": (["--resume", "none"], "runs/none/results.json is broken"),
    "resuming from elsewhere": (["--resume", "/nowhere/first/"], "--resume /nowhere/first/: "),
    "resuming with other data": (
        ["--resume", "first", "--dataset", "cifar10"],
        "--dataset is cifar10, but digits in runs/first: a resumed run keeps its data, sites, seed and algorithm",
    ),
    "resuming with another partition": (
        ["--resume", "first", "--partition", "shards"],
        "--partition is shards, but iid",
    ),
    "resuming with more sites": (["--resume", "first", "--n_clients", "3"], "--n_clients is 3, but 2 in runs/first"),
    "resuming with another seed": (["--resume", "first", "--seed", "1"], "--seed is 1, but 0 in runs/first"),
    "resuming with another algorithm": (
        ["--resume", "first", "--algorithm", "fedprox"],
        "--algorithm is fedprox, but fedavg in runs/first",
    ),
    "resuming as a check": (["--resume", "first", "--check"], "--check does not resume a run: remove --resume"),
}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Runs to resume: one finished, one interrupted, one of another version, and more."""
    (tmp_path / "model.py").write_text("class LitNet(LightningModule): pass\n")
    monkeypatch.setattr(command_line, "PROJECT", tmp_path)
    monkeypatch.setattr("federation.run.folder.RUNS", tmp_path / "runs")
    oldest = Path(__file__).with_name("results_version_0.json").read_text()
    texts = {"first": json.dumps(MADE), "broken": None, "newer": '{"version": 99}', "oldest": oldest, "none": "null"}
    for name, text in texts.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        if text:
            (tmp_path / "runs" / name / "results.json").write_text(text)
    return tmp_path / "runs"


def parsed(*flags):
    return command_line.parse(list(flags))[0]


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_flags_are_rejected_in_one_line(runs, case):
    flags, message = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        parsed("--dataset", "digits", *flags) if "--resume" not in flags else parsed(*flags)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_rejected_flag_leaves_nothing_behind(project):
    run = project.run("job.py", "--algorithm", "scaffold", "--patience", "3")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("job.py: --patience is a flag of fedavg and fedprox")
    assert not (project.folder / "runs").exists()


def test_a_run_has_only_the_options_of_its_own_algorithm():
    own = {name for name, rules in command_line.RULES.items() if "algorithms" in rules}
    values = {name: {n: v for n, v in parsed("--algorithm", name).of_run().items() if n in own} for name in ALGORITHMS}
    assert values == {
        "fedavg": {"patience": None},
        "fedprox": {"fedprox_mu": 0.01, "patience": None},
        "scaffold": {},
        "fedopt": {"server_learning_rate": 1.0, "server_momentum": 0.9},
    }


def test_every_algorithm_has_a_recipe():
    assert list(ALGORITHMS) == list(recipes.ALGORITHMS)


def test_a_resumed_run_keeps_its_settings(runs):
    options, start = command_line.parse(["--resume", "first"])
    assert (options.batch_size, options.local_epochs, options.learning_rate) == (8, 3, 0.02)
    assert (start.first_round, start.model and start.model.resolve()) == (2, runs / "first" / "final.pt")
    assert parsed("--resume", "first", "--num_rounds", "7", "--learning_rate", "0.1").learning_rate == 0.1


@pytest.mark.parametrize("path", ["first/", "runs/first", "runs/first/", "./runs/first/", "runs/latest/"])
def test_a_run_is_resumed_by_its_path_as_a_shell_completes_it(runs, monkeypatch, path):
    (runs / "latest").symlink_to("first")
    monkeypatch.chdir(runs.parent)
    options, start = command_line.parse(["--resume", path])
    assert (options.resume, start.model and start.model.resolve()) == ("first", runs / "first" / "final.pt")


class TestAnUnfinishedRun:
    @pytest.fixture
    def stopped(self, runs) -> Path:
        """A run that was stopped in the fourth of six rounds, itself resumed after another's second."""
        folder = runs / "stopped"
        (folder / "bundle").mkdir(parents=True)
        server = RunFolder(folder).server
        server.mkdir(parents=True)
        options = {**MADE, "num_rounds": 4, "total_rounds": 6}
        (folder / "bundle" / "options.json").write_text(json.dumps(options))
        record = {"resumed": {"run": "first", "round": 2}, "stages": [{"rounds": 2}]}
        (folder / "start.json").write_text(json.dumps(record))
        torch.save({"round": 3, "model": {"w": torch.ones(2)}}, server / "last.pt")
        return folder

    def test_is_resumed_for_the_rounds_that_are_left(self, stopped):
        options, start = command_line.parse(["--resume", "stopped"])
        assert (options.num_rounds, options.total_rounds, options.batch_size) == (3, 6, 8)
        assert (start.first_round, start.model and start.model.resolve()) == (3, stopped / "last.pt")
        assert torch.load(stopped / "last.pt", weights_only=True)["w"].tolist() == [1, 1]
        own = {"batch_size": 8, "local_epochs": 3, "learning_rate": 0.02}
        assert start.stages == [{"rounds": 2}, {"rounds": 1, **own}]
        assert start.resumed == {"run": "stopped", "round": 3}
        assert parsed("--resume", "stopped", "--num_rounds", "1").num_rounds == 1

    def test_without_a_round_is_rejected(self, stopped):
        (RunFolder(stopped).server / "last.pt").unlink()
        with pytest.raises(UserError, match="no round of it has finished: start it again"):
            parsed("--resume", "stopped")

    def test_with_no_round_left_is_rejected_unless_more_are_asked_for(self, stopped):
        torch.save({"round": 6, "model": {}}, RunFolder(stopped).server / "last.pt")
        with pytest.raises(UserError, match="has finished all its 6 rounds, but not .*: add --num_rounds 1"):
            parsed("--resume", "stopped")
        options, start = command_line.parse(["--resume", "stopped", "--num_rounds", "1"])
        assert (options.num_rounds, start.first_round) == (1, 6)


BROKEN = {
    "no list of images": ("partition.json", None, "partition.json does not exist"),
    "a list of images that was cut short": ("partition.json", '{"cla', "partition.json is broken"),
    "a model that was cut short": ("final.pt", "PK", "final.pt does not load into LitNet"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_run_with_broken_files_is_not_resumed(runs, fault):
    from federation.launch.distribution import Distribution

    distribution = Distribution(["cat", "dog"], {}, {})
    (runs / "first" / "partition.json").write_text(json.dumps(dataclasses.asdict(distribution)))
    name, text, message = BROKEN[fault]
    (runs / "first" / name).write_text(text) if text else (runs / "first" / name).unlink()
    with pytest.raises(UserError) as refusal:
        options, start = command_line.parse(["--resume", "first"])
        options.classes = distribution.classes
        start.check(options, distribution)
    assert str(refusal.value).startswith("--resume first: ") and message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_newest_run_is_resumed_under_its_own_name(runs):
    (runs / "latest").symlink_to("first")
    assert parsed("--resume", "latest").resume == "first"


EXPORT = """
from pathlib import Path
import federation.site.quick_start
from federation.launch import recipes
from federation.launch.distribution import Distribution
from federation.launch.options import parse
from federation.launch.resume import Start
from federation.run.folder import RunFolder
for algorithm in recipes.ALGORITHMS:
    options, _ = parse(["--algorithm", algorithm, "--num_rounds", "3"])
    options.classes = ["cat", "dog", "owl"]
    run = RunFolder(Path(algorithm))
    run.path.mkdir()
    recipes.build(options, Distribution(options.classes, {}, {}), Start(first_round=2), run).export(algorithm)
"""


def test_the_servers_configuration_has_the_first_round_and_the_final_evaluation(project):
    run = project.run("-c", EXPORT)
    assert run.returncode == 0, run.stderr
    for algorithm in recipes.ALGORITHMS:
        config = project.folder / algorithm / "job" / "app" / "config" / "config_fed_server.json"
        server = json.loads(config.read_text())
        training, evaluation = server["workflows"]
        assert (training["args"]["start_round"], training["args"]["num_rounds"]) == (2, 3)
        assert evaluation["path"] == "federation.server.evaluation.FinalEvaluation"
        components = {component["id"]: component for component in server["components"]}
        assert "model_selector" not in components  # it would keep its own best model
        model = components["model"] if algorithm == "fedopt" else components["persistor"]["args"]["model"]
        assert (model["path"], model["args"]) == ("trainer.make_model", {})
        sent = json.loads((config.parent.parent / "custom" / "options.json").read_text())
        assert (sent["classes"], sent["algorithm"]) == (["cat", "dog", "owl"], algorithm)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)  # has buffers, one of them integers


def server_step(fixed: bool) -> tuple[dict, dict, dict]:
    """One step of FedOpt's server: the weights that the sites got, their mean change, and the new weights."""
    torch.manual_seed(0)
    server_model, checkpoint = Model(), Model()
    given = {name: value.numpy().copy() for name, value in checkpoint.state_dict().items()}
    components = {"model": server_model}
    engine = SimpleNamespace(
        get_component=components.get,
        build_component=lambda config: torch.optim.SGD(**config["args"]),
    )
    context = FLContext()
    context.get_engine = lambda: engine
    context.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(given, {}), private=True, sticky=True)
    generator = PTFedOptModelShareableGenerator({"path": "torch.optim.SGD", "args": {"lr": 1.0}}, device="cpu")
    generator.handle_event(EventType.START_RUN, context)
    if fixed:
        StartFromCheckpoint().handle_event(AppEventType.INITIAL_MODEL_LOADED, context)
    change = {name: np.full_like(value, 1 if value.dtype == np.int64 else 0.001) for name, value in given.items()}
    after = generator.shareable_to_learnable(DXO(DataKind.WEIGHT_DIFF, data=change).to_shareable(), context)
    return given, change, after[ModelLearnableKey.WEIGHTS]


def distance(a: dict, b: dict) -> float:
    """The Euclidean distance between two models' trainable weights."""
    learned = [name for name in a if not name.startswith("norm.")]
    return float(np.sqrt(sum(((np.asarray(a[name]) - np.asarray(b[name])) ** 2).sum() for name in learned)))


def test_fedopt_starts_from_the_weights_that_the_sites_got():
    given, change, after = server_step(fixed=True)
    for name in given:
        np.testing.assert_allclose(after[name], given[name] + change[name], atol=1e-6)


def test_fedopt_without_the_workaround_starts_from_other_weights():
    given, change, after = server_step(fixed=False)
    step = distance(change, dict.fromkeys(change, 0))
    assert distance(given, after) > 100 * step  # once NVFlare fixes this, remove StartFromCheckpoint


def scaffold_mean(monkeypatch, results: list[FLModel], n_all: int) -> FLModel:
    controller = ExactScaffold(n_sites=len(results), n_all=n_all, num_clients=len(results), num_rounds=1)
    controller.fl_ctx = None
    for silenced in ("event", "fire_event_with_data", "info", "debug"):
        monkeypatch.setattr(controller, silenced, lambda *_: None)
    return controller.aggregate(results)


def scaffold_results() -> list[FLModel]:
    random = np.random.RandomState(0)
    return [
        FLModel(
            params={"w": random.randn(50, 20).astype(np.float32)},
            metrics={"val_acc": random.rand()},
            meta={
                "client_name": f"site-{i}",
                MetaKey.NUM_STEPS_CURRENT_ROUND: 10 * i + 3,
                "val_images": i,
                AlgorithmConstants.SCAFFOLD_CTRL_DIFF: {"w": random.randn(50, 20).astype(np.float32)},
            },
        )
        for i in range(1, 6)
    ]


def test_scaffolds_sums_do_not_depend_on_the_order_of_arrival(monkeypatch):
    results, bits = scaffold_results(), set()
    for order in itertools.permutations(results):
        mean = scaffold_mean(monkeypatch, list(order), n_all=5)
        control = mean.meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF]["w"]
        bits.add((mean.params["w"].tobytes(), control.tobytes(), mean.metrics["val_acc"]))
    assert len(bits) == 1
    expected = np.average([r.params["w"] for r in results], axis=0, weights=[10 * i + 3 for i in range(1, 6)])
    np.testing.assert_allclose(mean.params["w"], expected, rtol=1e-4, atol=1e-6)


def test_scaffolds_global_variate_moves_by_the_share_of_the_sites_that_took_part(monkeypatch):
    all_took_part, half = (scaffold_mean(monkeypatch, scaffold_results(), n_all) for n_all in (5, 10))
    np.testing.assert_array_equal(half.params["w"], all_took_part.params["w"])
    changes = [mean.meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF]["w"] for mean in (half, all_took_part)]
    np.testing.assert_allclose(changes[0], changes[1] / 2, rtol=1e-6)


class Federations:
    """Whole federations on digits at non-IID sites. Results are cached."""

    USUAL = (
        *("--dataset", "digits", "--n_clients", "2", "--num_rounds", "2"),
        *("--partition", "dirichlet", "--alpha", "1"),
    )

    def __init__(self, project: Project):
        self.project = project
        self.results: dict[tuple, dict] = {}

    def run(self, *flags: str, again: str = "", **environment: str) -> dict:
        key = (flags, again)
        if key not in self.results:
            name = f"run{len(self.results)}"
            usual = () if "--resume" in flags else self.USUAL
            run = self.project.run("job.py", *usual, "--name", name, *flags, **{"OMP_NUM_THREADS": "1", **environment})
            assert run.returncode == 0, run.stderr
            result = json.loads((self.folder(name) / "results.json").read_text())
            self.results[key] = {**result, "name": name, "screen": run.stdout}
        return self.results[key]

    def folder(self, name: str) -> Path:
        return self.project.folder / "runs" / name

    def weights(self, result: dict, file: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder(result["name"]) / file, weights_only=True)


@pytest.fixture(scope="module")
def federations(tmp_path_factory, shared_cache) -> Federations:
    return Federations(Project(tmp_path_factory.mktemp("algorithms") / "project"))


OWN = {
    "fedavg": {},
    "fedprox": {"fedprox_mu": 0.01},
    "scaffold": {},
    "fedopt": {"server_learning_rate": 1.0, "server_momentum": 0.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", OWN)
def test_every_algorithm_trains_a_model_that_is_tested_and_loads(federations, algorithm, options):
    result = federations.run("--algorithm", algorithm)
    assert result["algorithm"] == algorithm
    own = [name for name, rules in command_line.RULES.items() if "algorithms" in rules]
    assert {name: result[name] for name in own if result.get(name)} == OWN[algorithm]
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    for entry in result["rounds"]:
        assert all(isinstance(accuracy, float) for accuracy in entry["sites"].values())
    for kept in (result, result["best"]):
        assert kept["test"]["accuracy"] > 0.15 and np.isfinite(kept["test"]["loss"])
        make_model(options()).load_state_dict(federations.weights(result, kept["model"]))
    others = [federations.run("--algorithm", other)["sha256"] for other in OWN if other != algorithm]
    assert result["sha256"] not in others
    first = federations.weights(result, "bundle/initial.pt")
    moved = distance({n: w.numpy() for n, w in first.items()}, federations.weights(result, "final.pt"))
    assert 0.01 < moved < 5  # from the initial weights; other random weights are 10 away


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", OWN)
@pytest.mark.parametrize("n_clients", ["2", "5"])
def test_the_same_seed_gives_the_same_bits(federations, algorithm, n_clients):
    flags = ("--algorithm", algorithm) if n_clients == "2" else ("--algorithm", algorithm, "--n_clients", n_clients)
    first = federations.run(*flags)
    second = federations.run(*flags, again="a second time")
    assert first["sha256"] == second["sha256"]
    assert [first[key] for key in ("rounds", "test", "best")] == [second[key] for key in ("rounds", "test", "best")]


@pytest.mark.slow
def test_another_seed_gives_another_model(federations):
    assert federations.run("--algorithm", "fedavg")["sha256"] != federations.run("--seed", "1")["sha256"]


@pytest.mark.slow
def test_two_rounds_and_two_resumed_rounds_equal_four_rounds(federations):
    at_once = federations.run("--num_rounds", "4")
    first = federations.run("--algorithm", "fedavg")
    then = federations.run("--resume", first["name"])
    assert then["resumed"] == {"run": first["name"], "round": 2}
    assert then["rounds"] == at_once["rounds"][2:]
    assert then["sha256"] == at_once["sha256"]
    assert f"resuming runs/{first['name']} after round 2\nthe sites' optimizers start fresh" in then["screen"]
    assert "round 4 of 4 done" in then["screen"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_that_is_resumed_equals_one_that_was_not_stopped(federations, number):
    at_once, name = federations.run("--num_rounds", "4"), f"stopped-by-{number}"
    process = federations.project.start(
        *("-u", "job.py", *federations.USUAL, "--num_rounds", "4", "--name", name), OMP_NUM_THREADS="1"
    )
    for line in process.stdout:
        if line.startswith("round 2 of 4 done"):
            process.send_signal(number)
    _, said = process.communicate(timeout=60)
    done = torch.load(RunFolder(federations.folder(name)).server / "last.pt", weights_only=True)["round"]
    assert done in (1, 2, 3)  # the last may have come after the line
    if number == signal.SIGINT:
        assert f"after round {done}, the last that finished; resume with: python job.py --resume {name}\n" in said
    shown = federations.project.run("results.py", name).stdout
    assert f"{name}: stopped after round" in shown
    then = federations.run("--resume", name)
    assert then["resumed"] == {"run": name, "round": done}
    assert then["rounds"] == at_once["rounds"][done:]
    assert then["sha256"] == at_once["sha256"]
    assert [stage["rounds"] for stage in then["stages"]] == [done, 4 - done]


@pytest.mark.slow
def test_patience_stops_a_run_that_does_not_improve(federations):
    flags = ("--num_rounds", "9", "--learning_rate", "1e-9", "--patience", "2")
    result = federations.run(*flags)
    assert result["stopped_early"] and result["patience"] == 2
    assert "stopped early: no better validation accuracy with --patience 2" in result["screen"]
    assert result["rounds"][-1]["round"] == 3  # the first round's model is the best; the next two do not improve on it
    assert result["best"]["round"] == max(result["rounds"][1:], key=lambda r: (r["accuracy"], r["round"]))["round"]
    from federation.run.outcome import fingerprint

    assert fingerprint(federations.weights(result, "final.pt")) == result["sha256"]


@pytest.mark.slow
def test_the_global_model_is_the_mean_of_the_sites_models_weighted_by_images(federations, options):
    import pytorch_lightning as pl

    from data import SiteDataModule
    from federation.launch.distribution import describe

    torch.set_num_threads(1)  # like the sites
    result = federations.run("--n_clients", "3", "--num_rounds", "1")
    made = options(partition="dirichlet", alpha=1.0, n_clients=3)
    distribution = describe(made)
    models, images = [], []
    for site in distribution.sites:
        data = SiteDataModule(site, made)
        model = make_model(made)
        model.load_state_dict(federations.weights(result, "bundle/initial.pt"))
        quiet: dict = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **quiet)
        trainer.fit(model, datamodule=data)
        models.append(model.state_dict())
        images.append(len(distribution.sites[site]["train"]))
    assert len(set(images)) == 3
    for name, weight in federations.weights(result, "final.pt").items():
        expected = np.average([model[name].double().numpy() for model in models], axis=0, weights=images)
        np.testing.assert_allclose(weight, expected, atol=1e-5)
