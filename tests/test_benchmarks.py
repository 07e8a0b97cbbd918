"""The benchmark's arithmetic, and a small run of every part."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import accuracy
import tables
import timeline
import workload
from template import TEMPLATE

LOG = "10:00:05 - conn_manager - INFO - Connection [CN00002 127.0.0.1:1 => 127.0.0.1:2] is created: PID: 4711"
PHASES = {
    5.0: "starting",
    10.5: "validating",
    11.0: "training",
    21.0: "testing",
    21.5: "predicting",
    22.0: "waiting",
    23.25: "evaluating",
    24.0: "evaluating",
}
PROGRESS = [json.dumps({"time": time, "phase": phase}) for time, phase in PHASES.items()]
PROGRESS.insert(3, json.dumps({"time": 12.0, "step": 3, "steps": 9, "speed": 0.3}))
SECONDS = st.floats(0.01, 1000)


def make_phases(start: float, rounds: int, validate: float, fit: float, test: float, rest: float):
    """One site's phases in a run, and the time of the last one."""
    now, phases = start, []
    for _ in range(rounds):
        for name, lasts in (("validate", validate), ("train", fit), ("test", test), ("predict", test + rest)):
            phases.append((now, name))
            now += lasts
    return [*phases, (now, "evaluate")], now


def test_phases_are_read_in_order():
    phases = timeline.read_phases("\n".join(PROGRESS))
    assert [name for _, name in phases] == ["validate", "train", "test", "predict", "evaluate"]
    assert [round(time - phases[0][0], 3) for time, _ in phases] == [0, 0.5, 10.5, 11, 12.75]
    assert timeline.read_process_ids(LOG) == {4711}


def test_a_round_ends_when_the_next_round_or_the_evaluation_begins():
    (one,) = timeline.split_rounds(timeline.read_phases("\n".join(PROGRESS)))
    assert one["test"] - one["train"] == 10
    assert one["end"] - one["validate"] == 12.75


@pytest.mark.parametrize("lost", ["validating", "training", "testing", "predicting", "evaluating"])
def test_progress_with_a_missing_phase_is_rejected(lost):
    kept = "\n".join(line for line in PROGRESS if lost not in line)
    with pytest.raises(timeline.IncompleteLog):
        timeline.split_rounds(timeline.read_phases(kept))


@given(start=SECONDS, end=SECONDS, rounds=st.integers(1, 5), validate=SECONDS, fit=SECONDS, test=SECONDS, rest=SECONDS)
def test_the_costs_add_up_to_the_wall_time_and_predict_any_number_of_rounds(
    start, end, rounds, validate, fit, test, rest
):
    phases, last = make_phases(start, rounds, validate, fit, test, rest)
    cost = timeline.cost(0, last + end, [phases, phases], steps=10, predict_over_test=1)
    assert math.isclose(timeline.predict_wall(cost, rounds), last + end)
    assert math.isclose(cost["overhead_s"], rest, rel_tol=1e-6, abs_tol=1e-6)
    longer, last = make_phases(start, 20, validate, fit, test, rest)
    assert math.isclose(timeline.predict_wall(cost, 20), last + end, rel_tol=1e-6)


@given(start=SECONDS, validate=SECONDS, fit=SECONDS, test=SECONDS, rest=SECONDS)
def test_costs_of_few_images_predict_many(start, validate, fit, test, rest):
    few, last = make_phases(start, 2, validate, fit, test, rest)
    cost = timeline.cost(0, last + validate + test, [few], steps=10, predict_over_test=1)
    _, last = make_phases(start, 2, 7 * validate, 7 * fit, 7 * test, rest)
    assert math.isclose(timeline.predict_wall(cost, 2, scale=7), last + 7 * (validate + test), rel_tol=1e-6)


def test_prediction_time_is_relative_to_test_time():
    phases = [(0, "validate"), (1, "train"), (2, "test"), (6, "predict"), (9, "predicted"), (9.5, "evaluate")]
    assert timeline.predict_over_test([phases, phases]) == 0.75
    assert [name for _, name in timeline.without_predicted(phases)][-2:] == ["predict", "evaluate"]


def part_of(walls: dict[str, list[float]]) -> dict:
    zero = {"fit_s": 1.0, "final_evaluation_s": 1.0, "to_training_s": 6.0, "overhead_s": 1.0, "accuracy": 0.5}
    return {
        "runs": [{"what": what, "wall_s": wall, **zero} for what, own in walls.items() for wall in own],
        "commands": [{"what": what, "wall_s": 0.4} for what in ("imports", "help", "wrong flag") for _ in range(2)],
    }


def test_ratios_are_of_neighbors_and_judged_by_their_median():
    rows = tables.metrics({"speed": part_of({"limit": [10.0, 20.0], "project": [15.0, 60.0]})})
    by_name = {row["metric"]: row for row in rows}
    whole = by_name["wall time / plain loop"]
    assert (whole["min"], whole["median"], whole["max"], whole["n"]) == (1.5, 2.25, 3.0, 2)
    assert not whole["met"]
    assert by_name["job.py, help"]["met"]


