"""Other data and another model: tests/tabular/ replaces data.py and model.py, and nothing else changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.tabular.data import SiteDataModule

TABULAR = Path(__file__).with_name("tabular")


@pytest.mark.federation
def test_other_data_and_another_model_need_no_other_changes(project):
    for name in ("data.py", "model.py"):
        shutil.copy(TABULAR / name, project.folder / name)
    project.run("job.py", "--num_rounds", "3", "--name", "table")
    run = project.folder / "runs" / "table"
    assert json.loads((run / "results.json").read_text())["test"]["accuracy"] > 0.9
    project.run("results.py", "table", "--html")
    assert "malignant" in (run / "report.html").read_text(encoding="utf-8")


def test_a_table_is_standardized_by_the_sites_own_training_rows(options):
    for module in (SiteDataModule(site, options()) for site in ("site-1", "site-2", None)):
        module.setup()
        rows = torch.cat([batch for batch, _ in module.train_dataloader()])
        assert rows.mean(dim=0).abs().max() < 1e-3
        assert (rows.std(dim=0, correction=0) - 1).abs().max() < 1e-3
        others = torch.cat([batch for batch, _ in module.test_dataloader()])
        assert others.mean(dim=0).abs().max() > 1e-2  # not of the rows that judge the model
