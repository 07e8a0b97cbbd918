"""What the screen shows of a run: by the logs that the sites write, on a terminal and elsewhere."""

import io
import re
import sys

import pytest
from rich.console import Console

from conftest import HIDE, PROJECT, SHOW, on_a_terminal
from federation.launch.display import Progress, duration, follow

TIME = "2026-01-01 10:00:00,000 - TaskScriptRunner - INFO - "


@pytest.fixture
def site(tmp_path):
    """Write lines to a site's log, as NVFlare does with what client.py prints."""

    def write(name, *lines):
        with (tmp_path / f"{name}.txt").open("a") as log:
            log.writelines(f"{TIME}{line}\n" for line in lines)

    return write


@pytest.fixture
def progress(tmp_path):
    def make(n_sites=2, num_rounds=3):
        return Progress({f"site-{i + 1}": tmp_path / f"site-{i + 1}.txt" for i in range(n_sites)}, num_rounds)

    return make


def record(number, accuracy, rejected=(), **sites):
    """The server's record of a round."""
    own = {
        name.replace("_", "-"): {"metrics": {"val_loss": 1.0, "val_acc": value}, "train": 8, "val": 2}
        for name, value in sites.items()
    }
    metrics = {"val_loss": 1.0, "val_acc": accuracy}
    return {"round": number, "metrics": metrics, "sites": own, "rejected": list(rejected)}


def screen(progress, now=0.0, width=80):
    console = Console(width=width, height=24, file=io.StringIO(), record=True)
    console.print(progress.picture(now))
    return [line.rstrip() for line in console.export_text().rstrip("\n").split("\n")]


STEPS = {
    "--- validate global model ---": "validating",
    "--- train new model ---": "training",
    "step 24 of 96, 12.5 steps/s": "training, step 24 of 96, 12.5 steps/s",
    "--- test new model ---": "sent, testing",
    "--- prediction with new model ---": "sent, predicting",
    "--- wait for the server ---": "sent, waiting",
    "[Site = site-1] --- evaluate global model ---": "evaluating",
}


def test_each_step_of_a_round_is_shown(progress, site):
    run = progress(1)
    run.update([], 0.0)
    assert any(line.split() == ["site-1", "starting"] for line in screen(run))
    for line, shown in STEPS.items():
        site("site-1", line)
        run.update([], 0.0)
        assert any(row.split(maxsplit=1) == ["site-1", shown] for row in screen(run)), line


def test_the_log_is_read_in_whole_lines(progress, site, tmp_path):
    run = progress(1)
    with (tmp_path / "site-1.txt").open("a") as log:
        log.write(f"{TIME}--- train new")
        log.flush()
        run.update([], 0.0)
        assert "starting" in "\n".join(screen(run))
        log.write(" model ---\n")
    run.update([], 0.0)
    assert "training" in "\n".join(screen(run))


def test_the_client_prints_what_the_display_looks_for():
    from federation.launch.display import STATES

    text = (PROJECT / "client.py").read_text()
    for words in STATES:
        assert words in text


def test_a_new_round_begins_without_the_speed_of_the_last(progress, site):
    run = progress(1)
    site("site-1", "--- train new model ---", "step 96 of 96, 12.5 steps/s", "--- validate global model ---")
    site("site-1", "--- train new model ---")
    run.update([], 0.0)
    assert any(line.split() == ["site-1", "training"] for line in screen(run))


def test_a_round_gives_a_line_and_the_newest_accuracies(progress, site):
    run = progress()
    site("site-1", "--- validate global model ---")
    assert run.update([], 100.0) == []
    lines = run.update([record(0, 0.25, site_1=0.2, site_2=0.3)], 110.0)
    assert lines == ["round 1 of 3 done in 10 s, accuracy 0.250 untrained, 20 s left"]
    assert run.update([record(0, 0.25, site_1=0.2, site_2=0.3)], 111.0) == []
    shown = "\n".join(screen(run, 115.0))
    assert "round 2 of 3" in shown and "15 s left" in shown
    assert [line.split()[:3] for line in shown.split("\n")[2:]] == [
        ["site-1", "accuracy", "0.200"],
        ["site-2", "accuracy", "0.300"],
    ]


def test_rounds_that_end_between_two_looks_have_a_line_each(progress):
    run = progress()
    records = [record(number, 0.5) for number in range(3)]
    assert [line.split(" done")[0] for line in run.update(records, 1.0)] == [f"round {n} of 3" for n in (1, 2, 3)]
    assert "final evaluation" in "\n".join(screen(run))


