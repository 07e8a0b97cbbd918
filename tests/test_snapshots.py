"""Snapshots of what is rendered, in tests/snapshots/, so that a reviewer sees what a change does for users.

`make snapshots` updates them.
"""

import difflib
import os
from typing import Any

import pytest

from template import PROJECT, TEMPLATE, BakedProject

SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "digits-on-gpus": {
        "project_name": "O'Brien's \"Eyes\" 👁",
        "dataset": "digits",
        "num_clients": "1",
        "use_gpu": True,
    },
    "own-images": {"project_slug": "wards", "dataset": "image_folder", "num_clients": "5", "rounds": "20"},
}


def snapshot(project: BakedProject, default: BakedProject | None) -> str:
    """The list of files and the text of those that depend on the answers; for other answers, a diff to the default."""
    rendered = [name for name in project.files() if project.read(name) != (PROJECT / name).read_text(encoding="utf-8")]
    if default is None:
        texts = [f"==== {name}\n{project.read(name)}" for name in rendered]
        return "\n".join(["==== all files", *project.files(), "", *texts])
    return "\n".join(line for name in rendered for line in difference(default.read(name), project.read(name), name))


def difference(before: str, after: str, name: str) -> list[str]:
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, lineterm="", n=0))


@pytest.mark.parametrize("name", SETS)
def test_the_rendered_files_match_the_snapshot(bake, name):
    path = TEMPLATE / "tests" / "snapshots" / f"{name}.txt"
    now = snapshot(bake(**SETS[name]), None if name == "default" else bake())
    if os.environ.get("SNAPSHOTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(now, encoding="utf-8")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before != now:
        lines = "\n".join(difference(before, now, path.name))
        pytest.fail(f"{lines}\n\nIf this is intended: make snapshots", pytrace=False)


def test_every_snapshot_belongs_to_a_set_of_answers():
    folder = TEMPLATE / "tests" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.txt" for name in SETS)
