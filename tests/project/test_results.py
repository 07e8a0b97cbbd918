"""results.py and results.json: what is shown, which files can be read, what is rejected."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import results
from federation.errors import exit_code
from federation.protocol import ROUNDS, append_json
from federation.run import schema
from federation.run.folder import RunFolder
from programs import PROJECT
from settings import Options
from synthetic import write_run

OLDER = Path(__file__).with_name("results_version_0.json")  # written before the file had a version
REFERENCE = (PROJECT / "REFERENCE.md").read_text(encoding="utf-8")
COUNTS = {f"site-{i}": {"cat": 10 * i, "dog": 5} for i in (1, 2, 3)}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder of runs with one in it, `first`."""
    for module in ("federation.run.folder", "results"):
        monkeypatch.setattr(f"{module}.RUNS", tmp_path)
    add_run(tmp_path / "first")
    return tmp_path


def add_run(folder, **changes):
    folder.mkdir()
    result = json.loads(OLDER.read_text(encoding="utf-8"))
    (folder / "results.json").write_text(json.dumps({**result, **changes}), encoding="utf-8")
    (folder / "partition.json").write_text(json.dumps({"counts": COUNTS}), encoding="utf-8")


@pytest.fixture
def program(monkeypatch, capsys):
    """Run results.py in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["results.py", *arguments])
        code = exit_code("results.py", results.main)
        return code, *capsys.readouterr()

    return run


class TestASchema:
    def test_of_an_older_version_is_read(self, runs):
        result = schema.read(RunFolder(runs / "first"))
        assert result["version"] == 0
        assert result["rounds"][3]["accuracy"] == 0.22622622459291578
        assert result["rounds"][3]["loss"] is None
        assert result["rounds"][3]["losses"] == {"site-1": None, "site-2": None, "site-3": None}
        assert result["rounds"][3]["participants"] is None
        assert (result["sha256"], result["timing"], result["versions"]) == (None, None, {})

    def test_of_this_version_is_read_unchanged(self, runs):
        add_run(runs / "second", version=schema.VERSION, sha256="12ab", versions={"torch": "3.0"})
        result = schema.read(RunFolder(runs / "second"))
        assert (result["version"], result["sha256"], result["versions"]) == (schema.VERSION, "12ab", {"torch": "3.0"})

    def test_documents_every_key_that_a_run_writes(self, runs):
        for key in schema.read(RunFolder(runs / "first")).keys() - {"state"}:  # which is not in the file
            assert f"`{key}`" in REFERENCE or hasattr(Options(), key), key

    def test_records_the_versions_of_dependencies(self):
        versions = schema.versions()
        assert set(versions) == {"python", "nvflare", "torch", "pytorch-lightning"}
        assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert versions["python"] == sys.version.split()[0]
        assert versions["pytorch-lightning"] == importlib.metadata.version("pytorch_lightning")


BROKEN = {
    "newer": ('{"version": 99}', "has version 99, but this project reads up to 2"),
    "cut short": ('{"version": 2, "rou', "is broken: run python job.py again"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("flags", [(), ("--html",), ("first",)], ids=["shown", "as a page", "next to another"])
def test_an_unreadable_file_is_rejected_in_one_line(runs, program, fault, flags):
    text, message = BROKEN[fault]
    add_run(runs / "bad")
    (runs / "bad" / "results.json").write_text(text, encoding="utf-8")
    code, out, err = program("bad", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("results.py: ") and err.count("\n") == 1
    assert message in err
    assert not list(runs.rglob("*.html"))


def test_a_missing_run_is_rejected_in_one_line(runs, program):
    code, out, err = program("first", "second")
    assert (code, out) == (2, "")
    assert err == f"results.py: {runs / 'second' / 'results.json'} does not exist: finish a run with python job.py\n"


@pytest.mark.parametrize("path", ["first/", "runs/first", "runs/first/", "./runs/first/", "runs/latest/"])
def test_a_run_can_be_given_as_a_path_completed_by_the_shell(tmp_path, monkeypatch, program, path):
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("federation.run.folder.RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    add_run(tmp_path / "runs" / "first")
    (tmp_path / "runs" / "latest").symlink_to("first")
    assert program(path) == program("first")
    assert program(path)[0] == 0


def test_a_path_without_a_run_is_rejected_in_one_line(runs, program):
    code, out, err = program(f"{runs}/elsewhere/")
    assert (code, out) == (2, "")
    assert err == f"results.py: {runs}/elsewhere/results.json does not exist: finish a run with python job.py\n"


def test_an_older_run_is_shown(runs, program):
    code, out, _ = program("first")
    assert code == 0
    assert "Final test accuracy 0.195, loss 2.130; worst site site-3" in out
    assert "Images per site and class" in out


def test_several_runs_are_compared_side_by_side(runs, program):
    add_run(runs / "second", algorithm="other", n_clients=5)
    code, out, _ = program("first", "second")
    assert code == 0
    table = {words[0]: words[1:] for line in out.splitlines() if len(words := line.rsplit(maxsplit=2)) == 3}
    assert table["algorithm"] == ["fedavg", "other"]
    assert table["n_clients"] == ["3", "5"]
    assert table["num_rounds"] == ["3", "3"]
    assert table["validation accuracy"] == ["0.226*", "0.226"]
    assert table["seconds"] == ["50", "50"]


class TestTheBestRun:
    """Runs are chosen by validation accuracy. Only the chosen one's test is shown, and only on request."""

    @pytest.fixture(autouse=True)
    def several(self, runs):
        """`first` has 0.226 on validation images. `lucky` has less there, but more on test images."""
        older = json.loads(OLDER.read_text(encoding="utf-8"))
        for name, validation, test in (("lucky", 0.1, 0.99), ("better", 0.5, 0.3)):
            rounds = [*older["rounds"][:-1], {**older["rounds"][-1], "accuracy": validation}]
            add_run(runs / name, rounds=rounds, test={**older["test"], "accuracy": test})

    def rows(self, out):
        return {line[:20].strip(): line[20:].split() for line in out.splitlines()}

    def test_has_the_highest_validation_accuracy_and_the_others_no_test(self, program):
        _, out, _ = program("first", "lucky", "better")
        rows = self.rows(out)
        assert list(rows)[2] == "validation accuracy"
        assert rows["validation accuracy"] == ["0.226", "0.100", "0.500*"]
        assert "* better is the best on validation images." in out and "partly luck" in out
        assert not any(number in out for number in ("0.195", "0.990", "0.300", "0.066"))

    def test_shows_its_test_on_request(self, program):
        _, out, _ = program("first", "lucky", "better", "--test")
        rows = self.rows(out)
        assert rows["test accuracy"] == ["-", "-", "0.300"]
        assert rows["its accuracy"] == ["-", "-", "0.066"]
        assert not any(number in out for number in ("0.195", "0.990"))

    def test_is_marked_on_the_page_too(self, runs, program):
        for flags, shown in (((), False), (("--test",), True)):
            assert program("first", "lucky", "better", "--html", *flags)[0] == 0
            page = (runs / "comparison.html").read_text(encoding="utf-8")
            assert "0.500*" in page and "better is the best on validation images" in page
            assert ("0.300" in page) == shown and "0.990" not in page

    def test_is_none_if_no_run_validated(self, runs, program):
        rounds = [{**entry, "accuracy": None} for entry in json.loads(OLDER.read_text(encoding="utf-8"))["rounds"]]
        for name in ("silent", "mute"):
            add_run(runs / name, rounds=rounds)
        assert "*" not in program("silent", "mute")[1]
        code, _, err = program("silent", "mute", "--test")
        assert code == 2 and err.count("\n") == 1 and "none of these runs" in err

    def test_is_found_among_the_runs_of_a_pattern(self, runs, program):
        assert program("*e*r") == program("better")
        assert program("l*", "bett*") == program("lucky", "better")
        assert program(f"{runs}/l*", "bett*") == program("lucky", "better")
        code, _, err = program("lr-*")
        assert (code, err) == (2, "results.py: no run matches lr-*: python results.py --list shows all runs\n")


