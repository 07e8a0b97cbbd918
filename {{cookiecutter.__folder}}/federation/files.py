"""Write files whole: whoever reads one finds the old content or the new, never a part. JSON is strict, without NaN."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON; a number that is not finite becomes null.

    Raises:
        OSError: it cannot be written. What was there before is still there.
    """
    text = json.dumps(finite(value), indent=indent, allow_nan=False)
    _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Append a value as one line of JSON; a number that is not finite becomes null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The values of all lines that are complete; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write a state dict with `torch.save`.

    Raises:
        OSError: it cannot be written. What was there before is still there.
    """
    import torch

    _replace(path, lambda unfinished: torch.save(tensors, unfinished))


def finite(value: Any) -> Any:
    """The same value with None in place of each float that is NaN or infinite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, write: Any) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
