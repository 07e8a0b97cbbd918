"""Classify images with a run's model: `python predict.py RUN IMAGE ...`. An IMAGE can be a folder of images.

RUN can also be a folder with nothing but `final.pt` and `model.json`: besides this project, a colleague needs only
these. `--export FILE` writes the model for ONNX Runtime.
"""

import federation.launch.packages  # noqa: F401 (first: without them, nothing below works)

# isort: split
import csv
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from federation.errors import RunError, UserError, exit_code
from federation.launch.model_file import check_model, model_names
from federation.launch.options import PROJECT, Command, read_arguments
from federation.run.folder import MODEL_CARD, RunFolder
from results import print_table

BATCH = 500  # images in memory
TOLERANCE = 1e-4  # difference in probability between PyTorch and ONNX Runtime
NEXT = 2  # classes in the table besides the most probable one


def main() -> None:
    flags = [
        click.Argument(["run"]),
        click.Argument(["images"], nargs=-1, metavar="[IMAGE]..."),
        click.Option(
            ["--best"], is_flag=True, help="use the model with the best validation accuracy, not the final one"
        ),
        click.Option(["--csv", "as_csv"], is_flag=True, help="write CSV: image, class, and each class's probability"),
        click.Option(["--export"], metavar="FILE", help="write the model to FILE in ONNX format"),
    ]
    purpose = "Classify images. RUN is a run, or a folder with its final.pt and model.json; IMAGE can be a folder."
    given = read_arguments(Command("predict.py", params=flags, help=purpose)).params
    run = RunFolder.find(given["run"], MODEL_CARD)
    paths = find_images(given["images"])
    if not paths and not given["export"]:
        raise UserError("no image: name images or folders of images after the run, or use --export FILE")
    if given["export"] and (lacking := [name for name in ("onnxscript", "onnxruntime") if not is_installed(name)]):
        raise UserError(f"--export needs packages: {sys.executable} -m pip install {' '.join(lacking)}")
    model, card = load(run, given["best"])
    if given["export"]:
        export(model, card, Path(given["export"]))
    if paths:
        show(paths, classify(model, card, paths), card["classes"], given["as_csv"])


def find_images(places: tuple[str, ...]) -> list[Path]:
    """The images that the user named, and those in the folders.

    Raises:
        UserError: a place does not exist, or a folder has no image.
    """
    from federation.site.catalog import images_in

    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place} does not exist: name an image or a folder of images")
        images = images_in(place) if place.is_dir() else [place]
        if not images:
            raise UserError(f"{place} has no images: name an image or a folder of images")
        found += images
    return found


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load(run: RunFolder, best: bool = False) -> tuple[Any, dict[str, Any]]:
    """A run's final or best model, ready to evaluate, and its model.json.

    Raises:
        UserError: they are not there, do not belong together, or do not fit model.py and data.py.
    """
    from federation.run import model_card  # which imports data.py, and so PyTorch

    file = run.best if best else run.final
    card = model_card.read(run, file)
    options = model_card.options_of(card)
    if options.model_class not in model_names(PROJECT / "model.py"):
        raise UserError(f"{file} is a {options.model_class}, which is not in model.py")
    check_model(options.model_class)
    import data
    from trainer import load_model

    if not card["images"] or not hasattr(data, "read_images"):
        raise UserError("data.py does not read image files: add image_rule, read_images and normalize to it")
    return load_model(file, options), card


def classify(model: Any, card: dict[str, Any], paths: list[Path]) -> list[list[float]]:
    """The probability of each class, for each image.

    Raises:
        UserError: an image cannot be read, or the model returns no score per class.
    """
    import torch

    from data import normalize, read_images

    found: list[list[float]] = []
    for start in range(0, len(paths), BATCH):
        images = read_images(paths[start : start + BATCH], card["images"])
        with torch.inference_mode():
            scores = model(normalize(images, card["images"]))
        if scores.shape != (len(images), len(card["classes"])):
            raise UserError("forward of model.py does not return a score per image and class")
        found += scores.softmax(dim=1).tolist()
    return found


def show(paths: list[Path], probabilities: list[list[float]], classes: list[str], as_csv: bool) -> None:
    """Print a table of the most probable classes, or CSV with all of them."""
    rows = [["image", "class", *(classes if as_csv else ["probability", "next"])]]
    for path, own in zip(paths, probabilities, strict=True):
        first, *others = sorted(range(len(classes)), key=lambda i: -own[i])
        following = ", ".join(f"{classes[i]} {own[i]:.3f}" for i in others[:NEXT])
        values = [f"{value:.6g}" for value in own] if as_csv else [f"{own[first]:.3f}", following]
        rows.append([os.fsencode(path).decode(errors="replace"), classes[first], *values])
    if as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    else:
        print_table("", rows)


def export(model: Any, card: dict[str, Any], file: Path) -> None:
    """Write the model with its normalization as ONNX, and its model.json in the file's metadata, once that is checked.

    Input `images`, uint8 (N, 3, S, S); output `probabilities`, float32 (N, classes).

    Raises:
        UserError: the file cannot be written.
        RunError: ONNX Runtime computes other probabilities than PyTorch.
    """
    import onnxruntime
    import torch

    from data import normalize

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(normalize(images, card["images"])).softmax(dim=1)

    rule, whole = card["images"], Whole().eval()
    random = torch.Generator().manual_seed(0)
    shape = (3, rule["channels"], rule["size"], rule["size"])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    program = torch.onnx.export(
        whole,
        (images[:2],),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        dynamo=True,
        verbose=False,
    )
    assert program  # None only without dynamo
    program.model.metadata_props[MODEL_CARD] = json.dumps(card)
    content = program.model_proto.SerializeToString()
    [found] = onnxruntime.InferenceSession(content).run(None, {"images": images.numpy()})
    with torch.inference_mode():
        difference = float((torch.from_numpy(found) - whole(images)).abs().max())
    if not difference <= TOLERANCE:
        raise RunError(f"ONNX Runtime's probabilities differ from PyTorch's by {difference:.1g}: nothing was written")
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UserError(f"--export: cannot write {file}: {error.strerror}") from None
    print(f"{file}: ONNX Runtime and PyTorch agree on {len(images)} random images to {difference:.1g}")


if __name__ == "__main__":
    sys.exit(exit_code("predict.py", main))
