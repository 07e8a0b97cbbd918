"""Whole federations, run as a user runs them. The first one is in the fast tier; the others are slow."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from programs import PROJECT, Project
from settings import Options
from trainer import make_model, n_images

LOG = (  # lines of NVFlare and client.py in the log of a run
    "Start FedAvg.",
    "Round 0 started.",
    "Sampled clients: ['host-1', 'host-2']",
    "Sending task train to ['host-1', 'host-2']",
    "batch_size=16, site=site-1",
    "[Current Round=0, Site = site-1]",
    "--- validate global model ---",
    "--- train new model ---",
    "--- test new model ---",
    "--- prediction with new model ---",
    "Test metric",
    "test_acc",
    "Round 1 started.",
    "Finished FedAvg.",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared_cache) -> Project:
    """A federation on digits: 3 non-IID sites on 2 hosts, 2 rounds."""
    project = Project(tmp_path_factory.mktemp("finished") / "project")
    flags = ["--n_clients", "3", "--n_hosts", "2", "--num_rounds", "2", "--partition", "dirichlet", "--alpha", "1"]
    run = project.run("job.py", "--dataset", "digits", "--name", "first", *flags)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    project.screen = run.stdout
    project.result = json.loads((project.folder / "runs" / "first" / "results.json").read_text())
    return project


@pytest.mark.federation
class TestAFinishedRun:
    def test_records_how_it_was_made(self, finished):
        made = {
            name: finished.result[name]
            for name in ("dataset", "algorithm", "model_class", "partition", "n_clients", "num_rounds")
        }
        assert made == {
            "dataset": "digits",
            "algorithm": "fedavg",
            "model_class": "LitNet",
            "partition": "dirichlet",
            "n_clients": 3,
            "num_rounds": 2,
        }
        trained = {name: finished.result[name] for name in ("batch_size", "local_epochs", "learning_rate", "seed")}
        assert trained == {"batch_size": 16, "local_epochs": 1, "learning_rate": 0.01, "seed": 0}

    def test_has_every_round_of_every_site(self, finished):
        assert [entry["round"] for entry in finished.result["rounds"]] == [0, 1, 2]
        images = {site: len(own["val"]) for site, own in self.partition(finished)["sites"].items()}
        for entry in finished.result["rounds"]:
            assert set(entry["sites"]) == {"site-1", "site-2", "site-3"}
            mean = np.average([entry["sites"][site] for site in images], weights=list(images.values()))
            assert entry["accuracy"] == pytest.approx(mean)

    def test_learns(self, finished):
        untrained, *_, last = (entry["accuracy"] for entry in finished.result["rounds"])
        assert untrained < 0.2 and last > 0.35  # of ten classes
        losses = [entry["loss"] for entry in finished.result["rounds"]]
        assert losses == sorted(losses, reverse=True)

    def test_records_the_data_distribution(self, finished):
        partition = self.partition(finished)
        held = {site: len(own["train"]) + len(own["val"]) for site, own in partition["sites"].items()}
        assert held == {site: sum(counts.values()) for site, counts in partition["counts"].items()}
        assert sum(held.values()) == 1437

    @pytest.mark.parametrize("which", ["final", "best"])
    def test_keeps_models_with_the_reported_accuracy(self, finished, which):
        from data import SiteDataModule

        options = Options.of({**finished.result, "classes": self.partition(finished)["classes"]})
        model = make_model(options)
        kept = finished.result if which == "final" else finished.result["best"]
        assert kept["model"] == f"{which}.pt"
        model.load_state_dict(torch.load(self.folder(finished) / kept["model"], weights_only=True))
        model.eval()
        for site, test in kept["test"]["sites"].items():
            data = SiteDataModule(site, options)
            data.setup("test")
            with torch.inference_mode():
                right = [int((model(x).argmax(dim=1) == labels).sum()) for x, labels in data.test_dataloader()]
            assert n_images(data, "test") == test["images"]
            assert sum(right) / test["images"] == pytest.approx(test["accuracy"])

    @pytest.mark.parametrize(("which", "flags"), [("final", []), ("best", ["--best"])])
    def test_classifies_each_sites_test_images_as_reported(self, finished, tmp_path, which, flags):
        from data import SiteDataModule

        partition = self.partition(finished)
        module = SiteDataModule("site-1", Options.of({**finished.result, "classes": partition["classes"]}))
        module.setup("test")
        for row, pixels in enumerate(module.parts["test"].images):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{row}.png")
        said = finished.run("predict.py", "first", str(tmp_path), "--csv", *flags)
        assert (said.returncode, said.stderr) == (0, "")
        classes = {int(Path(row["image"]).stem): row["class"] for row in csv.DictReader(io.StringIO(said.stdout))}
        tested = finished.result["test"] if which == "final" else finished.result["best"]["test"]
        for site, test in tested["sites"].items():
            data = SiteDataModule(site, module.options)
            data.setup("test")
            own = data.parts["test"]
            pairs = zip(own.rows, own.labels, strict=True)
            right = [classes[row] == partition["classes"][label] for row, label in pairs]
            assert sum(right) / len(right) == pytest.approx(test["accuracy"], abs=1e-6)

    def test_picks_the_best_model_by_validation_accuracy(self, finished):
        _, *trained = finished.result["rounds"]
        best = max(trained, key=lambda entry: (entry["accuracy"], entry["round"]))
        assert finished.result["best"]["round"] == best["round"]

    def test_names_the_worst_site(self, finished):
        test = finished.result["test"]
        assert test["sites"][test["worst"]]["accuracy"] == min(site["accuracy"] for site in test["sites"].values())
        assert sum(site["images"] for site in test["sites"].values()) == 360

    def test_sent_only_these_files_to_server_and_sites(self, finished):
        job = self.folder(finished) / "job"
        assert sorted(path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()) == [
            "app/config/config_fed_client.json",
            "app/config/config_fed_server.json",
            "app/custom/client.py",
            "app/custom/data.py",
            "app/custom/federation/errors.py",
            "app/custom/federation/exchange.py",
            "app/custom/federation/protocol.py",
            "app/custom/federation/server/aggregation.py",
            "app/custom/federation/server/answers.py",
            "app/custom/federation/server/audit.py",
            "app/custom/federation/server/evaluation.py",
            "app/custom/federation/site/budget.py",
            "app/custom/federation/site/catalog.py",
            "app/custom/federation/site/dicom.py",
            "app/custom/federation/site/dp.py",
            "app/custom/federation/site/fetch.py",
            "app/custom/federation/site/host.py",
            "app/custom/federation/site/leak.py",
            "app/custom/federation/site/ledger.py",
            "app/custom/federation/site/partition.py",
            "app/custom/federation/site/progress.py",
            "app/custom/federation/site/quick_start.py",
            "app/custom/federation/site/scores.py",
            "app/custom/federation/sums.py",
            "app/custom/initial.pt",
            "app/custom/model.py",
            "app/custom/options.json",
            "app/custom/settings.py",
            "app/custom/trainer.py",
            "meta.json",
        ]
        sent = "".join(path.read_text() for path in job.rglob("*") if path.is_file() and path.suffix != ".pt")
        assert str(finished.folder.resolve()) not in sent

    def test_shows_on_the_screen_what_happened(self, finished):
        lines = finished.screen.splitlines()
        assert lines[1].startswith("Images per site and class")
        assert "images: 32 x 32 pixels (--image_size)" in lines
        assert any(line.startswith("round 2 of 2 done") for line in lines)
        assert any(line.startswith("final test") for line in lines)
        assert not any("Traceback" in line or "Warning" in line for line in lines)
        assert len(lines) <= 31
        assert "Accuracy of the global model (digits, dirichlet)" in lines

    def test_keeps_the_complete_nvflare_log(self, finished):
        log = (self.folder(finished) / "log.txt").read_text()
        for words in LOG:
            assert words in log, words
        assert LOG[0] not in finished.screen

    def test_writes_no_event_files_without_a_tracker(self, finished):
        assert list(finished.folder.rglob("*tfevents*")) == []

    def test_is_the_latest_and_can_be_shown_again(self, finished):
        assert (finished.folder / "runs" / "latest").resolve().name == "first"
        shown = finished.run("results.py").stdout
        assert "final test" in shown and "Images per site and class" in shown

    def test_follows_the_schema(self, finished):
        from federation.run import outcome, schema
        from federation.run.folder import RunFolder

        assert finished.result["version"] == schema.VERSION
        options = set(Options(algorithm="fedavg").of_run()) - {"classes"}
        assert set(finished.result) == options | keys_documented((PROJECT / "REFERENCE.md").read_text(encoding="utf-8"))
        assert {**finished.result, "state": "finished"} == schema.read(RunFolder(self.folder(finished)))
        final = torch.load(self.folder(finished) / finished.result["model"], weights_only=True)
        assert finished.result["sha256"] == outcome.fingerprint(final)

    def test_has_the_loss_of_every_round(self, finished):
        images = {site: len(own["val"]) for site, own in self.partition(finished)["sites"].items()}
        for entry in finished.result["rounds"]:
            mean = np.average([entry["losses"][site] for site in images], weights=list(images.values()))
            assert entry["loss"] == pytest.approx(mean)
        assert finished.result["rounds"][0]["loss"] == pytest.approx(np.log(10), rel=0.1)  # untrained: a guess

    def test_knows_where_the_time_went(self, finished):
        timing = finished.result["timing"]
        assert set(timing) == {"host-1", "host-2"}
        spans = [sum(kinds.values()) for kinds in timing.values()]
        assert spans == pytest.approx([spans[0]] * 2, abs=0.01)
        assert 0 < spans[0] < finished.result["wall_s"]
        assert all(seconds > 0 for kinds in timing.values() for seconds in kinds.values())

    def test_has_an_audit_log_of_all_that_left_the_sites(self, finished):
        records = [json.loads(line) for line in (self.folder(finished) / "audit.jsonl").read_text().splitlines()]
        final = torch.load(self.folder(finished) / finished.result["model"], weights_only=True)
        weights = {name: (list(tensor.shape), tensor.nbytes) for name, tensor in final.items()}
        trained = [record for record in records if record["task"] == "train"]
        assert sorted((record["round"], site) for record in trained for site in record["sites"]) == [
            (k, site) for k in (0, 1) for site in ("site-1", "site-2", "site-3")
        ]
        for record in trained:
            assert {t["name"]: (t["shape"], t["bytes"]) for t in record["tensors"]} == weights
            assert sorted(record["metrics"]) == ["val_acc", "val_loss"]
            assert set(record["meta"]) == {"kind", "NUM_STEPS_CURRENT_ROUND", "val_images"}
        evaluated = [record for record in records if record["task"] != "train"]
        assert {site for record in evaluated for site in record["sites"]} == {"site-1", "site-2", "site-3"}
        for record in evaluated:
            assert {t["name"]: (t["dtype"], t["shape"]) for t in record["tensors"]} == {
                "test_confusion": ("uint8", [10, 10]),
                "test_scores": ("uint8", [10, 2, 128]),
                "test_calibration": ("float64", [3, 15]),
            }
            assert set(record["meta"]) == {"kind"}
            counts = {"val_images", "test_images", "leak_auc", "leak_tpr"}
            assert set(record["metrics"]) == {"val_acc", "val_loss", "test_acc", "test_loss"} | counts

    def test_counts_the_predictions_that_the_sites_reports_are_about(self, finished):
        counts = json.loads((self.folder(finished) / "test_counts.json").read_text())
        assert counts["classes"] == [str(digit) for digit in range(10)]
        for site, own in finished.result["test"]["sites"].items():
            matrix = np.array(counts["sites"][site]["test_confusion"])
            assert matrix.sum() == own["images"]
            assert np.trace(matrix) / matrix.sum() == pytest.approx(own["accuracy"], abs=1e-6)
        test = finished.result["test"]
        value, low, high = test["metrics"]["accuracy"]
        assert low < value < high and value == pytest.approx(test["accuracy"], abs=1e-6)
        assert test["majority"]["metrics"]["accuracy"] < 0.2

    def test_has_a_page(self, finished):
        written = finished.run("results.py", "first", "--html")
        assert written.returncode == 0, written.stderr
        page = (self.folder(finished) / "report.html").read_text(encoding="utf-8")
        assert written.stdout == f"{(self.folder(finished) / 'report.html').resolve()}\n"
        assert "Confusion matrix, all sites: 360 test images" in page
        assert "python job.py --dataset digits" in page
        assert "Timeline of each process" in page
        assert "Every tensor matches a weight of the final model by name and shape" in page

    def test_can_be_compared_without_nvflare(self, finished):
        program = (
            "import runpy, sys; sys.argv = ['compare.py']; sys.path.insert(0, '.'); sys.modules['nvflare'] = None\n"
            "runpy.run_path('compare.py', run_name='__main__')\n"
        )
        compared = finished.run("-c", program)
        assert compared.returncode == 0, compared.stderr
        assert compared.stderr == ""
        assert len(compared.stdout.splitlines()) <= 20
        comparison = json.loads((self.folder(finished) / "compare.json").read_text())
        test = finished.result["test"]
        sites = {site: own["accuracy"] for site, own in test["sites"].items()}
        assert comparison["rows"]["federated"] == {"all": test["accuracy"], "sites": sites}
        assert comparison["epochs"] == 2
        assert comparison["rows"]["centralized"]["all"] > comparison["rows"]["alone_on_all"]["all"]

    def test_leaves_no_process(self, finished):
        assert finished.processes() == []

    def folder(self, finished):
        return finished.folder / "runs" / "first"

    def partition(self, finished):
        return json.loads((self.folder(finished) / "partition.json").read_text())


def keys_documented(text: str) -> set[str]:
    """The names in the first column of the table of results.json."""
    table = text[text.index("| key | what |") :].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()][2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.slow
def test_an_exception_at_a_site_ends_the_job_with_that_error(project):
    project.replace("model.py", "loss = criterion(outputs, labels)", 'raise RuntimeError("boom at the site")')
    run = project.run("job.py", "--dataset", "digits")
    assert run.returncode == 1
    lines = run.stderr.strip().splitlines()
    assert re.fullmatch(r"job.py: site-[12] failed: RuntimeError: boom at the site \(model.py, line \d+\)", lines[0])
    assert re.match(r"  model.py, line \d+, in training_step: raise RuntimeError", lines[-2])
    assert lines[-1].startswith("Full log: runs/")
    assert project.processes() == []


@pytest.mark.slow
def test_data_and_model_can_be_replaced_without_other_changes(project):
    for name in ("data.py", "model.py"):
        (project.folder / name).write_text((PROJECT / "tests" / "tabular" / name).read_text())
    run = project.run("job.py", "--num_rounds", "3", "--name", "table")
    assert run.returncode == 0, run.stderr
    result = json.loads((project.folder / "runs" / "table" / "results.json").read_text())
    assert result["test"]["accuracy"] > 0.9
    page = project.run("results.py", "table", "--html")
    assert page.returncode == 0, page.stderr
    report = (project.folder / "runs" / "table" / "report.html").read_text(encoding="utf-8")
    assert "Confusion matrix, all sites: " in report and "malignant" in report
    compared = project.run("compare.py")
    assert (compared.returncode, compared.stderr) == (0, "")
    rows = json.loads((project.folder / "runs" / "table" / "compare.json").read_text())["rows"]
    assert rows["centralized"]["all"] > 0.9 and len(rows["alone"]["sites"]) == result["n_clients"]
    check = project.run("job.py", "--check")
    assert check.returncode == 0 and "CHECK PASSED" in check.stdout


@pytest.mark.slow
def test_one_site_and_one_round_equal_local_training(project):
    flags = ["--n_clients", "1", "--num_rounds", "1", "--local_epochs", "3"]
    run = project.run("job.py", "--dataset", "digits", "--name", "one", *flags)
    assert run.returncode == 0, run.stderr
    assert project.run("compare.py", "one").returncode == 0
    rows = json.loads((project.folder / "runs" / "one" / "compare.json").read_text())["rows"]
    assert rows["federated"] == rows["alone"]
    assert rows["federated"]["all"] > 0.2


@pytest.mark.slow
def test_another_model_of_model_py_can_be_trained(project):
    run = project.run("job.py", "--check", "--dataset", "digits", "--model", "LitResNet", "--name", "res")
    assert run.returncode == 0, run.stderr
    result = json.loads((project.folder / "runs" / "res" / "results.json").read_text())
    assert (result["model_class"], result["max_batches"]) == ("LitResNet", 4)
    final = torch.load(project.folder / "runs" / "res" / "final.pt", weights_only=True)
    assert final["model.conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.slow
def test_every_site_can_have_its_own_folder(project, tmp_path):
    from PIL import Image

    random = np.random.RandomState(0)
    for site, classes in (("site-1", ("cat", "dog")), ("site-2", ("bird", "cat"))):
        for split, n in (("train", 20), ("test", 4)):
            for name in classes:
                folder = tmp_path / "images of all" / site / split / name
                folder.mkdir(parents=True)
                for i in range(n):
                    Image.fromarray(random.randint(0, 256, (20, 30), dtype=np.uint8)).save(folder / f"{i}.png")
    root = str(tmp_path / "images of all" / "{site}")
    run = project.run("job.py", "--dataset", "image_folder", "--data_root", root, "--num_rounds", "1", "--name", "own")
    assert run.returncode == 0, run.stderr
    partition = json.loads((project.folder / "runs" / "own" / "partition.json").read_text())
    assert partition["counts"] == {
        "site-1": {"bird": 0, "cat": 20, "dog": 20},
        "site-2": {"bird": 20, "cat": 20, "dog": 0},
    }
    assert json.loads((project.folder / "runs" / "own" / "results.json").read_text())["partition"] == "none"


@pytest.mark.slow
def test_the_check_falls_back_to_digits(project):
    closed = "http://127.0.0.1:9"
    run = project.run("job.py", "--check", "--dataset", "cifar10", https_proxy=closed, http_proxy=closed)
    assert run.returncode == 0, run.stderr
    assert "Checking with digits instead" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("CHECK PASSED in ")


@pytest.mark.slow
def test_the_check_fails_if_training_changes_nothing(project):
    project.replace("model.py", "lr=self.options.learning_rate", "lr=0.0")
    run = project.run("job.py", "--check", "--dataset", "digits")
    assert run.returncode == 1
    assert "NOT VERIFIED: the final model is the same as the initial one" in run.stderr
