"""The algorithms: what is refused, where FedOpt begins, what whole federations give, twice and gone on from."""

import itertools
import json
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

from conftest import Project
from federation import command_line, recipes
from federation.aggregator import OrderedScaffold
from federation.fedopt import StartFromCheckpoint

MADE = {
    "dataset": "digits",
    "algorithm": "fedavg",
    **{"partition": "iid", "alpha": 0.5, "shards_per_site": 2, "n_clients": 2, "image_size": 32, "seed": 0},
    **{"num_rounds": 2, "batch_size": 8, "local_epochs": 3, "learning_rate": 0.02},
    "rounds": [{"round": 0}, {"round": 1}, {"round": 2}],
    "model": "final.pt",
}
REFUSED = {
    "an unknown algorithm": (["--algorithm", "fedsgd"], "argument --algorithm: invalid choice: 'fedsgd'"),
    "mu without fedprox": (["--fedprox_mu", "0.1"], "--fedprox_mu is a flag of fedprox: --algorithm fedavg has no use"),
    "mu with scaffold": (["--algorithm", "scaffold", "--fedprox_mu", "1"], "--fedprox_mu is a flag of fedprox"),
    "a server's rate without a server's optimizer": (
        ["--algorithm", "fedprox", "--server_learning_rate", "1"],
        "--server_learning_rate is a flag of fedopt: --algorithm fedprox has no use for it",
    ),
    "a server's momentum with fedavg": (["--server_momentum", "0.9"], "--server_momentum is a flag of fedopt"),
    "patience with scaffold": (
        ["--algorithm", "scaffold", "--patience", "3"],
        "--patience is a flag of fedavg and fedprox: --algorithm scaffold has no use for it",
    ),
    "patience with fedopt": (["--algorithm", "fedopt", "--patience", "3"], "--patience is a flag of fedavg and fedprox"),
    "no patience at all": (["--patience", "0"], "--patience is 0: it must be 1 or more"),
    "a mu of zero": (["--algorithm", "fedprox", "--fedprox_mu", "0"], "--fedprox_mu is 0.0: it must be a number above 0"),
    "a server that stands still": (
        ["--algorithm", "fedopt", "--server_learning_rate", "0"],
        "--server_learning_rate is 0.0: it must be a number above 0",
    ),
    "a momentum that never ends": (
        ["--algorithm", "fedopt", "--server_momentum", "1"],
        "--server_momentum is 1.0: it must be from 0 to below 1",
    ),
    "a run that is not there": (["--resume", "nowhere"], "runs/nowhere has no results.json: only a finished run can go on"),
    "a run that was broken off": (["--resume", "broken"], "runs/broken has no results.json"),
    "a run of another version": (["--resume", "old"], "its results.json has no 'rounds': another version made it"),
    "going on with other data": (
        ["--resume", "first", "--dataset", "cifar10"],
        "--dataset is cifar10, but digits in runs/first: a run goes on with the data, sites, seed and algorithm",
    ),
    "going on with another partition": (["--resume", "first", "--partition", "shards"], "--partition is shards, but iid"),
    "going on with more sites": (["--resume", "first", "--n_clients", "3"], "--n_clients is 3, but 2 in runs/first"),
    "going on with another seed": (["--resume", "first", "--seed", "1"], "--seed is 1, but 0 in runs/first"),
    "going on with another algorithm": (
        ["--resume", "first", "--algorithm", "fedprox"],
        "--algorithm is fedprox, but fedavg in runs/first",
    ),
    "going on as a check": (["--resume", "first", "--check"], "--check is a run of its own: leave out --resume"),
}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Runs to go on from: one that is finished, one that was broken off, one of another version."""
    monkeypatch.setattr(command_line, "PROJECT", tmp_path)
    for name, text in (("first", json.dumps(MADE)), ("broken", None), ("old", "{}")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if text:
            (tmp_path / "runs" / name / "results.json").write_text(text)
    return tmp_path / "runs"


def parsed(*flags):
    options = command_line.parse(list(flags))
    command_line.validate(options)
    return options


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(runs, case):
    flags, message = REFUSED[case]
    with pytest.raises(command_line.UsageError) as refusal:
        parsed("--dataset", "digits", *flags) if "--resume" not in flags else parsed(*flags)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_refused_flag_leaves_nothing_behind(project):
    run = project.run("job.py", "--algorithm", "scaffold", "--patience", "3")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("job.py: --patience is a flag of fedavg and fedprox")
    assert not (project.folder / "runs").exists()


def test_an_algorithm_has_its_own_defaults_and_no_other_flag():
    own = ("fedprox_mu", "server_learning_rate", "server_momentum", "patience")
    values = {name: [getattr(parsed("--algorithm", name), flag) for flag in own] for name in command_line.ALGORITHMS}
    assert values == {
        "fedavg": [None, None, None, None],
        "fedprox": [0.01, None, None, None],
        "scaffold": [None, None, None, None],
        "fedopt": [None, 1.0, 0.9, None],
    }


def test_every_algorithm_that_is_offered_is_built():
    assert list(command_line.ALGORITHMS) == list(recipes.ALGORITHMS)


def test_a_run_goes_on_with_its_own_settings(runs):
    options = parsed("--resume", "first")
    assert (options.batch_size, options.local_epochs, options.learning_rate) == (8, 3, 0.02)
    assert (options.first_round, options.resume_from) == (2, runs / "first" / "final.pt")
    assert parsed("--resume", "first", "--num_rounds", "7", "--learning_rate", "0.1").learning_rate == 0.1


def test_the_newest_run_goes_on_under_its_own_name(runs):
    (runs / "latest").symlink_to("first")
    assert parsed("--resume", "latest").resume == "first"


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)  # has buffers, one of them of integers


def server_step(mended: bool) -> tuple[dict, dict, dict]:
    """One step of FedOpt's server: what the sites were given, their mean change, and what became of it."""
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
    if mended:
        StartFromCheckpoint().handle_event(AppEventType.INITIAL_MODEL_LOADED, context)
    change = {name: np.full_like(value, 1 if value.dtype == np.int64 else 0.001) for name, value in given.items()}
    after = generator.shareable_to_learnable(DXO(DataKind.WEIGHT_DIFF, data=change).to_shareable(), context)
    return given, change, after[ModelLearnableKey.WEIGHTS]