class TestAnUnfinishedRun:
    """It was stopped or failed, or it is running: shown as far as it has come."""

    @pytest.fixture
    def add(self, runs):
        def make(name, n_rounds=2, failed=""):
            run = RunFolder(runs / name)
            run.bundle.mkdir(parents=True)
            run.server.mkdir(parents=True)
            options = Options(dataset="digits", n_clients=3, num_rounds=4, learning_rate=0.5, partition="shards")
            run.options.write_text(json.dumps(options.of_run()), encoding="utf-8")
            run.partition.write_text(json.dumps({"counts": COUNTS}), encoding="utf-8")
            for number in range(n_rounds):
                metrics = {"val_acc": 0.1 + number / 10, "val_loss": 2.0}
                sites = {site: {"metrics": metrics, "train": 8, "val": 2} for site in ("site-10", "site-2")}
                append_json(run.server / ROUNDS, {"round": number, "metrics": metrics, "sites": sites, "rejected": []})
            if failed:
                run.failure.write_text(json.dumps({"reason": failed}), encoding="utf-8")
            run.start.write_text(json.dumps({"started": "2026-01-02T03:04:05+00:00", "resumed": None, "stages": []}))
            return run

        return make

    def test_is_shown_as_far_as_it_went(self, add, program):
        add("stopped")
        code, out, _ = program("stopped")
        assert code == 0
        lines = out.splitlines()
        assert ["after", "round", "1", "0.200", "0.200", "0.200"] in [line.split() for line in lines]
        assert "all sites site-2 site-10" in out
        assert lines[-2:] == [
            "stopped: stopped after round 2 of 4; no final test",
            "resume it with: python job.py --resume stopped",
        ]
        assert "Final test" not in out

    def test_says_why_it_failed(self, add, program):
        add("bad", failed="site-2 died")
        assert "bad: failed after round 2 of 4; no final test\nreason: site-2 died\n" in program("bad")[1]

    def test_that_had_not_finished_a_round_is_shown(self, add, program):
        add("early", n_rounds=0)
        code, out, _ = program("early")
        assert (code, out.splitlines()[-1]) == (0, "early: stopped after round 0 of 4; no final test")

    def test_is_compared_but_never_the_best(self, runs, add, program):
        add("stopped", n_rounds=4)
        _, out, _ = program("stopped", "first")
        assert "* first is the best" in out and "stopped after round 4" in out and "0.400" in out

    def test_has_no_report(self, add, program):
        add("stopped")
        code, _, err = program("stopped", "--html")
        assert (code, err.count("\n")) == (2, 1) and "resume it" in err

    def test_that_still_runs_is_running(self, runs, add, program):
        """Its start.json is locked by the process of job.py, until that ends in whatever way."""
        add("live")
        hold = "import sys, time\nfrom pathlib import Path\nfrom federation.run.folder import RunFolder\n"
        hold += "run = RunFolder(Path(sys.argv[1]))\nrun.begin({})\nprint(flush=True)\nsys.stdin.read()"
        command = [sys.executable, "-c", hold, str(runs / "live")]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe) as process:
            assert process.stdout
            process.stdout.readline()
            assert RunFolder(runs / "live").state == "running"
            process.kill()
        assert RunFolder(runs / "live").state == "stopped"

    def test_is_listed_with_all_others(self, runs, add, program, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        add("stopped")
        add("bad", n_rounds=1, failed="no")
        (runs / "latest").symlink_to("first")
        (runs / "comparison.html").touch()
        (runs / "empty").mkdir()
        code, out, _ = program("--list")
        rows = [line.split() for line in out.splitlines()]
        assert code == 0 and [row[0] for row in rows[2:]] == ["bad", "first", "stopped"]
        stopped = rows[-1]
        assert stopped[:8] == ["stopped", "2026-01-02", "03:04", "0.200", "stopped", "after", "round", "2"]
        assert "--learning_rate 0.5" in out and "--partition shards" in out and "--seed" not in out
        assert program("--list", "st*")[1].count("stopped") == 2


def test_the_path_of_the_images_is_not_shown(runs, program):
    add_run(runs / "second", data_root="/home/ann/patients")
    assert "patients" not in program("first", "second")[1]
    assert program("first", "second", "--html")[0] == 0
    assert "patients" not in (runs / "comparison.html").read_text(encoding="utf-8")


def test_latest_is_the_newest_run(runs, program):
    (runs / "latest").symlink_to("first")
    assert program() == program("first") == program("latest", "first")


def test_a_missing_metric_is_a_dash(runs, program):
    test = json.loads(OLDER.read_text(encoding="utf-8"))["test"]
    add_run(runs / "second", test={**test, "loss": None})
    assert "loss -" in program("second")[1]


class TestATable:
    """On a screen of 80 columns, no name and no number is cut or wrapped."""

    CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    @pytest.fixture(autouse=True)
    def screen(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")

    @pytest.fixture
    def show(self, runs, program):
        """Show a run of `n_sites` sites, of which the last is the worst: the lines of its two tables."""

        def make(n_sites, n_rounds=3, classes=self.CLASSES):
            own = {f"site-{i}": 1 - i / 1000 for i in range(1, n_sites + 1)}
            rounds = [{"round": number, "accuracy": 0.5, "sites": own} for number in range(n_rounds + 1)]
            sites = {site: {"accuracy": accuracy, "loss": 1.0, "images": 9} for site, accuracy in own.items()}
            test = {"accuracy": 0.5, "loss": 1.0, "sites": sites, "worst": f"site-{n_sites}"}
            add_run(runs / "many", rounds=rounds, test=test, best={"round": 2, "model": "best.pt", "test": test})
            counts = {site: dict.fromkeys(classes, 1000) for site in own}
            (runs / "many" / "partition.json").write_text(json.dumps({"counts": counts}), encoding="utf-8")
            lines = program("many")[1].splitlines()
            assert max(map(len, lines)) <= 80
            accuracies = next(i for i, line in enumerate(lines) if line.startswith("Accuracy of the global model"))
            return lines[:accuracies], lines[accuracies:]

        return make

    LABELS = ("untrained", "after round 1", "after round 2", "after round 3", "final test", "best test (round 2)")

    @pytest.mark.parametrize("n_sites", [1, 2, 7])
    def test_of_accuracies_has_a_column_per_site(self, show, n_sites):
        _, (_, header, _, *lines) = show(n_sites)
        sites = range(1, n_sites + 1)
        assert header.split() == ["all", "sites", *(f"site-{i}" for i in sites)]
        rows = [line for line in lines if line.startswith(self.LABELS)][:6]
        for label, row in zip(self.LABELS, rows, strict=True):
            assert row.removeprefix(label).split() == ["0.500", *(f"{1 - i / 1000:.3f}" for i in sites)]
        assert not any("worst" in line for line in lines if not line.startswith("Final test accuracy"))

    @pytest.mark.parametrize(
        ("n_sites", "quantiles"),
        [
            (8, ["8", "0.992", "0.992", "0.995", "0.999", "0.999"]),
            (1001, ["1,001", "-0.001", "0.099", "0.499", "0.899", "0.999"]),
        ],
    )
    def test_of_accuracies_of_many_sites_has_quantiles(self, show, n_sites, quantiles):
        _, (title, header, _, *lines) = show(n_sites)
        assert title.endswith("over the sites")
        assert header.replace("10 %", "low").replace("90 %", "high").split() == [
            *("mean", "sites", "min", "low", "median", "high", "max")
        ]
        rows = [line for line in lines if line.startswith(self.LABELS)][:6]
        for label, row in zip(self.LABELS, rows, strict=True):
            assert row.removeprefix(label).split() == ["0.500", *quantiles]

    @pytest.mark.parametrize(("n_sites", "n_shown"), [(8, 8), (1000, 10)])
    def test_of_many_sites_is_followed_by_the_worst_in_the_final_test(self, show, n_sites, n_shown):
        _, lines = show(n_sites)
        start = lines.index(f"Final test: the worst {n_shown} of {n_sites:,} sites")
        rows = [line.split() for line in lines[start + 3 : start + 3 + n_shown]]
        worst = range(n_sites, n_sites - n_shown, -1)
        assert rows == [[f"site-{i}", f"{1 - i / 1000:.3f}", "9"] for i in worst]
        assert not lines[start + 3 + n_shown]

    def test_of_accuracies_has_the_first_and_the_last_rounds(self, show):
        _, lines = show(2, n_rounds=100)
        after = [line.split()[2] for line in lines if line.startswith("after round")]
        assert after == [str(number) for number in range(82, 101)]
        assert lines[3].startswith("untrained")
        assert "(not shown: 81 of 101 rounds; results.json has all)" in lines

    @pytest.mark.parametrize("n_sites", [2, 8, 20])
    def test_of_images_has_whole_names_of_classes(self, show, n_sites):
        (_, _, header, _, *lines), _ = show(n_sites)
        assert header.split() == ["site", *self.CLASSES, "all"]
        rows = [line.split() for line in lines if line]
        assert rows == [[f"site-{i}", *["1000"] * 10, "10000"] for i in range(1, n_sites + 1)]

    def test_of_images_of_many_sites_has_a_row_per_class(self, show):
        (_, title, header, _, *lines), _ = show(1000)
        assert title == "Images per site (training + validation), over the sites that have any"
        assert header.split()[:3] == ["sites", "images", "min"]
        assert lines[0].split() == ["all", "classes", "1,000", "10,000,000", *["10,000"] * 5]
        assert [line.split() for line in lines[2:12]] == [
            [name, "1,000", "1,000,000", *["1,000"] * 5] for name in self.CLASSES
        ]
        assert lines[12] == "Classes per site: min 10, 10 % 10, median 10, 90 % 10, max 10"

    def test_of_images_of_many_classes_has_those_at_the_fewest_sites(self, capsys):
        classes = [f"class-{i}" for i in range(30)]
        results.show_distribution(
            {f"site-{k}": {name: int(k <= 60 - i) for i, name in enumerate(classes)} for k in range(1, 61)}
        )
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split()[:2] for line in lines if line.startswith("class-")]
        assert rows == [[f"class-{i}", str(60 - i)] for i in range(29, 9, -1)]
        assert "(not shown: 10 of 30 classes, at more sites; partition.json has all)" in lines

    def test_of_images_with_long_names_of_classes_has_a_row_per_class(self, show):
        classes = ["adenocarcinoma", "large cell carcinoma", "squamous cell carcinoma", "small cell carcinoma", "none"]
        (_, _, _, _, *lines), _ = show(3, classes=classes)
        assert [line.split("  ")[0] for line in lines[2:7]] == classes

    @pytest.mark.parametrize(("n_sites", "n_rounds", "cohort"), [(100, 100, None), (1000, 100, 50), (1000, 3, 50)])
    def test_of_any_run_fits_a_page(self, runs, program, n_sites, n_rounds, cohort):
        write_run(runs / "many", n_sites, n_rounds, cohort)
        lines = program("many")[1].splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) <= 70

    def test_of_many_runs_continues_in_another_table(self, runs, program):
        names = [f"20260101-12000{i}" for i in range(9)]
        for i, name in enumerate(names):
            add_run(runs / name, seed=i)
        lines = program(*names)[1].splitlines()
        assert max(map(len, lines)) <= 80
        assert [name for line in lines if line[0:1] == " " for name in line.split()] == names
        seeds = [line.split()[1:] for line in lines if line.startswith("seed ")]
        assert len(seeds) > 1 and sum(seeds, []) == [str(i) for i in range(9)]

    def test_has_each_site_in_the_final_test_even_if_its_name_is_too_wide(self, runs, program):
        """It may exceed the screen, but is not cut."""
        result = json.loads(OLDER.read_text(encoding="utf-8"))
        name = "the-hospital-" * 8
        for entry in (*result["rounds"], result["test"]):
            entry["sites"][name] = entry["sites"].pop("site-3")
        add_run(runs / "wide", rounds=result["rounds"], test={**result["test"], "worst": name})
        (runs / "wide" / "partition.json").write_text('{"counts": {}}', encoding="utf-8")
        lines = program("wide")[1].splitlines()
        start = lines.index("Final test: the worst 3 of 3 sites")
        assert [line.split()[0] for line in lines[start + 3 : start + 6]] == [name, "site-1", "site-2"]


