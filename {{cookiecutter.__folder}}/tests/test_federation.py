"""One federation, as job.py runs it: two sites, digits, half a minute."""

import json

import pytest
import torch

from settings import Options
from trainer import make_model


@pytest.mark.federation
def test_a_federation_learns_and_keeps_its_model(project):
    screen = project.run("job.py", "--dataset", "digits", "--num_rounds", "2", "--local_epochs", "2", "--name", "first")
    run = project.folder / "runs" / "first"
    result = json.loads((run / "results.json").read_text())
    untrained, *_, last = (entry["accuracy"] for entry in result["rounds"])
    assert last > untrained + 0.3
    assert f"{last:.3f}" in screen
    model = make_model(Options.of({**result, "classes": list("0123456789")}))
    model.load_state_dict(torch.load(run / "final.pt", weights_only=True))
    sites = json.loads((run / "partition.json").read_text())["sites"].values()
    images = [image for site in sites for part in ("train", "val") for image in site[part]]
    assert len(images) == len(set(images)) == 1437  # no image is at two sites, or in two parts