def test_an_accuracy_names_the_model_that_it_is_of(progress):
    """The sites validate a global model when the next round begins, so that the newest one is not known yet."""
    run = progress()
    assert "accuracy 0.100 untrained" in run.update([record(0, 0.1)], 1.0)[0]
    assert "accuracy 0.100 untrained" in "\n".join(screen(run))
    assert "accuracy 0.600 after round 1" in run.update([record(0, 0.1), record(1, 0.6)], 2.0)[0]
    assert "accuracy 0.600 after round 1" in "\n".join(screen(run))


def test_a_rejected_answer_is_told_below_its_round(progress):
    reason = "tensor model.fc1.weight is not finite"
    rejected = [{"round": 0, "site": "site-2", "task": "train", "reason": reason}]
    lines = progress().update([record(0, 0.25, rejected, site_1=0.25)], 1.0)
    assert lines[1:] == [f"site-2: the server rejected its answer: {reason}"]


def test_the_first_rounds_time_comes_from_its_steps(progress, site):
    run = progress(2, num_rounds=2)
    site("site-1", "--- train new model ---", "step 50 of 100, 5.0 steps/s")
    site("site-2", "--- train new model ---", "step 25 of 100, 2.5 steps/s")
    run.update([], 0.0)
    run.update([], 10.0)
    assert run.time_left(10.0) == "1 min 10 s left"  # a quarter in 10 s: 40 s a round


def test_metrics_of_other_names_are_no_fault(progress):
    run = progress()
    other = {"round": 0, "metrics": {}, "sites": {}}
    assert "accuracy - untrained" in run.update([other], 0.0)[0]
    screen(run)


@pytest.mark.parametrize("n_sites", [1, 2, 12, 16, 100, 1000])
@pytest.mark.parametrize("width", [80, 40])
def test_it_fits_the_screen(progress, site, n_sites, width):
    run = progress(n_sites)
    for i in range(n_sites):
        site(f"site-{i + 1}", *list(STEPS)[: i % 8])
    sites = {f"site_{i + 1}": 0.5 for i in range(n_sites)}
    run.update([record(0, 0.5, **sites)], 1.0)
    shown = screen(run, 2.0, width)
    assert len(shown) <= 20
    assert max(map(len, shown)) <= width


def test_many_sites_are_counted_by_what_they_do(progress, site):
    run = progress(16)
    for i in range(5):
        site(f"site-{i + 1}", "--- train new model ---")
    run.update([], 0.0)
    counted = [line.split()[:3] for line in screen(run)[2:]]
    assert counted == [["11", "sites", "starting"], ["5", "sites", "training"]]


def test_without_a_terminal_there_is_one_line_a_round(capsys, tmp_path):
    with follow({"site-1": tmp_path / "none.txt"}, 2, verbose=False) as show:
        show("NVFlare's log\n", [])
        show("", [record(0, 0.25)])
        show("", [record(0, 0.25), record(1, 0.5)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("round 1 of 2 done") and "0.250" in first
    assert second.startswith("round 2 of 2 done") and "0.500" in second


def test_verbose_shows_nvflares_log_and_nothing_else(capsys, tmp_path):
    with follow({"site-1": tmp_path / "none.txt"}, 1, verbose=True) as show:
        show("Start FedAvg.\n", [])
        show("Finished FedAvg.\n", [record(0, 0.25)])
    assert capsys.readouterr().out == "Start FedAvg.\nFinished FedAvg.\n"


PROGRAM = """
import sys
from pathlib import Path
from federation.launch.display import follow
with follow({"site-1": Path(sys.argv[1])}, 2, verbose=False) as show:
    show("", [])
    print("site-2 is lost")
    show("", [{"round": 0, "metrics": {"val_acc": 0.25}, "sites": {}}])
    if sys.argv[2] != "none":
        raise {"interrupt": KeyboardInterrupt, "failure": ValueError}[sys.argv[2]]
print("the end")
"""


@pytest.mark.parametrize("ending", ["none", "interrupt", "failure"])
def test_a_terminal_is_left_as_it_was(tmp_path, ending):
    log = tmp_path / "log.txt"
    log.write_text(f"{TIME}--- train new model ---\n{TIME}step 24 of 96, 12.5 steps/s\n")
    _, sent = on_a_terminal([sys.executable, "-c", PROGRAM, str(log), ending], PROJECT)
    assert b"training, step 24 of 96, 12.5 steps/s" in sent
    assert b"round 1 of 2 done" in sent
    assert re.search(rb"\x1b\[2Ksite-2 is lost *\r\n", sent)  # above the live view, which would else erase it
    assert sent.count(HIDE) == sent.count(SHOW) == 1
    after = sent[sent.rindex(SHOW) :]
    if ending == "none":
        assert b"the end" in after
    else:
        assert b"\x1b[2K" not in after  # the last picture stays: where each site was


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (2700, "45 min"), (7500, "2 h 5 min")],
)
def test_a_duration_is_written_as_it_is_said(seconds, text):
    assert duration(seconds) == text
