"""The page of a run: its content, that it works offline, and that it can show any name and size."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from federation import exchange
from federation.protocol import (
    DONE,
    EVALUATING,
    PROGRESS,
    STARTING,
    TESTING,
    TRAINING,
    VALIDATING,
    WAITING,
    append_json,
)
from federation.report import page as report
from federation.run import schema, timing
from federation.run.classification import CLASS_METRICS, METRICS
from federation.run.folder import RunFolder
from federation.run.metrics import QUANTILES
from federation.site.scores import ScoreCounts
from model import LitNet
from settings import Options
from synthetic import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SITES = ("site-1", "site-2", "site-3")
CLASSES = [str(i) for i in range(10)]
# Phases of the server and of a site, in seconds after the server's start.
SERVER = [(0.0, STARTING), (30.0, DONE)]
SITE = [
    (10.5, VALIDATING),
    (12.0, TRAINING),
    (20.25, TESTING),
    (22.0, WAITING),
    (25.0, EVALUATING),
    (25.75, WAITING),
]


class Page(HTMLParser):
    """A parsed page."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.text, self.sections, self.rows = [], "", {}, {}
        self.section = self.cell = None
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
            self.sections[self.section], self.rows[self.section] = "", []
        elif tag == "tr" and self.section:
            self.rows[self.section].append([])
        elif tag in ("td", "th") and self.section:
            self.rows[self.section][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None
        elif tag == "section":
            self.section = None

    def handle_data(self, text):
        text = re.sub(r"\s+", " ", text)  # as a browser shows it
        self.text += text
        if self.section:
            self.sections[self.section] += text
        if self.cell:
            self.rows[self.section][-1][-1] += text

    def plots(self):
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg"]


def make_run(folder, sites=SITES, classes=CLASSES, **changes):
    """A finished run of made-up metrics, two rounds, with the files that job.py writes."""
    folder.mkdir()
    counts = {site: {name: 3 * i + j for j, name in enumerate(classes)} for i, site in enumerate(sites)}
    indices = {"train": [0, 1], "val": [2], "test": [0]}
    partition = {"classes": classes, "sites": dict.fromkeys(sites, indices), "counts": counts}
    (folder / "partition.json").write_text(json.dumps(partition), encoding="utf-8")
    own = {site: 0.25 + i / 1000 for i, site in enumerate(sites)}
    rounds = [{"round": k, "accuracy": 0.3, "sites": own, "loss": 1.5, "losses": own} for k in range(3)]
    tests = {site: {"accuracy": 0.25, "loss": 1.25, "images": 0} for site in sites}
    made = {"dataset": "digits", "algorithm": "fedavg", "partition": "iid", "alpha": 0.5, "shards_per_site": 2}
    made |= {"n_clients": len(sites), "num_rounds": 2, "image_size": 32, "batch_size": 16, "local_epochs": 1}
    made |= {"learning_rate": 0.01, "seed": 0, "data_root": None, "device": "cpu", "model": "final.pt", "wall_s": 9.5}
    result = {
        "version": schema.VERSION,
        **made,
        "rounds": rounds,
        "test": {"accuracy": 0.25, "loss": 1.25, "sites": tests, "worst": sites[0]},
        "sha256": "12ab",
        "timing": None,
        "versions": {"python": "3.99", "torch": "9.9"},
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(result), encoding="utf-8")
    torch.manual_seed(0)
    torch.save(LitNet(max(len(classes), 2), Options()).state_dict(), folder / "final.pt")
    return RunFolder(folder)


def save(run, result):
    run.results.write_text(json.dumps(result), encoding="utf-8")


def answer(extra=None, **meta):
    """A message as a site sends it after training: two tensors of the model, two metrics, a number."""
    params = {"model.fc3.weight": np.zeros((10, 84), np.float32), "model.fc3.bias": torch.zeros(10), **(extra or {})}
    model = FLModel(params=params, metrics={"val_loss": 1.0, "val_acc": 0.5}, current_round=0, meta=meta)
    return FLModelUtils.to_shareable(model)


def add_answers(run, *messages):
    lines = [json.dumps({"site": site, "task": "train", **exchange.describe(message)}) for site, message in messages]
    run.audit_log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "first")


@pytest.fixture(autouse=True)
def project(monkeypatch):
    monkeypatch.setattr(report, "PROJECT_NAME", "My project")


