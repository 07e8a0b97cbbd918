"""predict.py: classes of images, from a run or from just its model and model.json; the export to ONNX."""

import csv
import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import data
import predict
from federation.errors import exit_code
from federation.run import model_card
from federation.run.folder import RunFolder
from model import LitNet
from programs import PROJECT
from settings import FITS, Options

CLASSES = [*"0123456789"]
OPTIONS = Options(dataset="digits", data_root="/home/ann/images", n_clients=2, classes=CLASSES)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder of runs, with the run `first`: a final and a best model with random weights, and their model.json."""
    monkeypatch.setattr("federation.run.folder.RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    add_run(tmp_path / "runs" / "first", OPTIONS)
    return tmp_path / "runs"


def add_run(folder: Path, options: Options, n_classes: int = 10) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate(("final.pt", "best.pt")):
        torch.manual_seed(seed)
        torch.save(LitNet(n_classes, options).state_dict(), folder / name)
    test = {"accuracy": 0.5, "loss": 1.5, "sites": {"site-1": {"accuracy": 0.5, "loss": 1.5, "images": 10}}}
    model_card.write(RunFolder(folder), options, {"final.pt": test, "best.pt": test})


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of four images, in a folder within it, and a file that is none."""
    folder = tmp_path / "images" / "inner"
    folder.mkdir(parents=True)
    for i, pixels in enumerate(load_digits().images[:4]):
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((40 + i, 50)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def program(monkeypatch, capsys):
    """program(*arguments): exit code, standard output and standard error of predict.py."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        return exit_code("predict.py", predict.main), *capsys.readouterr()

    return call


def rows_of(program, *arguments) -> list[dict[str, str]]:
    code, out, err = program(*arguments, "--csv")
    assert (code, err) == (0, "")
    return list(csv.DictReader(io.StringIO(out)))


def rejected(program, *arguments) -> str:
    code, out, err = program(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def probabilities(model: LitNet, paths: list[Path]) -> list[list[float]]:
    """What the model makes of images that are stretched to 32 x 32, and scaled to -1 to 1, independently of data.py."""
    side = Image.Resampling.BILINEAR
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((32, 32), side, reducing_gap=2)) for path in paths]
    x = torch.tensor(np.array(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        return model(x).softmax(dim=1).tolist()


def model_of(file: Path) -> LitNet:
    model = LitNet(10, OPTIONS)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


@pytest.mark.parametrize(("flags", "file"), [([], "final.pt"), (["--best"], "best.pt")])
def test_every_image_gets_the_probabilities_of_the_chosen_model(runs, images, program, flags, file):
    rows = rows_of(program, "first", images, *flags)
    assert [row.pop("image") for row in rows] == [f"{images}/inner/{i}.png" for i in range(4)]
    expected = probabilities(model_of(runs / "first" / file), sorted(images.rglob("*.png")))
    for row, own in zip(rows, expected, strict=True):
        assert row.pop("class") == str(np.argmax(own))
        assert [*row] == CLASSES
        assert [float(value) for value in row.values()] == pytest.approx(own, rel=1e-4)


def test_the_table_has_the_most_probable_classes(runs, images, program):
    [row] = rows_of(program, "first", "images/inner/2.png")
    code, out, err = program("first", "images/inner/2.png")
    assert (code, err) == (0, "")
    ranked = sorted(CLASSES, key=lambda name: -float(row[name]))
    first, *following = (f"{name} {float(row[name]):.3f}" for name in ranked[:3])
    assert out.splitlines()[-1].split() == f"images/inner/2.png {first} {', '.join(following)}".split()


def test_images_are_classified_in_batches(runs, images, program, monkeypatch):
    rows = rows_of(program, "first", images)
    monkeypatch.setattr(predict, "BATCH", 3)
    again = rows_of(program, "first", images)
    assert [row["class"] for row in again] == [row["class"] for row in rows]


def test_two_files_are_enough_elsewhere(runs, images, program, tmp_path):
    before = rows_of(program, "first", images)
    (tmp_path / "received").mkdir()
    for name in ("final.pt", "model.json"):
        shutil.move(runs / "first" / name, tmp_path / "received" / name)
    shutil.rmtree(runs / "first")
    assert rows_of(program, "received", images) == before
    assert rows_of(program, tmp_path / "received", images) == before


def test_classes_and_normalization_are_those_of_the_training(runs, images, program, monkeypatch):
    before = rows_of(program, "first", images)
    monkeypatch.setattr(data, "MEAN", 0.1)
    monkeypatch.setattr(data, "STD", 0.3)
    assert rows_of(program, "first", images) == before
    add_run(runs / "second", OPTIONS)
    assert json.loads((runs / "second" / "model.json").read_text())["images"]["std"] == 0.3
    assert rows_of(program, "second", images) != before


@pytest.mark.parametrize("fit", FITS)
def test_files_are_read_as_for_training(images, tmp_path, fit):
    for split in ("train", "test"):
        shutil.copytree(images / "inner", tmp_path / "root" / split / "cat")
        Image.fromarray(np.arange(0, 4080, 10).astype(np.uint16).reshape(24, 17)).save(
            tmp_path / "root" / split / "cat/4.png"
        )
        shutil.copytree(tmp_path / "root" / split / "cat", tmp_path / "root" / split / "dog")
    options = Options(dataset="image_folder", data_root=str(tmp_path / "root"), image_size=24, classes=["cat", "dog"])
    options.image_fit, options.image_white = fit, 4095
    module = data.SiteDataModule(None, options)
    module.setup("test")
    paths = sorted((tmp_path / "root" / "test").rglob("*.png"))
    read = data.read_images(paths, json.loads(json.dumps(data.image_rule(options))))
    assert (read.numpy() == module.parts["test"].images).all() and len(read) == 10


def test_model_json_has_no_path_and_nothing_of_a_single_site(runs):
    text = (runs / "first" / "model.json").read_text()
    assert "/home/ann" not in text and "site-1" not in text
    assert '"accuracy": 0.5' in text


def test_the_reference_documents_every_key_of_model_json(runs):
    reference = (PROJECT / "REFERENCE.md").read_text(encoding="utf-8")
    section = reference[reference.index("## Models") : reference.index("## Resume")]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert documented == list(json.loads((runs / "first" / "model.json").read_text()))


@pytest.mark.slow
def test_the_sites_own_test_images_give_the_accuracies_of_the_run(project, tmp_path):
    """Photographs of other sizes and shapes than the model's input, gray and color, one folder per site."""
    digits = load_digits()
    for site, start in (("site-1", 0), ("site-2", 150)):
        for i in range(start, start + 150):
            image = Image.fromarray((digits.images[i] * 15).astype(np.uint8))
            image = image.convert("RGB") if i % 2 else image
            folder = tmp_path / site / ("test" if i % 3 == 0 else "train") / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            image.resize((45 + i % 7, 80 - i % 5)).save(folder / f"{i}.jpg")
    flags = ["--dataset", "image_folder", "--data_root", str(tmp_path / "{site}"), "--local_epochs", "20"]
    run = project.run("job.py", *flags, "--name", "first", "--image_size", "28", "--image_fit", "pad")
    assert run.returncode == 0, run.stderr
    assert "images: 28 x 28 pixels (--image_size), padded with black (--image_fit)" in run.stdout.splitlines()
    result = json.loads((project.folder / "runs" / "first" / "results.json").read_text())
    for which, flags in ((result, []), (result["best"], ["--best"])):
        for site, test in which["test"]["sites"].items():
            said = project.run("predict.py", "first", str(tmp_path / site / "test"), "--csv", *flags)
            rows = list(csv.DictReader(io.StringIO(said.stdout)))
            right = [row["class"] == Path(row["image"]).parent.name for row in rows]
            assert (len(right), np.float32(sum(right) / len(right))) == (test["images"], np.float32(test["accuracy"]))
            assert 0.2 < test["accuracy"] < 1  # not what a constant or a perfect guess would have


# ---- what cannot be used


def test_what_does_not_exist_is_named(runs, images, program):
    assert f"{runs}/nope/model.json does not exist" in rejected(program, "nope", images)
    assert "no image: name images or folders" in rejected(program, "first")
    assert "nope.png does not exist" in rejected(program, "first", "nope.png")
    (runs / "empty").mkdir()
    assert "empty has no images" in rejected(program, "first", runs / "empty")
    (runs / "first" / "best.pt").unlink()
    assert "best.pt does not exist" in rejected(program, "first", images, "--best")


def test_a_file_that_is_no_image_is_named(runs, images, program):
    assert "notes.txt is not a readable image" in rejected(program, "first", images / "inner" / "notes.txt")


def test_a_model_that_its_model_json_does_not_describe_is_rejected(runs, images, program):
    shutil.copy(runs / "first" / "best.pt", runs / "first" / "final.pt")
    message = rejected(program, "first", images)
    assert "final.pt is not the model that model.json describes: copy both from one run" in message


def edited(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "is not a model.json of version 1"),
        ({"options": {"model_class": "LitOld"}}, "LitOld, which is not in model.py"),
        ({"options": {"model_class": "LitResNet"}}, "final.pt does not load into LitResNet"),
        ({"classes": ["cat", "dog"]}, "final.pt does not load into LitNet"),
        ({"images": None}, "data.py does not read image files"),
    ],
    ids=["newer", "unknown class", "another class", "other labels", "no images"],
)
def test_a_model_that_does_not_fit_the_project_is_rejected(runs, images, program, changes, said):
    edited(runs / "first" / "model.json", **changes)
    assert said in rejected(program, "first", images)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}'])
