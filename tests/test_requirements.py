"""The project's requirements: what each is for, and that they are what the code imports."""

import ast
import importlib.metadata
import re
import sys

import pytest

from template import PROJECT, TEMPLATE

FILES = [
    *(PROJECT / name for name in ("requirements.txt", "requirements-dev.txt")),
    TEMPLATE / "requirements-dev.txt",
    TEMPLATE / "benchmarks" / "requirements.txt",
]
NOT_IMPORTED = {"lightning", "tensorboard"}  # brings pytorch-lightning along; imported by PyTorch


def requirements(file) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if re.match(r"\w", line)]


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.relative_to(TEMPLATE).as_posix())
def test_every_requirement_says_what_it_is_for(file):
    assert [line for line in requirements(file) if not re.search(r"  # \S", line)] == []


def test_the_requirements_are_the_packages_that_the_project_imports():
    modules = set()
    own = {path.stem for path in PROJECT.glob("*.py")} | {"federation", "deploy"}
    for path in [*PROJECT.glob("*.py"), *(PROJECT / "federation").rglob("*.py"), *(PROJECT / "deploy").rglob("*.py")]:
        if path.name == "settings.py":
            continue  # a template of Jinja's, which imports the standard library only
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    distributions = importlib.metadata.packages_distributions()
    optional = {"mlflow", "wandb", "onnxruntime", "opacus", "pydicom"}  # README.md says when to install them
    optional |= {"packaging", "lightning_utilities", "lightning_fabric", "cryptography"}  # what others depend on
    imported = {normalized(distributions[name][0]) for name in modules - own - optional - set(sys.stdlib_module_names)}
    required = {normalized(re.split("[><=;]", line)[0].strip()) for line in requirements(FILES[0])}
    assert required - NOT_IMPORTED == imported
