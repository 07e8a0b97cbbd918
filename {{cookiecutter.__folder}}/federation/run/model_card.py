"""model.json: what is needed to use a run's models without its data and its results. REFERENCE.md has its keys."""

import hashlib
from pathlib import Path
from typing import Any

import data
from federation.errors import UserError
from federation.protocol import write_json
from federation.run import schema
from federation.run.folder import RunFolder
from settings import Options

VERSION = 1


def write(run: RunFolder, options: Options, tests: dict[str, dict[str, Any]]) -> None:
    """Write a run's model.json.

    Args:
        run: has the models.
        options: of the run, with the federation's `classes`.
        tests: file name of a model -> its `test` metrics, as in results.json; those of single sites are left out.
    """
    made_with = {name: value for name, value in options.of_run().items() if name not in ("classes", "data_root")}
    card = {
        "version": VERSION,
        "run": run.name,
        "classes": options.classes,
        "images": data.image_rule(options) if hasattr(data, "image_rule") else None,
        "sha256": {name: _sha256(run.path / name) for name in tests},
        "test": {name: {key: test[key] for key in ("accuracy", "loss")} for name, test in tests.items()},
        "options": made_with,
    }
    write_json(run.model_card, card, indent=1)


def read(run: RunFolder, model: Path) -> dict[str, Any]:
    """Read the model.json next to a model.

    Raises:
        UserError: the model is missing, or the file does not describe it.
    """
    card = schema.read_json(run.model_card)
    if card.get("version") != VERSION or not card.keys() >= {"run", "classes", "images", "sha256", "options"}:
        raise UserError(f"{run.model_card} is not a model.json of version {VERSION}: copy it from the run again")
    if not model.is_file():
        raise UserError(f"{model} does not exist: copy it from the run, next to {run.model_card.name}")
    if card["sha256"].get(model.name) != _sha256(model):
        raise UserError(f"{model} is not the model that {run.model_card.name} describes: copy both from one run")
    return card


def options_of(card: dict[str, Any]) -> Options:
    """The options that the models were made with."""
    return Options.of({**card["options"], "classes": card["classes"]})


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