def distance(a: dict, b: dict) -> float:
    """The Euclidean distance of two models, over what is learned."""
    learned = [name for name in a if not name.startswith("norm.")]
    return float(np.sqrt(sum(((np.asarray(a[name]) - np.asarray(b[name])) ** 2).sum() for name in learned)))


def test_fedopt_steps_from_the_weights_that_the_sites_were_given():
    given, change, after = server_step(mended=True)
    for name in given:
        np.testing.assert_allclose(after[name], given[name] + change[name], atol=1e-6)


def test_fedopt_alone_steps_from_other_weights():
    given, change, after = server_step(mended=False)
    step = distance(change, dict.fromkeys(change, 0))
    assert distance(given, after) > 100 * step  # once NVFlare mends it, federation/fedopt.py can go


def test_scaffold_adds_up_in_the_order_of_names(monkeypatch):
    random = np.random.RandomState(0)
    results = [
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
    from nvflare.app_common.workflows.scaffold import scaffold_aggregate_fn

    controller = OrderedScaffold()
    controller.fl_ctx = None
    for silenced in ("event", "fire_event_with_data", "info", "debug"):
        monkeypatch.setattr(controller, silenced, lambda *_: None)
    bits = set()
    for order in itertools.permutations(results):
        mean = controller.aggregate(list(order), scaffold_aggregate_fn)
        control = mean.meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF]["w"]
        bits.add((mean.params["w"].tobytes(), control.tobytes(), mean.metrics["val_acc"]))
    assert len(bits) == 1
    by_hand = np.average([r.params["w"] for r in results], axis=0, weights=[10 * i + 3 for i in range(1, 6)])
    np.testing.assert_allclose(mean.params["w"], by_hand, rtol=1e-4, atol=1e-6)