def test_a_broken_model_json_is_named(runs, images, program, content):
    (runs / "first" / "model.json").write_text(content)
    assert "first/model.json is " in rejected(program, "first", images)


def test_a_model_without_a_score_per_class_is_rejected(runs, images, program, monkeypatch):
    monkeypatch.setattr(LitNet, "forward", lambda self, x: self.model(x)[:, :3])
    assert "does not return a score per image and class" in rejected(program, "first", images)


# ---- ONNX


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("image_size", [32, 64])
def test_onnx_runtime_gives_the_same_probabilities(runs, images, program, onnxruntime, image_size):
    options = Options(dataset="digits", image_size=image_size, classes=CLASSES)
    add_run(runs / "second", options)
    rows = rows_of(program, "second", images)
    code, out, err = program("second", "--export", "model.onnx")
    assert (code, err) == (0, "") and "ONNX Runtime and PyTorch agree" in out
    reference = (PROJECT / "REFERENCE.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", reference, re.S) if "InferenceSession" in block]
    pixels = data.read_images(sorted(images.rglob("*.png")), data.image_rule(options)).numpy()
    said: list[list[str]] = []
    names = {"onnxruntime": onnxruntime, "json": json, "images": pixels, "print": said.append}
    exec(code, names)
    assert said == [[row["class"] for row in rows]]
    expected = [[float(row[name]) for name in CLASSES] for row in rows]
    assert names["probabilities"].tolist() == [pytest.approx(own, abs=1e-5) for own in expected]


def test_an_export_that_computes_something_else_is_not_written(runs, program, onnxruntime, monkeypatch):
    monkeypatch.setattr(predict, "TOLERANCE", -1.0)
    code, _, err = program("first", "--export", "model.onnx")
    assert (code, err.count("\n")) == (1, 1) and "nothing was written" in err
    assert not Path("model.onnx").exists()


def test_an_export_to_nowhere_is_a_one_line_error(runs, program, onnxruntime):
    assert "--export: cannot write nowhere/model.onnx" in rejected(program, "first", "--export", "nowhere/model.onnx")


def test_an_export_names_the_packages_that_are_missing(runs, program, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else real(name))
    message = rejected(program, "first", "--export", "model.onnx")
    assert message.endswith(" -m pip install onnxscript onnxruntime\n")
