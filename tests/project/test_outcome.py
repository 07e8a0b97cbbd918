"""What is collected from a finished run's workspace."""

import json

import pytest
import torch

from federation.errors import RunError
from federation.run import outcome, schema
from federation.run.folder import RunFolder
from settings import Options

NAMES = ("val_acc", "val_loss", "val_images", "test_acc", "test_loss", "test_images")
REPORTS = {
    "site-10": dict(zip(NAMES, (0.5, 2.0, 10, 0.2, 3.0, 10), strict=True)),
    "site-2": dict(zip(NAMES, (0.9, 1.0, 30, 0.6, 1.0, 30), strict=True)),
}


def collect(run, num_rounds, sites, patience=None, env="sim"):
    return outcome.collect(RunFolder(run), Options(num_rounds=num_rounds, patience=patience, env=env), sites)


def failure(run, error):
    return outcome.failure(RunFolder(run), error, site_failed=False)


def write_rounds(run, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (RunFolder(run).server / "rounds.jsonl").write_text(text)


def reports(run, sites):
    """Replace the final evaluation."""
    final = {"round": 1, "accuracy": None, "sites": sites}
    (RunFolder(run).server / "evaluation.json").write_text(json.dumps({"final": final, "best": final}))


@pytest.fixture
def run(tmp_path):
    """A run of one round, as written by NVFlare's server and FinalEvaluation."""
    server = RunFolder(tmp_path).server
    server.mkdir(parents=True)
    metrics = {"val_acc": 0.1, "val_loss": 2.3}
    sites = {site: {"metrics": metrics, "train": 40, "val": report["val_images"]} for site, report in REPORTS.items()}
    write_rounds(tmp_path, [{"round": 0, "metrics": metrics, "sites": sites, "rejected": []}])
    final = {"round": 1, "accuracy": 0.8, "sites": REPORTS}
    (server / "evaluation.json").write_text(json.dumps({"final": final, "best": final}))
    torch.save({"round": 1, "model": {"w": torch.ones(2)}}, server / "last.pt")
    return tmp_path


def test_means_are_weighted_by_images(run):
    collected = collect(run, 1, list(REPORTS))
    assert [entry["accuracy"] for entry in collected["rounds"]] == pytest.approx([0.1, (0.5 * 10 + 0.9 * 30) / 40])
    assert collected["rounds"][1]["loss"] == pytest.approx((2.0 * 10 + 1.0 * 30) / 40)
    assert collected["test"]["accuracy"] == pytest.approx((0.2 * 10 + 0.6 * 30) / 40)
    assert collected["test"]["worst"] == "site-10"
    assert list(collected["test"]["sites"]) == ["site-2", "site-10"]


def test_a_lost_site_is_named(run):
    assert collect(run, 1, list(REPORTS))["lost"] == []
    assert collect(run, 1, [*REPORTS, "site-3"], env="prod")["lost"] == ["site-3"]
    with pytest.raises(RunError, match="site-3 did not evaluate the final model"):
        collect(run, 1, [*REPORTS, "site-3"])


def test_missing_rounds_are_an_error(run):
    with pytest.raises(RunError, match="only 1 of 2 rounds finished"):
        collect(run, 2, list(REPORTS))


def test_a_missing_final_evaluation_is_an_error(run):
    (RunFolder(run).server / "evaluation.json").unlink()
    with pytest.raises(RunError, match="no site evaluated the final model"):
        collect(run, 1, list(REPORTS))


def test_a_model_without_an_accuracy_has_a_result(run):
    reports(run, {site: {"val_images": 5, "test_images": 5, "test_loss": 1.5} for site in REPORTS})
    collected = collect(run, 1, list(REPORTS))
    assert (collected["test"]["accuracy"], collected["test"]["loss"], collected["test"]["worst"]) == (None, 1.5, None)
    assert collected["rounds"][1]["accuracy"] is None
    assert collected["rounds"][1]["missing"] == []


def test_a_missing_accuracy_is_not_the_worst(run):
    some = {"site-2": REPORTS["site-2"], "site-10": {"val_images": 5, "test_images": 5}}
    reports(run, some)
    assert collect(run, 1, list(REPORTS))["test"]["worst"] == "site-2"


def test_a_round_lists_the_sites_missing_from_its_means(run):
    sites = {"site-2": {"metrics": {"val_acc": 0.1}, "train": 40, "val": 30}}
    write_rounds(run, [{"round": 0, "metrics": {"val_acc": 0.1}, "sites": sites, "rejected": []}])
    first, last = collect(run, 1, [*REPORTS, "site-3"], env="prod")["rounds"]
    assert (first["missing"], last["missing"]) == (["site-3", "site-10"], ["site-3"])
    assert first["accuracy"] == 0.1


def test_with_cohorts_a_round_is_about_the_sites_that_were_drawn(run):
    """site-2 trained in the only round; of the final evaluation's sample, site-3 is lost."""
    own = {"train": 40, "val": 30}
    sites = {"site-2": {"metrics": {"val_acc": 0.123456789}, **own}}
    write_rounds(run, [{"round": 0, "metrics": {"val_acc": 0.123456789}, "sites": sites, "rejected": []}])
    drawn = [
        {"task": "train", "round": 0, "sites": ["site-2"]},
        {"task": "validate", "round": None, "sites": ["site-10", "site-3", "site-2"]},
    ]
    (RunFolder(run).server / "cohorts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in drawn))
    options = Options(num_rounds=1, sites_per_round=1, evaluate_sites=3, env="prod")
    collected = outcome.collect(RunFolder(run), options, [f"site-{i}" for i in range(1, 21)])
    first, last = collected["rounds"]
    assert (first["sites"], first["missing"], first["participants"]) == ({"site-2": 0.1234568}, [], None)
    assert (list(last["sites"]), last["missing"]) == (["site-2", "site-10", "site-3"], ["site-3"])
    assert last["participants"] == ["site-2"]
    assert collected["lost"] == ["site-3"]


def test_rounds_before_a_loss_are_means_over_the_remaining_sites(run):
    own = {"train": 40, "val": 30}
    sites = {"site-2": {"metrics": {"val_acc": 0.5}, **own}, "site-3": {"metrics": {"val_acc": 0.9}, **own}}
    write_rounds(run, [{"round": 0, "metrics": {"val_acc": 0.7}, "sites": sites, "rejected": []}])
    reports(run, {"site-2": REPORTS["site-2"]})
    first, _ = collect(run, 1, ["site-2", "site-3"], env="prod")["rounds"]
    assert first["accuracy"] == 0.5


def test_a_rejected_final_answer_does_not_fail_the_run(run):
    rejected = {
        "round": None,
        "site": "site-3",
        "task": "validate",
        "reason": "val_acc is 7, which is not within 0 to 1",
    }
    (RunFolder(run).server / "rejected.jsonl").write_text(json.dumps(rejected) + "\n")
    collected = collect(run, 1, [*REPORTS, "site-3"])
    assert (collected["rejected"], collected["lost"]) == ([rejected], ["site-3"])


def test_a_run_ended_by_the_server_has_its_reason_and_the_last_model(run):
    assert failure(run, RunError("the simulator ended with code 2")).startswith("the simulator ended with code 2\n")
    server = RunFolder(run).server
    (server / "failure.json").write_text(json.dumps({"reason": "the global model is not finite after round 2"}))
    message = failure(run, RunError("the simulator ended with code 2")).splitlines()
    assert message[0] == "the global model is not finite after round 2"
    assert torch.equal(torch.load(run / "last.pt", weights_only=True)["w"], torch.ones(2))
    assert message[1] == (
        f"{run}/last.pt is the global model after round 1, the last that finished; "
        f"resume with: python job.py --resume {run.name}"
    )
    assert json.loads((run / "failure.json").read_text()) == {"reason": message[0]}
    (server / "last.pt").unlink()
    assert "last.pt" not in failure(run, RunError("early"))


def test_patience_counts_the_rounds_since_the_best(run):
    accuracies = [0.1, 0.5, 0.3, 0.5]  # of equals, the first
    write_rounds(
        run, [{"round": k, "metrics": {"val_acc": a}, "sites": {}, "rejected": []} for k, a in enumerate(accuracies)]
    )
    with pytest.raises(RunError, match="only 4 of 9 rounds finished"):
        collect(run, 9, list(REPORTS), patience=3)
    assert collect(run, 9, list(REPORTS), patience=2)["stopped_early"]


def test_a_site_that_skipped_unreadable_files_is_listed_with_their_number(run):
    assert collect(run, 1, list(REPORTS))["skipped"] == {}
    reports(run, {**REPORTS, "site-2": {**REPORTS["site-2"], "skipped_images": 3}})
    result = {**collect(run, 1, list(REPORTS)), "sites_per_round": None}
    assert result["skipped"] == {"site-2": 3}
    assert schema.caveats(result) == ["3 unreadable files were skipped under the data root of site-2"]