def test_runs_are_grouped_by_size():
    run = {"limit": {"n_train": 9}, "few": {"n_train": 3}, "full": {"n_train": 9}}
    few = {"runs": [run["few"]], "full": run["full"]}
    assert tables.by_size({"speed": {"runs": [run["limit"]]}, "textbook": few}) == [
        [run["limit"], run["full"]],
        [run["few"]],
    ]
    assert tables.by_size({"textbook": {**few, "full": None}}) == [[run["few"]]]
    assert tables.by_size({}) == []


def test_generated_images_are_the_same_each_time(tmp_path):
    one, other = (workload.generate(tmp_path / name, {"train": 2, "test": 1}) for name in ("one", "other"))
    files = [path.relative_to(one) for path in sorted(one.rglob("*.png"))]
    assert len(files) == 10 * (2 + 1)
    assert [(one / name).read_bytes() for name in files] == [(other / name).read_bytes() for name in files]
    assert len({(one / name).read_bytes() for name in files}) == len(files)


def test_a_subset_has_the_same_share_of_each_class(tmp_path):
    whole = workload.generate(tmp_path / "whole", {"train": 4, "test": 2})
    part = workload.subset(whole, tmp_path / "part", 2)
    assert {len(list(one.iterdir())) for one in (part / "train").iterdir()} == {2}
    assert len(list((part / "test").glob("*/*.png"))) == 10


SAME_IMAGES = """
import sys, torch, data, images
from settings import Options
options = Options(dataset="image_folder", data_root=sys.argv[1], batch_size=7, n_clients=2, partition="none", gpu=False)
textbook, project = (module.SiteDataModule("site-1", options) for module in (data, images))
for module in (textbook, project):
    module.setup()
for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
    (x, labels), (y, expected) = (map(torch.cat, zip(*getattr(m, name)())) for m in (textbook, project))
    assert torch.allclose(x, y, atol=1e-6) and torch.equal(labels, expected), name
assert len(textbook.train_dataloader()) == len(project.train_dataloader())
"""


@pytest.mark.slow
def test_the_textbook_way_sees_the_same_images(tmp_path):
    data = workload.generate(tmp_path / "data", {"train": 10, "test": 2})
    programs = workload.Programs(tmp_path, batch_size=7, learning_rate=0.01)
    program = [sys.executable, "-c", SAME_IMAGES, str(data)]
    subprocess.run(program, cwd=programs.textbook, env=programs.environment, check=True)


@pytest.mark.slow
def test_a_quick_run_measures_every_part(tmp_path):
    command = [sys.executable, "benchmarks/speed.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=TEMPLATE, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    parts = results["parts"]
    assert parts.keys() == {"speed", "textbook", "rounds", "clients"}
    assert {run["what"] for run in parts["textbook"]["runs"]} == {"limit", "project", "textbook"}
    for part in parts.values():
        for run in part["runs"]:
            assert run["wall_s"] > run["fit_s"] * run["rounds"] > 0, run
            assert math.isclose(timeline.predict_wall(run, run["rounds"]), run["wall_s"]), run
    assert [row["metric"] for row in results["metrics"] if row["median"] is None] == []
    for row in results["metrics"]:
        assert row["metric"] in (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_images_is_rejected(tmp_path):
    command = [sys.executable, "benchmarks/speed.py", "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=TEMPLATE, text=True, capture_output=True)
    assert done.returncode == 2
    assert f"{tmp_path} has no folders train and test" in done.stderr


def test_the_accuracy_table_has_mean_spread_and_number_of_seeds():
    finals = [
        ("fedavg", "iid", 0.4),
        ("fedavg", "iid", 0.6),
        ("fedavg", "dirichlet-0.5", 0.3),
        ("scaffold", "iid", 0.2),
    ]
    rows = [{"algorithm": algorithm, "partition": partition, "final": final} for algorithm, partition, final in finals]
    lines = accuracy.markdown({"data": "mine", "n_clients": 3, "num_rounds": 4}, rows).splitlines()
    assert "| fedavg | 0.500 ± 0.141 (2) | 0.300 (1) | - |" in lines
    assert "| scaffold | 0.200 (1) | - | - |" in lines


def test_a_runs_name_contains_all_that_it_depends_on():
    """A finished run with the same name is not repeated."""
    options = accuracy.parse(["--n_clients", "3", "--num_rounds", "4"])
    names = {
        accuracy.command(options, algorithm, partition, seed)[0]
        for algorithm in accuracy.ALGORITHMS
        for partition in accuracy.PARTITIONS
        for seed in (0, 1)
    }
    assert len(names) == 24
    assert all("3x4" in name for name in names)