class TestRandomSites:
    """Only some of the sites train in a round, or are in the final test."""

    def test_are_counted_on_the_screen(self, runs, program):
        write_run(runs / "cohorts", 100, 4, cohort=10, tested=20)
        _, out, _ = program("cohorts")
        trained = {
            site for entry in schema.read(RunFolder(runs / "cohorts"))["rounds"] for site in entry["participants"] or []
        }
        assert 10 < len(trained) < 41
        assert f"\nIn each round, 10 random sites of 100 trained ({len(trained)} in at least one).\n" in out
        assert "\nThe final test covers 20 random sites of 100.\n" in out
        rows = {line[:13].strip(): line.split() for line in out.splitlines()}
        assert rows["after round 2"][4] == "10" and rows["final test"][3] == "20"

    def test_have_a_column_if_they_fit(self, runs, program):
        write_run(runs / "few", 3, 4, cohort=1, tested=1)
        _, out, _ = program("few")
        header = next(line for line in out.splitlines() if "all sites" in line)
        assert set(header.split()) == {"all", "sites", "site-1", "site-2", "site-3"}
        row = next(line for line in out.splitlines() if line.startswith("final test"))
        assert row.split().count("-") == 2

    def test_are_not_mentioned_if_all_took_part(self, runs, program):
        write_run(runs / "all", 100)
        assert " random " not in program("all")[1]


