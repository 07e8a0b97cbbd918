"""For any answers, the rendered project is complete and valid, and only a few files depend on the answers."""

import itertools
import re

import pytest
from cookiecutter.generate import is_copy_only_path

from template import ANSWERS, PROJECT, QUESTIONS, TEMPLATE, files_of, is_rendered

CHOICES = {
    question: [False, True] if isinstance(default, bool) else default
    for question, default in QUESTIONS.items()
    if isinstance(default, (bool, list))
}
COMBINATIONS = [dict(zip(CHOICES, answers, strict=True)) for answers in itertools.product(*CHOICES.values())]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda answers: "-".join(map(str, answers.values())))
def project(request, bake):
    """One project for every combination of choices."""
    return bake(**request.param)


def test_the_list_of_files_does_not_depend_on_the_answers(project, bake):
    """tests/snapshots/default.txt lists them."""
    assert project.files() == bake().files()


def test_every_file_is_valid_in_its_language(project):
    for name in project.files():
        project.parse(name)


def test_ruff_finds_nothing(project):
    assert project.ruff("check") == ""
    assert project.ruff("format", "--check") == ""


@pytest.mark.slow
def test_mypy_finds_nothing(bake):
    assert bake().mypy() == ""


def test_no_template_syntax_is_left(project):
    for name in project.files():
        tokens = r"\{\{|\{%|\{#|cookiecutter" if is_rendered(name) else "cookiecutter"
        assert not re.search(tokens, project.read(name)), name


def test_the_answers_are_in_settings(bake):
    project = bake(project_name="Our eyes", dataset="digits", num_clients="5", rounds="7", use_gpu=True)
    settings = project.settings()
    assert project.path.name == "fl-our-eyes"
    assert settings["PROJECT_NAME"] == "Our eyes"
    assert settings["dataset"] == "digits"
    assert (settings["n_clients"], settings["num_rounds"], settings["gpu"]) == (5, 7, True)


def test_the_slug_names_the_folder_and_the_package(bake):
    project = bake(project_slug="eyes_2")
    assert project.path.name == "eyes_2"
    assert 'name = "eyes_2"' in project.read("pyproject.toml")


def test_only_settings_readme_pyproject_and_deploy_depend_on_the_answers(bake):
    one = bake()
    other = bake(
        project_name="Another",
        project_slug="another",
        dataset="image_folder",
        num_clients="3",
        rounds="4",
        use_gpu=True,
        setup="full",
    )
    assert one.files() == other.files()
    for name in one.files():
        same = (one.path / name).read_bytes() == (other.path / name).read_bytes()
        assert same or is_rendered(name), name


def test_all_other_files_are_copied_byte_for_byte(bake):
    project = bake()
    for name in files_of(PROJECT):
        assert is_copy_only_path(name, {"cookiecutter": ANSWERS}) != is_rendered(name), name
        if not is_rendered(name):
            assert (project.path / name).read_bytes() == (PROJECT / name).read_bytes(), name


def test_a_script_stays_executable(bake):
    assert (bake().path / "prepare_data.sh").stat().st_mode & 0o111


def test_the_template_renders_nothing_but_the_project():
    assert [path.name for path in TEMPLATE.iterdir() if "{{" in path.name] == [PROJECT.name]
