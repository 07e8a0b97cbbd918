"""Nothing outlives a round by accident: the same bits in one process or several, at once or resumed."""

import json

import numpy as np
import pytest
from PIL import Image

from programs import Project

pytestmark = pytest.mark.slow

# Random numbers in training, a schedule over all rounds, and a state that is in no state dict.
MODEL = """

class LitDropout(LitNet):
    def __init__(self, num_classes: int, options: Options):
        super().__init__(num_classes, options)
        self.round = 0
        self.dropout = nn.Dropout(0.3)
        self.n_steps = 0

    def forward(self, x):
        self.n_steps += 1
        return self.model(self.dropout(x)) * (1 + 0.01 * self.n_steps)

    configure_optimizers = LitResNet.configure_optimizers
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Few and small ones, so that a ResNet takes no time."""
    random = np.random.RandomState(0)
    root = tmp_path_factory.mktemp("images")
    for split, n_images in (("train", 24), ("test", 6)):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for number in range(n_images):
                pixels = random.randint(100 * label, 100 * label + 156, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return str(root)


@pytest.fixture(scope="module")
def project(tmp_path_factory, shared_cache) -> Project:
    project = Project(tmp_path_factory.mktemp("rounds") / "project")
    with (project.folder / "model.py").open("a") as file:
        file.write(MODEL)
    return project


@pytest.fixture(scope="module")
def train(project, images):
    """Run a federation of two sites and return its results.json; one that was asked for before is not run again."""
    known: dict[tuple, dict] = {}

    def run(*flags: str) -> dict:
        if flags not in known:
            name = f"run{len(known)}"
            usual = ("--dataset", "image_folder", "--image_size", "16", "--n_clients", "2", "--local_epochs", "2")
            flags_ = flags if "--resume" in flags else (*usual, *flags)
            root = ("--data_root", images)
            done = project.run("job.py", *flags_, *root, "--name", name, OMP_NUM_THREADS="1")
            assert done.returncode == 0, done.stderr
            result = json.loads((project.folder / "runs" / name / "results.json").read_text())
            known[flags] = {**result, "name": name, "screen": done.stdout}
        return known[flags]

    return run


@pytest.mark.parametrize("model", ["LitNet", "LitResNet", "LitDropout"])
@pytest.mark.parametrize("otherwise", [("--n_hosts", "1"), ("--env", "poc")], ids=["on one host", "in a POC"])
def test_a_site_trains_the_same_in_a_process_of_its_own_and_on_a_host(train, model, otherwise):
    at_once = train("--model", model, "--num_rounds", "3", "--n_hosts", "2")
    other = train("--model", model, "--num_rounds", "3", *otherwise)
    assert other["sha256"] == at_once["sha256"]
    assert other["rounds"] == at_once["rounds"]


@pytest.mark.parametrize("model", ["LitNet", "LitDropout"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox"])
def test_two_halves_equal_the_whole_if_the_schedule_spans_both(train, model, algorithm):
    how = ("--model", model, "--algorithm", algorithm)
    whole = train(*how, "--num_rounds", "2")
    first = train(*how, "--num_rounds", "1", "--total_rounds", "2")
    second = train("--resume", first["name"], "--num_rounds", "1")
    assert (second["total_rounds"], second["resumed"]) == (2, {"run": first["name"], "round": 1})
    assert "a learning-rate schedule" not in second["screen"]
    assert second["sha256"] == whole["sha256"]
    assert [stage["rounds"] for stage in second["stages"]] == [1, 1]


def test_a_schedule_that_did_not_span_the_second_half_is_stretched_with_a_message(train):
    first = train("--model", "LitDropout", "--num_rounds", "1")
    second = train("--resume", first["name"], "--num_rounds", "1")
    assert "a learning-rate schedule now spans 2 rounds, not 1" in second["screen"]
    assert second["sha256"] != train("--model", "LitDropout", "--algorithm", "fedavg", "--num_rounds", "2")["sha256"]


@pytest.mark.parametrize(
    ("algorithm", "what"), [("scaffold", "the control variates restart"), ("fedopt", "the server's momentum restarts")]
)
def test_a_resumed_run_says_what_restarts(train, algorithm, what):
    first = train("--algorithm", algorithm, "--num_rounds", "1")
    assert f"{what} at zero" in train("--resume", first["name"], "--num_rounds", "1")["screen"]