MARKUP = "[/x]"  # to rich, the end of a style that never began, which raises


def test_names_are_shown_literally(runs, program):
    result = json.loads(OLDER.read_text(encoding="utf-8"))
    for entry in (*result["rounds"], result["test"]):
        entry["sites"][MARKUP] = entry["sites"].pop("site-1")
    shutil.move(runs / "first", runs / "of [b]two")
    add_run(runs / "odd", rounds=result["rounds"], test={**result["test"], "worst": MARKUP})
    partition = {"counts": {MARKUP: {MARKUP: 3, ":cat:": 5}, ":dog:": {}}}
    (runs / "odd" / "partition.json").write_text(json.dumps(partition), encoding="utf-8")
    code, out, _ = program("odd")
    assert code == 0
    header, _, first, second = out.splitlines()[2:6]
    assert (header.split(), first.split(), second.split()) == (
        ["site", MARKUP, ":cat:", "all"],
        [MARKUP, "3", "5", "8"],
        [":dog:", "-", "-", "-"],
    )
    code, out, _ = program("odd", "of [b]two")
    assert code == 0 and "of [b]two" in out


def test_a_lost_site_and_a_site_without_test_images_are_shown(runs, program):
    result = json.loads(OLDER.read_text(encoding="utf-8"))
    for entry in result["rounds"][2:]:
        entry["sites"]["site-3"] = None
    result["test"]["sites"] = {"site-1": {"accuracy": None, "loss": None, "images": 0}}
    result["test"] |= {"accuracy": None, "loss": None, "worst": None}
    best = {"round": 1, "model": "best.pt", "test": {**result["test"], "sites": {}}}
    add_run(runs / "lost", env="prod", lost=["site-3"], rounds=result["rounds"], test=result["test"], best=best)
    (runs / "lost" / "partition.json").write_text('{"counts": {}}', encoding="utf-8")
    code, out, _ = program("lost")
    assert code == 0
    assert "Final test accuracy -, loss -; " in out
    assert program("lost", "first")[0] == 0


