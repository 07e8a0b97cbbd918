"""What users get, before and after a change: rendered values and the list of files, as committed in tests/snapshots/.

`make snapshots` writes them anew. A reviewer reads their difference.
"""

import difflib
import os

import pytest

from template import PROJECT, TEMPLATE, BakedProject

SETS = {
    "default": {},
    "digits-on-gpus": {
        "project_name": "O'Brien's \"Eyes\" 👁",
        "dataset": "digits",
        "num_clients": "1",
        "use_gpu": True,
    },
    "own-images": {"project_slug": "wards", "dataset": "image_folder", "num_clients": "5", "rounds": "20"},
}


def snapshot(project: BakedProject) -> str:
    """The list of all files, and after it the text of those in which an answer stands."""
    parts = ["==== all files", *project.files(), ""]
    for name in project.files():
        if project.read(name) != (PROJECT / name).read_text(encoding="utf-8"):
            parts += [f"==== {name}", project.read(name)]
    return "\n".join(parts)


@pytest.mark.parametrize("name", SETS)
def test_what_is_rendered_is_what_was_committed(bake, name):
    path = TEMPLATE / "tests" / "snapshots" / f"{name}.txt"
    now = snapshot(bake(**SETS[name]))
    if os.environ.get("SNAPSHOTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(now, encoding="utf-8")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(before.splitlines(), now.splitlines(), f"committed {path.name}", "now", lineterm="")
    if difference := "\n".join(lines):
        pytest.fail(f"{difference}\n\nIs this what users shall get? Then: make snapshots", pytrace=False)


def test_no_snapshot_is_left_over():
    folder = TEMPLATE / "tests" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.txt" for name in SETS)