def written(run):
    return Page(report.write(run))


class TestAPage:
    def test_has_its_sections_in_order(self, run):
        page = written(run)
        named = ["about", "rounds", "test", "distribution", "time", "privacy", "audit", "configuration"]
        assert list(page.sections) == named
        assert "My project" in page.text and "fedavg on digits, iid; run first" in page.text

    def test_loads_nothing_else(self, run):
        page = written(run)
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "audio", "video"}
        for tag, attributes in page.tags:
            for name, value in attributes.items():
                if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                    assert value.startswith("#"), (tag, name, value)
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.html))
        assert "@import" not in page.html

    def test_is_reproducible(self, run):
        add_answers(run, ("site-1", answer()))
        assert written(run).html == written(run).html

    def test_has_unique_ids(self, run):
        ids = [attributes["id"] for _, attributes in written(run).tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def test_describes_every_plot_in_words(self, run):
        plots = written(run).plots()
        assert plots[0] == "accuracy by round: all sites, site-1, site-2, site-3"
        assert plots[1] == "loss by round: all sites, site-1, site-2, site-3"
        assert plots[2] == "Images per site and class, 3 sites"

    def test_has_the_numbers_in_the_plots(self, run):
        rows = written(run).rows["rounds"]
        assert ["2", "site-2", "0.251", "0.251"] in rows
        assert ["1", "all sites", "0.300", "1.500"] in rows

    def test_shows_the_configuration_but_no_paths(self, run):
        result = schema.read(run)
        save(run, {**result, "data_root": "/home/ann/secret"})
        (run.job / "app").mkdir(parents=True)
        (run.job / "app" / "client.py").write_text("print()\n", encoding="utf-8")
        page = written(run)
        rows = page.rows["configuration"]
        assert ["seed", "0"] in rows and ["sha256", "12ab"] in rows and ["version of torch", "9.9"] in rows
        files = {row[0]: row[1:] for row in rows}
        assert files["app/client.py"] == ["8", hashlib.sha256(b"print()\n").hexdigest()]
        assert "/home/ann" not in page.html

    def test_begins_with_how_it_was_made(self, run):
        result = schema.read(run)
        command = ["job.py", "--data_root=/home/ann/x", "--startup_kit", "kits/ann", "--seed", "0"]
        origin = {"command": command, "started": "2026-01-02T03:04:05+00:00", "commit": "abc1", "clean": False}
        save(run, {**result, **origin})
        page = written(run)
        facts = dict(page.rows["about"])
        assert facts["Command"] == "python job.py --data_root=PATH --startup_kit PATH --seed 0"
        assert facts["Started"] == "2026-01-02 03:04:05+00:00"
        assert facts["Code"] == "commit abc1, with changes that are not committed"
        assert facts["Images"] == "digits, 32 × 32 pixels, fitted by: stretch"
        assert facts["Split"] == "6 training, 3 validation, 3 test; no image is in two of these parts"
        assert facts["Seed"].startswith("0: ")
        assert "ann" not in page.html
        save(run, {**result, **origin, "clean": True})
        assert dict(written(run).rows["about"])["Code"] == "commit abc1"

    def test_has_the_comparison_with_training_without_a_federation(self, run):
        rows = {key: {"all": 0.5, "sites": dict.fromkeys(SITES, 0.25)} for key in schema.COMPARED}
        comparison = {"run": "first", "model_class": "LitNet", "epochs": 2, "rows": rows}
        run.comparison.write_text(json.dumps(comparison), encoding="utf-8")
        page = written(run)
        assert page.rows["compared"][0] == ["model, test images", "all sites", *SITES]
        assert page.rows["compared"][2] == ["federated", "0.500", "0.250", "0.250", "0.250"]
        assert "Test accuracy with and without the federation" in page.plots()

    def test_can_be_read_by_a_screen_reader(self, run):
        """Tables have headers, and what scrolls can be reached by keyboard and has a name of its own."""
        add_answers(run, ("site-1", answer()))
        page = written(run)
        assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
        assert not [row for rows in page.rows.values() for row in rows if not row[0]]
        boxes = [attributes for tag, attributes in page.tags if "wide" in attributes.get("class", "")]
        assert all(box["tabindex"] == "0" and box["role"] for box in boxes)
        regions = [box["aria-label"] for box in boxes if box["role"] == "region"]
        assert len(set(regions)) == len(regions) > 5
        assert len(page.plots()) == sum(tag == "svg" for tag, _ in page.tags)

    def test_of_an_older_run_says_what_is_unknown(self, run):
        result = schema.read(run)
        for entry in result["rounds"]:
            del entry["loss"], entry["losses"]
        for key in ("version", "sha256", "timing", "versions", "data_root"):
            del result[key]
        save(run, result)
        page = written(run)
        assert "The loss by round was not recorded." in page.sections["rounds"]
        assert "the server of this run kept no audit log" in page.sections["audit"]
        assert "Unknown" in page.sections["time"]


NAMES = ["<script>alert(1)</script>", "a&b", "$5$", "_hidden", '"quoted"', "{{1}}", "猫", "back\\slash", "it's", "]]>"]


def test_names_can_hold_any_character(tmp_path, monkeypatch):
    sites = ("_site", "<i>site</i>", 'site "3"')
    run = make_run(tmp_path / "odd", sites=sites, classes=NAMES, algorithm="<i>average</i>")
    project = "</title><script>alert('x')</script> & {{ subtitle }} \N{GRINNING FACE}"
    monkeypatch.setattr(report, "PROJECT_NAME", project)
    page = written(run)
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert project in page.text
    assert ["algorithm", "<i>average</i>"] in page.rows["configuration"]
    assert page.plots()[0] == "accuracy by round: all sites, " + ", ".join(sites)
    legend, _ = page.sections["rounds"].split("The numbers in the plots")
    for site in sites:
        assert site in legend, site
    for name in NAMES:
        assert name in page.sections["distribution"], name


@pytest.mark.parametrize(("n_sites", "n_classes"), [(1, 1), (1, 2), (12, 10), (40, 30)])
def test_any_number_of_sites_and_classes_fits(tmp_path, n_sites, n_classes):
    sites = tuple(f"site-{i + 1}" for i in range(n_sites))
    page = written(make_run(tmp_path / "many", sites=sites, classes=[f"class {i}" for i in range(n_classes)]))
    labels = page.sections["distribution"]
    assert all(site in labels for site in sites)
    assert all(f"class {i}" in labels for i in range(n_classes))
    assert len(page.html) < 2_000_000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run of 1,000 sites and 100 rounds, and its page."""
    run = write_run(tmp_path_factory.mktemp("many") / "run", 1000, 100, cohort=50, tested=200)
    return run, written(run)


class TestManySites:
    """A thousand sites and a hundred rounds: distributions instead of lists."""

    def test_have_a_small_page(self, many):
        _, page = many
        assert len(page.html) < 600_000
        assert max(map(len, page.plots())) < 100

    def test_have_curves_of_their_distribution(self, many):
        _, page = many
        assert page.plots()[:2] == [
            "accuracy by round: mean and distribution over the sites",
            "loss by round: mean and distribution over the sites",
        ]
        assert all(text in page.sections["rounds"] for text in ("min to max", "10 % to 90 %", "median", "all sites"))

    def test_have_the_numbers_in_the_curves(self, many):
        run, page = many
        entry = schema.read(run)["rounds"][7]
        accuracies, losses = sorted(entry["sites"].values()), sorted(entry["losses"].values())
        assert len(accuracies) == 50
        rows = [row[1:] for row in page.rows["rounds"] if row[0] == "7"]
        assert rows == [
            [name, f"{accuracy:.3f}", f"{loss:.3f}"]
            for name, accuracy, loss in (
                ("all sites", entry["accuracy"], entry["loss"]),
                *((name, accuracies[i], losses[i]) for name, i in zip(QUANTILES, (0, 4, 24, 44, 49), strict=True)),
            )
        ]

    def test_have_a_distribution_and_the_worst_sites_in_the_final_test(self, many):
        run, page = many
        test = schema.read(run)["test"]["sites"]
        rows = [row for row in page.rows["test"] if row[0] in QUANTILES or row[0].startswith("site-")]
        assert [row[2] for row in rows[:5]] == [
            f"{sorted(own['accuracy'] for own in test.values())[i]:.3f}" for i in (0, 19, 99, 179, 199)
        ]
        assert [row[0] for row in rows[5:]] == sorted(test, key=lambda site: test[site]["accuracy"])[:10]

    def test_have_a_heat_map_with_a_color_bar(self, many):
        _, page = many
        text = page.sections["distribution"]
        assert "images (white: none)" in text and "sorted by their most frequent class" in text
        assert "site-500" not in text
        assert [row[0] for row in page.rows["distribution"]] == ["site", *QUANTILES]

    def test_say_who_took_part(self, many):
        _, page = many
        assert "In each round, 50 random sites of 1,000 trained (994 in at least one)." in page.text
        assert "The final test covers 200 random sites of 1,000." in page.text

    def test_share_a_row_of_the_audit_log(self, many):
        _, page = many
        rows = [row for row in page.rows["audit"] if row[1:2] == ["train"]]
        assert [row[0] for row in rows] == [str(number) for number in range(1, 101)]
        assert all(row[2] == "50" and row[3].endswith(" and 47 more") for row in rows)
        assert "5,000 answers of 994 sites" in page.sections["audit"]

    def test_have_a_timeline_of_their_hosts(self, many):
        _, page = many
        assert [row[0] for row in page.rows["time"]] == ["process", "host-1", "host-2", "host-3", "host-4"]


class TestRealSites:
    """Their images are not on this machine, and each site decides what it shares."""

    @pytest.fixture
    def run(self, tmp_path):
        """Of three sites, one was lost after the first round."""
        run = make_run(tmp_path / "real", env="prod", dataset="image_folder", lost=["site-3"])
        result = schema.read(run)
        for entry in result["rounds"][1:]:
            entry["sites"]["site-3"] = entry["losses"]["site-3"] = None
        result["test"]["sites"] = {site: result["test"]["sites"][site] for site in SITES[:2]}
        save(run, result)
        self.share(run, {})
        return run

    def share(self, run, counts):
        partition = {"classes": CLASSES, "sites": {}, "counts": counts}
        run.partition.write_text(json.dumps(partition), encoding="utf-8")

    def test_that_do_not_share_their_counts_have_a_page(self, run):
        page = written(run)
        assert "Unknown: no site reported its images per class." in page.sections["distribution"]
        assert ["2", "site-2", "0.251", "0.251"] in page.rows["rounds"]

    def test_that_share_their_counts_are_shown_and_the_others_named(self, run):
        self.share(run, {"site-1": dict.fromkeys(CLASSES, 4), "site-2": {}})
        page = written(run)
        assert "Images per site and class, 1 sites" in page.plots()
        assert "Not reported by: site-2." in page.sections["distribution"]
        assert page.rows["distribution"] == []

    def test_without_test_images_have_no_accuracy(self, run):
        result = schema.read(run)
        tests = {site: {"accuracy": None, "loss": None, "images": 0} for site in SITES[:2]}
        result["test"] = {"accuracy": None, "loss": None, "sites": tests, "worst": None}
        save(run, result)
        page = written(run)
        assert ["site-1", "0", "-", "-"] in page.rows["test"]


def classified(true, logits):
    """The counts that a site sends of test images with these labels and logits, as lists."""
    scores = ScoreCounts(logits.shape[1])
    for batch in torch.arange(len(true)).split(100):
        scores.on_test_batch_end(None, None, logits[batch], (None, true[batch]), 0)
    return {name: array.tolist() for name, array in scores.counts().items()}


class TestTheTestOfTheFinalModel:
    """Metrics by class and site, from counts that the sites send."""

    @pytest.fixture
    def tested(self, run):
        """Three sites, of which the first is the worst, and a model that never predicts the last class."""
        generator = torch.Generator().manual_seed(0)
        sites = {}
        for i, site in enumerate(SITES):
            true = torch.randint(0, 10, (80,), generator=generator)
            logits = 2 * torch.randn(80, 10, generator=generator)
            logits[range(80), true] += 1 + i
            logits[:, 9] = -50
            sites[site] = classified(true, logits)
        run.test_counts.write_text(json.dumps({"classes": CLASSES, "sites": sites}), encoding="utf-8")
        result = schema.read(run)
        result["test"]["never_predicted"] = ["9"]
        save(run, result)
        return run

    def test_has_each_metric_with_its_interval_next_to_the_worst_site_and_the_majority(self, tested):
        rows = written(tested).rows["test"]
        assert rows[0][1:3] == ["all sites (95 % interval)", "worst site: site-1"]
        assert [row[0] for row in rows[1:6]] == [*METRICS]
        accuracy, low, high = map(float, re.findall(r"0\.\d+", rows[1][1]))
        assert low < accuracy < high and float(rows[1][2]) < accuracy
        assert rows[0][3].startswith("always ") and float(rows[1][3]) < 0.2 and rows[2][3] == "0.100"

    def test_has_a_row_per_class_and_per_site(self, tested):
        rows = written(tested).rows["test"]
        header = rows.index(["class", "test images", *CLASS_METRICS])
        of_all = rows[header + 1 : header + 11]
        assert [row[0] for row in of_all] == CLASSES and sum(int(row[1]) for row in of_all) == 240
        assert of_all[9][2].startswith("0.000 (0.000 to 0.") and of_all[9][4:6] == ["-", "0.000"]
        assert rows[-4][:4] == ["site", "test images", "accuracy", "loss"]
        assert [len(row) for row in rows[-3:]] == [8] * 3

    def test_shows_confusion_and_reliability(self, tested):
        plots = written(tested).plots()[2:5]
        assert plots[0] == "Confusion matrix, all sites: 240 test images"
        assert plots[1] == "Confusion matrix, worst site: site-1: 80 test images"
        assert plots[2].startswith("Reliability: ")

    def test_warns_of_a_class_that_is_never_predicted(self, tested):
        assert "Never predicted, although there are test images of it: class 9." in written(tested).sections["test"]

    def test_names_the_sites_that_do_not_share_their_counts(self, tested):
        counts = json.loads(tested.test_counts.read_text())
        del counts["sites"]["site-1"]
        tested.test_counts.write_text(json.dumps(counts), encoding="utf-8")
        page = written(tested)
        assert "because they do not share these counts: site-1." in page.sections["test"]
        assert page.rows["test"][-3][:5] == ["site-1", "0", "0.250", "1.250", "-"]

    def test_is_short_if_no_site_shared_them(self, run):
        page = written(run)
        assert "Metrics by class are unknown" in page.sections["test"]
        assert page.rows["test"][-1] == ["site-3", "0", "0.250", "1.250"]


class TestTheAuditLog:
    def test_lists_everything_in_a_message(self):
        record = exchange.describe(answer(NUM_STEPS_CURRENT_ROUND=12))
        assert record["round"] == 0
        assert record["tensors"] == [
            {"name": "model.fc3.weight", "shape": [10, 84], "dtype": "float32", "bytes": 3360},
            {"name": "model.fc3.bias", "shape": [10], "dtype": "float32", "bytes": 40},
        ]
        assert record["metrics"] == ["val_loss", "val_acc"]
        assert record["meta"]["NUM_STEPS_CURRENT_ROUND"] == "int"
        assert record["headers"]["current_round"] == "int"

    def test_lists_the_metrics_of_an_evaluation(self):
        record = exchange.describe(DXO(DataKind.METRICS, data={"test_acc": 0.5}).to_shareable())
        assert (record["metrics"], record["tensors"], record["round"]) == (["test_acc"], [], None)

    def test_lists_what_should_not_be_there(self):
        picture = np.zeros((3, 32, 32), np.uint8)
        message = answer(thumbnail=b"\x89PNG" * 25, nested={"patients": ["Ann", picture]})
        message["extra"] = "text"
        message.set_header("hidden", picture)
        record = exchange.describe(message)
        assert record["meta"]["thumbnail"] == "bytes, length 100"
        assert record["meta"]["nested/patients/0"] == "str, length 3"
        assert record["meta"]["extra"] == "str, length 4"
        named = {tensor["name"]: tensor["shape"] for tensor in record["tensors"]}
        assert named["DXO/meta/nested/patients/1"] == [3, 32, 32] and named["__headers__/hidden"] == [3, 32, 32]
        assert "Ann" not in json.dumps(record)

    def test_has_one_row_for_all_sites_with_the_same_answer(self, run):
        add_answers(run, ("site-2", answer()), ("site-1", answer()), ("site-3", answer(extra_metric=1)))
        page = written(run)
        rows = [row for row in page.rows["audit"] if row[0] == "1"]
        assert [row[1:7] for row in rows] == [
            ["train", "2", "site-1, site-2", "list A: 2", "3,400", "val_loss, val_acc"],
            ["train", "1", "site-3", "list A: 2", "3,400", "val_loss, val_acc"],
        ]
        assert ["model.fc3.weight", "10 × 84", "float32", "3,360"] in page.rows["audit"]
        assert "3 answers of 3 sites, 10,200 bytes" in page.sections["audit"]
        assert "Every tensor matches a weight of the final model" in page.sections["audit"]

    def test_of_the_current_version_has_the_same_rows(self, run):
        add_answers(run, ("site-2", answer()), ("site-1", answer()))
        older = written(run).rows["audit"]
        line = {"sites": list(SITES[:2]), "task": "train", **exchange.describe(answer())}
        run.audit_log.write_text(json.dumps(line) + "\n", encoding="utf-8")
        assert written(run).rows["audit"] == older

    def test_does_not_claim_more_than_it_lists(self, run):
        """Curves have one line each, and administrators' requests are not in it."""
        add_answers(run, ("site-1", answer()))
        text = written(run).sections["audit"]
        assert "What is not listed did not arrive" not in text
        assert "Every answer to a task (training, evaluation) is listed in full" in text
        assert "Of a tracker's curve, only the first message" in text
        assert "Not listed are NVFlare's other messages" in text and "administrators" in text

    def test_names_tensors_that_are_not_in_the_model(self, run):
        add_answers(run, ("site-1", answer({"batch": torch.zeros(16, 3, 32, 32)})), ("site-2", answer()))
        page = written(run)
        assert (
            "Tensors that do not match a weight of the final model by name and shape: batch." in page.sections["audit"]
        )
        assert ["batch", "16 × 3 × 32 × 32", "float32", "196,608"] in page.rows["audit"]


class TestTiming:
    @pytest.fixture(autouse=True)
    def announced(self, run):
        self.announce(run.server / PROGRESS, SERVER)
        for site in ("site-10", "site-2"):
            self.announce(run.progress(site), SITE)

    def announce(self, file, phases):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        for time, phase in phases:
            append_json(file, {"time": 1_700_000_000 + time, "phase": phase})

    def test_is_on_the_page(self, run):
        page = written(run)
        assert "Timeline of each process" in page.plots()
        assert ["site-2", "10.5", "8.2", "4.0", "7.2"] in page.rows["time"]

    def test_is_unknown_if_a_sites_records_are_incomplete(self, run):
        file = run.progress("site-2")
        file.write_text("".join(line for line in file.read_text().splitlines(True) if WAITING not in line))
        assert "Unknown" in written(run).sections["time"]

    def test_comes_from_the_result_if_the_records_are_gone(self, run):
        sums = timing.totals(timing.phases(run))
        shutil.rmtree(run.workspace)
        save(run, {**schema.read(run), "timing": sums})
        page = written(run)
        assert ["site-2", "10.5", "8.2", "4.0", "7.2"] in page.rows["time"]
        assert "Timeline of each process" not in page.plots()


def test_several_runs_are_compared_on_one_page(run, tmp_path):
    import results

    second = make_run(tmp_path / "<b>second", seed=7)
    compared = {run.name: schema.read(run), second.name: schema.read(second)}
    rows = results.compare(compared, None)
    page = Page(report.write_comparison(compared, rows, tmp_path / "comparison.html", "Read <b>this</b>."))
    assert ["seed", "0", "7"] in page.rows["table"]
    assert [attributes for tag, attributes in page.tags if tag == "tr" and attributes] == [{"class": "differs"}]
    assert page.plots() == ["accuracy by round: first, <b>second", "loss by round: first, <b>second"]
    assert "b" not in {tag for tag, _ in page.tags}


def test_curves_of_a_resumed_run_begin_where_it_began(run, tmp_path):
    result = schema.read(run)
    for entry in result["rounds"]:
        entry["round"] += 70
    page = Page(report.write_comparison({"first": result}, [["", "first"]], tmp_path / "comparison.html", ""))
    assert "72" in page.sections["rounds"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it(tmp_path):
    from PIL import Image

    assert CHROMIUM

    page, picture = report.write(write_run(tmp_path / "run", 3)), tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *flags, "--window-size=1200,4000", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    white = (pixels == 255).all(axis=2)
    assert pixels.shape == (4000, 1200, 3)
    assert not white[:2500].all(axis=1).reshape(-1, 500).all(axis=1).any()  # no part of the page is empty
    blue = (pixels[..., 2].astype(int) - pixels[..., 0] > 60).sum()
    assert blue > 5000  # the heat maps and the lines
