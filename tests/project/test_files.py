"""Files: JSON, a run's folder, progress files, NVFlare's logs."""

import json
import os

import pytest
import torch

from federation.errors import UserError
from federation.launch.nvflare_log import failed_sites, has_stopped, root_cause
from federation.protocol import PROGRESS, ROUNDS, JsonLines, append_json, read_json_lines, save_tensors, write_json
from federation.run import timing
from federation.run.folder import RunFolder


def test_a_number_that_json_lacks_becomes_null(tmp_path):
    value = {"loss": float("nan"), "all": [1.5, float("inf")], "nested": {"worst": -float("inf")}, "text": "NaN"}
    expected = {"loss": None, "all": [1.5, None], "nested": {"worst": None}, "text": "NaN"}
    write_json(tmp_path / "file.json", value)
    append_json(tmp_path / "lines.jsonl", value)
    for name in ("file.json", "lines.jsonl"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("write", [write_json, save_tensors])
def test_a_failed_write_leaves_the_file_unchanged(tmp_path, monkeypatch, write):
    file = tmp_path / "file"
    write(file, {"w": 1})
    before = file.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(file, {"w": 2})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_value_that_is_not_json_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"w": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_line_is_not_read(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "lines.jsonl").write_text('{"round": 0}\n{"rou')
    assert read_json_lines(tmp_path / "lines.jsonl") == [{"round": 0}]


def test_a_growing_file_is_read_only_once(tmp_path):
    file = tmp_path / "lines.jsonl"
    lines = JsonLines(file)
    assert lines.read() == []
    file.write_text('{"name": "Zo\u00eb"}\n{"na', encoding="utf-8")
    assert lines.read() == [{"name": "Zo\u00eb"}]
    with file.open("a") as stream:
        stream.write('me": "b"}\n[3]\n')
    assert lines.read() == [{"name": "b"}, [3]]
    assert lines.read() == []


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("federation.run.folder.PROJECT", tmp_path)
    return tmp_path / "runs"


class TestARun:
    def test_has_a_new_folder_with_a_relative_path(self, runs):
        named, dated, again = (RunFolder.create(name) for name in ("first", None, None))
        assert named.path == runs.relative_to(runs.parent) / "first"
        assert len({named.name, dated.name, again.name}) == 3
        assert all(run.path.is_dir() for run in (named, dated, again))

    def test_replaces_another_one_only_on_request(self, runs):
        RunFolder.create("first").log.touch()
        with pytest.raises(UserError, match="^runs/first exists: choose another --name, or add --overwrite"):
            RunFolder.create("first")
        assert list(RunFolder.create("first", overwrite=True).path.iterdir()) == []

    def test_is_found_by_its_name_its_path_and_as_the_latest(self, runs):
        for name in ("first", "second"):
            run = RunFolder.create(name)
            run.results.write_text("{}")
            run.point_latest()
        for name, found in {
            "first": "first",
            "runs/first/": "first",
            str(runs / "first"): "first",
            "latest": "second",
        }.items():
            assert RunFolder.find(name).path == runs / found
            assert RunFolder.find(name).name == found

    @pytest.mark.parametrize("name", ["nowhere", "unfinished", "runs/unfinished/file"])
    def test_without_a_result_is_rejected_in_one_line(self, runs, name):
        (RunFolder.create("unfinished").path / "file").touch()
        with pytest.raises(UserError, match=r"^/.*/results.json does not exist: finish a run with python job.py$"):
            RunFolder.find(name)

    def test_has_the_records_of_the_rounds_so_far(self, tmp_path):
        run = RunFolder(tmp_path)
        assert run.rounds() == []
        run.server.mkdir(parents=True)
        for number in range(3):
            append_json(run.server / ROUNDS, {"round": number})
            assert run.rounds() == [{"round": earlier} for earlier in range(number + 1)]
        assert RunFolder(tmp_path).rounds() == run.rounds()


WORK = [
    (0.0, "waiting"),
    (0.5, "validating"),
    (2.0, "training"),
    (10.25, "testing"),
    (11.0, "predicting"),
    (12.0, "waiting"),
]
FINAL = [(15.0, "evaluating"), (15.75, "waiting")]


class TestTiming:
    """The server starts at 1000 s and is done at 1030 s."""

    @pytest.fixture
    def run(self, tmp_path):
        return RunFolder(tmp_path)

    @pytest.fixture
    def announce(self, run):
        def write(site, announced, start=1010.0):
            file = run.server / PROGRESS if site == "server" else run.progress(site)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            for time, phase in announced:
                append_json(file, {"time": start + time, "phase": phase})

        write("server", [(-10, "starting"), (20, "done")])
        write("site-2", [(-9, "starting"), *WORK, *FINAL])
        write("site-10", [*WORK, *FINAL])
        return write

    def test_follows_the_recorded_phases(self, run, announce):
        append_json(run.progress("site-2"), {"time": 1026.0, "step": 1, "steps": 2, "speed": 0.5})
        found = timing.phases(run)
        assert list(found) == ["site-2", "site-10"]
        assert found["site-2"] == [
            (0.0, 10.0, "start"),
            (10.0, 10.5, "waiting"),
            (10.5, 12.0, "evaluating"),
            (12.0, 20.25, "computing"),
            (20.25, 22.0, "evaluating"),
            (22.0, 25.0, "waiting"),
            (25.0, 25.75, "evaluating"),
            (25.75, 30.0, "waiting"),
        ]
        sums = timing.totals(found)
        assert sums and sums["site-2"] == {"start": 10.0, "computing": 8.25, "evaluating": 4.0, "waiting": 7.75}

    def test_counts_a_restart_as_start(self, run, announce):
        announce("site-2", [*WORK, (13.0, "starting"), *FINAL])
        assert (23.0, 25.0, "start") in timing.phases(run)["site-2"]

    def test_never_runs_backwards_if_a_clock_is_ahead(self, run, announce):
        announce("site-2", [*WORK, *FINAL], start=1025.0)
        spans = timing.phases(run)["site-2"]
        assert all(0 <= start <= end <= 30 for start, end, _ in spans)

    def test_ends_with_the_last_record_if_the_server_did_not_finish(self, run, announce):
        announce("server", [(-10, "starting")])
        assert timing.phases(run)["site-2"][-1] == (25.75, 25.75, "waiting")

    def test_is_unknown_if_records_are_missing(self, run, announce):
        announce("site-2", WORK[:-1])
        assert timing.phases(run) == {}
        assert timing.totals({}) is None
        announce("site-2", WORK)
        (run.server / PROGRESS).unlink()
        assert timing.phases(run) == {}


FAULT = """2026-01-01 10:00:0{second},000 - TaskScriptRunner - ERROR - Traceback (most recent call last):
  File "/anywhere/nvflare/runner.py", line 1, in run
    main()
  File "/runs/first/workspace/{site}/simulate_job/app_{site}/custom/model.py", line 7, in training_step
    return images / 0
{error}
"""


class TestNVFlaresLog:
    @pytest.fixture
    def write(self, tmp_path):
        def write(site, text):
            (tmp_path / site).mkdir(exist_ok=True)
            (tmp_path / site / "log.txt").write_text(text)
            return tmp_path / site / "log.txt"

        return write

    def test_names_the_site_that_failed_first_and_the_line(self, tmp_path, write):
        assert root_cause(tmp_path) == ""
        write("server", FAULT.format(second=0, site="server", error="RuntimeError: not enough answers"))
        write("site-1", FAULT.format(second=4, site="site-1", error="ValueError: later"))
        write("site-2", FAULT.format(second=2, site="site-2", error="ZeroDivisionError: by zero"))
        lines = root_cause(tmp_path).splitlines()
        assert lines[0] == "site-2 failed: ZeroDivisionError: by zero (model.py, line 7)"
        assert lines[1:] == ["  model.py, line 7, in training_step: return images / 0"]

    def test_names_no_site_if_the_server_ended_the_run(self, tmp_path, write):
        write("server", FAULT.format(second=0, site="server", error="federation.errors.RunError: not finite"))
        assert root_cause(tmp_path) == ""

    def test_shows_when_the_server_has_stopped(self, write):
        assert not has_stopped(write("server", "a line\n" * 10_000))
        assert has_stopped(write("server", "a line\n" * 10_000 + "Server runner finished.\n" + "a line\n" * 100))

    def test_names_real_sites_that_failed_or_were_lost(self, write):
        lost = "Client south is deemed disconnected!\nClient north is deemed disconnected!\n"
        assert failed_sites(write("server", "Result from north is bad\n" + lost)) == (
            "north failed: see its own log; south was lost"
        )