def test_html_prints_the_path_of_the_page(runs, program):
    shutil.copytree(runs / "first", runs / "second")
    code, out, _ = program("first", "second", "--html")
    assert (code, out) == (0, f"{runs / 'comparison.html'}\n")
    assert (runs / "comparison.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_fingerprint_depends_on_every_bit_of_a_model():
    from federation.run.outcome import fingerprint

    model = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3), "a": torch.arange(6.0).reshape(2, 3)}
    assert fingerprint(model) == fingerprint(same)
    others = [
        {**model, "a": torch.nextafter(model["a"], torch.tensor(9.0))},
        {**model, "a": model["a"].reshape(3, 2)},
        {**model, "a": model["a"].double()},
        {"c": model["a"], "b": model["b"]},
    ]
    assert len({fingerprint(model), *map(fingerprint, others)}) == 5


class TestCaveats:
    """Warnings about the means: which sites they exclude, and why."""

    REJECTED = {"round": 1, "site": "site-2", "task": "train", "reason": "tensor fc1.weight is not finite"}

    def test_name_lost_sites_and_rejected_answers(self, runs, program):
        add_run(runs / "second", lost=["site-3"], rejected=[self.REJECTED, {**self.REJECTED, "round": None}])
        _, out, _ = program("second")
        assert "WARNING: no final evaluation from site-3: the means exclude them\n" in out
        warning = "WARNING: the server rejected the answer of site-2 in {}: tensor fc1.weight is not finite\n"
        assert warning.format("round 2") in out and warning.format("an evaluation") in out

    def test_name_the_sites_missing_from_a_rounds_means(self, runs, program):
        rounds = json.loads(OLDER.read_text(encoding="utf-8"))["rounds"]
        rounds[1]["missing"] = ["site-2", "site-3"]
        add_run(runs / "second", lost=["site-3"], rounds=rounds)
        _, out, _ = program("second")
        assert "WARNING: the means after round 1 exclude site-2\n" in out

    def test_name_three_of_many_sites(self, runs, program):
        names = [f"site-{i}" for i in range(1, 951)]
        rounds = json.loads(OLDER.read_text(encoding="utf-8"))["rounds"]
        rounds[1]["missing"] = names
        add_run(runs / "second", rounds=rounds)
        assert "WARNING: the means after round 1 exclude site-1, site-2, site-3 and 947 more\n" in program("second")[1]
        add_run(runs / "third", lost=names)
        assert "no final evaluation from site-1, site-2, site-3 and 947 more: " in program("third")[1]

    def test_on_rounds_are_limited_in_number(self, runs, program):
        rounds = json.loads(OLDER.read_text(encoding="utf-8"))["rounds"]
        many = [{**rounds[1], "round": number, "missing": ["site-2"]} for number in range(100)]
        add_run(runs / "second", rounds=many)
        _, out, _ = program("second")
        assert out.count("WARNING") == 21
        assert "WARNING: 80 more rounds with missing sites: see results.json\n" in out

    def test_are_limited_in_number(self, runs, program):
        add_run(runs / "second", rejected=[self.REJECTED] * 1000)
        _, out, _ = program("second")
        assert out.count("WARNING") == 21
        assert "WARNING: 980 more rejected answers: see results.json\n" in out

    def test_are_on_the_page_too(self, runs, program):
        add_run(runs / "second", rejected=[self.REJECTED])
        (runs / "second" / "partition.json").write_text(json.dumps({"counts": {}, "classes": ["0"], "sites": {}}))
        assert program("second", "--html")[0] == 0
        assert "rejected the answer of site-2 in round 2" in (runs / "second" / "report.html").read_text(
            encoding="utf-8"
        )

    def test_question_a_site_that_outweighs_all_others(self, runs, program):
        sound = {f"site-{k}": {"train": 800, "val": 200} for k in (1, 2)}
        add_run(runs / "second", images={**sound, "site-3": {"train": 10**9, "val": 1}})
        assert "WARNING: site-3 reported 1,000,000,000 of all 1,000,001,600 training images" in program("second")[1]
        add_run(runs / "third", images={**sound, "site-3": {"train": 9000, "val": 1}})
        assert "WARNING" not in program("third")[1]

    def test_are_absent_if_all_sites_are_covered(self, runs, program):
        assert "WARNING" not in program("first")[1]
