"""How a run is displayed, on a terminal and elsewhere, based on the progress that sites announce."""

import io
import re
import sys
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from federation.launch.display import Overview, duration, follow
from federation.protocol import PHASES, append_json, read_json_lines
from federation.run.folder import RunFolder
from federation.site import progress
from programs import HIDE, PROJECT, SHOW, on_a_terminal


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def site(run):
    """Make a site announce phases, by name, and speeds: (step, steps, speed)."""

    def announce(name, *announcements):
        file = run.progress(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        for each in announcements:
            if isinstance(each, str):
                progress.announce(file, each)
            else:
                append_json(file, dict(zip(("time", "step", "steps", "speed"), (0.0, *each), strict=True)))

    return announce


@pytest.fixture
def overview(run):
    def make(n_sites=2, num_rounds=3):
        return Overview(run, [f"site-{i + 1}" for i in range(n_sites)], num_rounds)

    return make


def record(number, accuracy, rejected=(), **sites):
    """The server's record of a round."""
    own = {
        name.replace("_", "-"): {"metrics": {"val_loss": 1.0, "val_acc": value}, "train": 8, "val": 2}
        for name, value in sites.items()
    }
    metrics = {"val_loss": 1.0, "val_acc": accuracy}
    return {"round": number, "metrics": metrics, "sites": own, "rejected": list(rejected)}


def screen(overview, now=0.0, width=80):
    console = Console(width=width, height=24, file=io.StringIO(), record=True)
    console.print(overview.render(now))
    return [line.rstrip() for line in console.export_text().rstrip("\n").split("\n")]


STEPS = {
    "starting": "starting",
    "validating": "validating",
    "training": "training",
    (24, 96, 12.54): "training, step 24 of 96, 12.5 steps/s",
    "testing": "testing",
    "predicting": "predicting",
    "waiting": "waiting",
    "evaluating": "evaluating",
}


def test_each_phase_of_a_round_is_shown(overview, site):
    assert set(STEPS) > set(PHASES)
    shown = overview(1)
    shown.update([], 0.0)
    assert any(line.split() == ["site-1", "starting"] for line in screen(shown))
    for announced, words in STEPS.items():
        site("site-1", announced)
        shown.update([], 0.0)
        assert any(row.split(maxsplit=1) == ["site-1", words] for row in screen(shown)), announced


def test_progress_is_read_in_whole_lines(overview, run, site):
    shown = overview(1)
    site("site-1")
    with run.progress("site-1").open("a") as file:
        file.write('{"time": 0.0, "phase": "trai')
        file.flush()
        shown.update([], 0.0)
        assert "starting" in "\n".join(screen(shown))
        file.write('ning"}\n')
    shown.update([], 0.0)
    assert "training" in "\n".join(screen(shown))


class Model(LightningModule):
    """One weight, four images of one pixel."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def loader(self):
        return DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=1)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def training_step(self, batch):
        return (self.weight * batch[0]).sum()

    def validation_step(self, batch):
        pass

    test_step = validation_step

    def predict_step(self, batch):
        return batch[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def work_with(callback):
    """What client.py does with a trainer, except that `fit` also validates."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer, model = Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], **quiet), Model()
    for act in (trainer.validate, trainer.fit, trainer.test, trainer.predict):
        act(model)


class TestASite:
    def test_announces_its_phases_and_training_speed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(progress, "FIRST_SPEED_S", 0.0)
        work_with(progress.Progress("none", tmp_path / "progress.jsonl"))
        records = read_json_lines(tmp_path / "progress.jsonl")
        phases = [record["phase"] for record in records if "phase" in record]
        assert phases == ["validating", "training", "testing", "predicting"]
        speeds = [record for record in records if "step" in record]
        assert [(record["step"], record["steps"]) for record in speeds] == [
            (1, 8),
            (8, 8),
        ]  # at most one per 2 s, plus the last
        assert all(record["speed"] > 0 for record in speeds)
        times = [record["time"] for record in records]
        assert times == sorted(times)

    def test_has_one_phase_in_an_evaluation(self, tmp_path):
        work_with(progress.Progress("none", tmp_path / "progress.jsonl", evaluating=True))
        records = read_json_lines(tmp_path / "progress.jsonl")
        assert {record["phase"] for record in records if "phase" in record} == {"evaluating"}

    def test_announces_nothing_without_a_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        work_with(progress.Progress("none", None))
        progress.announce(None, "starting")
        assert list(tmp_path.iterdir()) == []


def test_a_new_round_starts_without_the_speed_of_the_last_one(overview, site):
    shown = overview(1)
    site("site-1", "training", (96, 96, 12.5), "validating")
    shown.update([], 0.0)
    assert shown.fraction() == 0
    site("site-1", "training")
    shown.update([], 0.0)
    assert any(line.split() == ["site-1", "training"] for line in screen(shown))


def test_a_finished_round_prints_a_line_and_updates_the_accuracies(overview, site):
    shown = overview()
    site("site-1", "validating")
    assert shown.update([], 100.0) == []
    lines = shown.update([record(0, 0.25, site_1=0.2, site_2=0.3)], 110.0)
    assert lines == ["round 1 of 3 done in 10 s, accuracy 0.250 untrained, 20 s left"]
    assert shown.update([record(0, 0.25, site_1=0.2, site_2=0.3)], 111.0) == []
    lines = screen(shown, 115.0)
    assert "round 2 of 3" in lines[1] and "15 s left" in lines[1]
    assert [line.split()[:3] for line in lines[2:]] == [
        ["site-1", "accuracy", "0.200"],
        ["site-2", "accuracy", "0.300"],
    ]


def test_rounds_that_end_between_two_updates_get_a_line_each(overview):
    shown = overview()
    records = [record(number, 0.5) for number in range(3)]
    assert [line.split(" done")[0] for line in shown.update(records, 1.0)] == [f"round {n} of 3" for n in (1, 2, 3)]
    assert "final evaluation" in "\n".join(screen(shown))


def test_an_accuracy_says_which_model_it_belongs_to(overview):
    """Sites validate a global model when the next round begins, so the newest accuracy is not known yet."""
    shown = overview()
    assert "accuracy 0.100 untrained" in shown.update([record(0, 0.1)], 1.0)[0]
    assert "accuracy 0.100 untrained" in "\n".join(screen(shown))
    assert "accuracy 0.600 after round 1" in shown.update([record(0, 0.1), record(1, 0.6)], 2.0)[0]
    assert "accuracy 0.600 after round 1" in "\n".join(screen(shown))


def test_a_rejected_answer_is_printed_below_its_round(overview):
    reason = "tensor model.fc1.weight is not finite"
    rejected = [{"round": 0, "site": "site-2", "task": "train", "reason": reason}]
    lines = overview().update([record(0, 0.25, rejected, site_1=0.25)], 1.0)
    assert lines[1:] == [f"site-2: answer rejected: {reason}"]


def test_the_time_left_in_the_first_round_comes_from_its_steps(overview, site):
    shown = overview(2, num_rounds=2)
    site("site-1", "training", (50, 100, 5.0))
    site("site-2", "training", (25, 100, 2.5))
    shown.update([], 0.0)
    shown.update([], 10.0)
    assert shown.time_left(10.0) == "1 min 10 s left"  # a quarter in 10 s: 40 s per round


def test_metrics_with_other_names_are_not_an_error(overview):
    shown = overview()
    other = {"round": 0, "metrics": {}, "sites": {}}
    assert "accuracy - untrained" in shown.update([other], 0.0)[0]
    screen(shown)


def test_a_host_shows_the_site_that_it_runs_and_how_many_are_left(run):
    shown, file = Overview(run, ["host-1"], 1), run.progress("host-1")
    file.parent.mkdir(parents=True)
    for site, number in (("site-1", 1), ("site-3", 2)):
        append_json(file, {"time": 0.0, "site": site, "number": number, "sites": 4})
        progress.announce(file, "training")
    append_json(file, {"time": 0.0, "step": 24, "steps": 96, "speed": 12.54})
    shown.update([], 0.0)
    assert "host-1" in screen(shown)[2]
    assert screen(shown)[2].endswith("site-3 (2 of 4): training, step 24 of 96, 12.5 steps/s")
    assert shown.fraction() == pytest.approx((1 + 0.25) / 4)
    progress.announce(file, "waiting")
    shown.update([], 0.0)
    assert screen(shown)[2].endswith(" waiting")


@pytest.mark.parametrize("n_sites", [1, 2, 12, 16, 100, 1000])
@pytest.mark.parametrize("width", [80, 40])
def test_it_fits_the_screen(overview, site, n_sites, width):
    shown = overview(n_sites)
    for i in range(n_sites):
        site(f"site-{i + 1}", *list(STEPS)[: i % 8])
    sites = {f"site_{i + 1}": 0.5 for i in range(n_sites)}
    shown.update([record(0, 0.5, **sites)], 1.0)
    lines = screen(shown, 2.0, width)
    assert len(lines) <= 20
    assert max(map(len, lines)) <= width


def test_many_processes_are_counted_by_phase(overview, site):
    shown = overview(16)
    for i in range(5):
        site(f"site-{i + 1}", "training")
    shown.update([], 0.0)
    counted = [line.split()[:3] for line in screen(shown)[2:]]
    assert counted == [["11", "processes", "starting"], ["5", "processes", "training"]]


def test_without_a_terminal_there_is_one_line_per_round(capsys, run):
    with follow(run, ["site-1"], 2, verbose=False) as show:
        show("NVFlare's log\n", [])
        show("", [record(0, 0.25)])
        show("", [record(0, 0.25), record(1, 0.5)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("round 1 of 2 done") and "0.250" in first
    assert second.startswith("round 2 of 2 done") and "0.500" in second


def test_verbose_shows_nvflares_log_and_nothing_else(capsys, run):
    with follow(run, ["site-1"], 1, verbose=True) as show:
        show("Start FedAvg.\n", [])
        show("Finished FedAvg.\n", [record(0, 0.25)])
    assert capsys.readouterr().out == "Start FedAvg.\nFinished FedAvg.\n"


PROGRAM = """
import sys
from pathlib import Path
from federation.launch.display import follow
from federation.run.folder import RunFolder
with follow(RunFolder(Path(sys.argv[1])), ["site-1"], 2, verbose=False) as show:
    show("", [])
    print("site-2 is lost")
    show("", [{"round": 0, "metrics": {"val_acc": 0.25}, "sites": {}}])
    if sys.argv[2] != "none":
        raise {"interrupt": KeyboardInterrupt, "failure": ValueError}[sys.argv[2]]
print("the end")
"""


@pytest.mark.parametrize("ending", ["none", "interrupt", "failure"])
def test_a_terminal_is_left_as_it_was(run, site, ending):
    site("site-1", "training", (24, 96, 12.5))
    _, sent = on_a_terminal([sys.executable, "-c", PROGRAM, str(run.path), ending], PROJECT)
    assert b"training, step 24 of 96, 12.5 steps/s" in sent
    assert b"round 1 of 2 done" in sent
    assert re.search(rb"\x1b\[2Ksite-2 is lost *\r\n", sent)  # above the live view, which would otherwise erase it
    assert sent.count(HIDE) == sent.count(SHOW) == 1
    after = sent[sent.rindex(SHOW) :]
    if ending == "none":
        assert b"the end" in after
    else:
        assert b"\x1b[2K" not in after  # the last live view stays: where each site was


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (2700, "45 min"), (7500, "2 h 5 min")],
)
def test_a_duration_is_readable(seconds, text):
    assert duration(seconds) == text
