"""What users get, before and after a change: the list of files and what is rendered, as committed in tests/snapshots/.

`make snapshots` rewrites them. A reviewer reads the diff.
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
    """What is rendered: all of it for the default answers, and for others what differs from that.

    Of files that are copied as they are, only the names: their text is in the repository already.
    """
    rendered = [name for name in project.files() if project.read(name) != (PROJECT / name).read_text(encoding="utf-8")]
    if default is None:
        texts = [f"==== {name}\n{project.read(name)}" for name in rendered]
        return "\n".join(["==== all files", *project.files(), "", *texts])
    return "\n".join(line for name in rendered for line in difference(default.read(name), project.read(name), name))


def difference(before: str, after: str, name: str) -> list[str]:
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, lineterm="", n=0))


@pytest.mark.parametrize("name", SETS)
def test_what_is_rendered_is_what_was_committed(bake, name):
    path = TEMPLATE / "tests" / "snapshots" / f"{name}.txt"
    now = snapshot(bake(**SETS[name]), None if name == "default" else bake())
    if os.environ.get("SNAPSHOTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(now, encoding="utf-8")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before != now:
        lines = "\n".join(difference(before, now, path.name))
        pytest.fail(f"{lines}\n\nIs this what users shall get? Then: make snapshots", pytrace=False)


def test_no_snapshot_is_left_over():
    folder = TEMPLATE / "tests" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.txt" for name in SETS)
