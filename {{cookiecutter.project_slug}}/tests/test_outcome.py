"""What is brought home from a finished run's workspace, whoever took part."""

import json

import pytest
import torch

from federation.outcome import bring_home
from federation.workspace import SERVER, RunFailed

NAMES = ("val_acc", "val_loss", "val_images", "test_acc", "test_loss", "test_images")
REPORTS = {
    "site-10": dict(zip(NAMES, (0.5, 2.0, 10, 0.2, 3.0, 10), strict=True)),
    "site-2": dict(zip(NAMES, (0.9, 1.0, 30, 0.6, 1.0, 30), strict=True)),
}


@pytest.fixture
def run(tmp_path):
    """A run of one round, as NVFlare's server and FinalEvaluation leave it."""
    server = tmp_path / "workspace" / SERVER
    (server / "metrics").mkdir(parents=True)
    metrics = [{"name": "val_acc", "value": 0.1}, {"name": "val_loss", "value": 2.3}]
    record = {"round": 0, "aggregated_metrics": metrics, "sites": [{"name": s, "metrics": metrics} for s in REPORTS]}
    (server / "metrics" / "round_metrics.jsonl").write_text(json.dumps(record) + "\n")
    final = {"round": 1, "accuracy": 0.8, "sites": REPORTS}
    (server / "evaluation.json").write_text(json.dumps({"final": final, "best": final}))
    torch.save({"w": torch.ones(2)}, server / "final.pt")
    return tmp_path


def test_sites_count_by_their_images(run):
    home = bring_home(run, 1, list(REPORTS))
    assert [entry["accuracy"] for entry in home["rounds"]] == pytest.approx([0.1, (0.5 * 10 + 0.9 * 30) / 40])
    assert home["rounds"][1]["loss"] == pytest.approx((2.0 * 10 + 1.0 * 30) / 40)
    assert home["test"]["accuracy"] == pytest.approx((0.2 * 10 + 0.6 * 30) / 40)
    assert home["test"]["worst"] == "site-10"
    assert list(home["test"]["sites"]) == ["site-2", "site-10"]


def test_a_site_that_took_no_part_is_named(run):
    assert bring_home(run, 1, list(REPORTS))["lost"] == []
    assert bring_home(run, 1, [*REPORTS, "site-3"], tolerant=True)["lost"] == ["site-3"]
    with pytest.raises(RunFailed, match="site-3 did not evaluate the final model"):
        bring_home(run, 1, [*REPORTS, "site-3"])


def test_rounds_that_are_missing_are_a_fault(run):
    with pytest.raises(RunFailed, match="only 1 of 2 rounds were finished"):
        bring_home(run, 2, list(REPORTS))


def test_a_run_without_a_final_evaluation_is_a_fault(run):
    (run / "workspace" / SERVER / "evaluation.json").unlink()
    with pytest.raises(RunFailed, match="no site evaluated the final model"):
        bring_home(run, 1, list(REPORTS))
