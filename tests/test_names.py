"""A project may have any printable name. It is text in every file, never code."""

import json
import os
import subprocess
import sys

import pytest
from cookiecutter.generate import generate_context
from cookiecutter.prompt import prompt_for_config
from hypothesis import example, given
from hypothesis import settings as examine
from hypothesis import strategies as st

from template import TEMPLATE, BakedProject, as_typed, is_rendered

NAMES = [
    "O'Brien's \"Eye\" Clinic",
    '"""',
    "'''",
    "C:\\new\\",
    "{{ 7 * 7 }} {% raw %} {# no #} {{ cookiecutter.nothing }}",
    "$(touch x) `touch x`; touch x # && touch x",
    "%(prog)d 100 % %s {0} {site}",
    "<script>alert(1)</script>",
    "🏥 👨‍👩‍👧",
    "联邦学习",
    "מרפאה \u202e",
    "  3 hospitals  ",
    "- _ -",
    "a long name " * 25,
    "x" * 300,
    "FL",
    "torch",
    "PyTorch Lightning",
    "json",
]
ONE_LINE = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
ANY_NAME = st.text(ONE_LINE, min_size=1, max_size=300).filter(str.strip)
NASTY = "\"'\\`$(){}%#&;|<>:@!~*?[]/.,- \u00a0\ufeffab0é中🏥"
NASTY_NAME = st.text(st.sampled_from(NASTY), min_size=1).filter(str.strip)


def examples(test):
    """Try all of NAMES in addition to what hypothesis finds."""
    for name in NAMES:
        test = example(name)(test)
    return test


@given(name=ANY_NAME | NASTY_NAME)
@examples
@examine(max_examples=200)
def test_the_slug_derived_from_any_name_is_valid(faults, name):
    context = generate_context(str(TEMPLATE / "cookiecutter.json"), extra_context={"project_name": as_typed(name)})
    answers = prompt_for_config(context, no_input=True)
    assert answers["project_name"] == name
    assert faults(answers) == []


@given(name=ANY_NAME | NASTY_NAME)
@examples
@examine(max_examples=60)
def test_any_name_renders_valid_files_and_is_the_name_in_settings(bake, name):
    project = bake(project_name=as_typed(name))
    assert project.settings()["PROJECT_NAME"] == name
    for file in filter(is_rendered, project.files()):
        project.parse(file)


@pytest.mark.parametrize("name", NAMES)
def test_ruff_passes_whatever_the_name(bake, name):
    project = bake(project_name=as_typed(name))
    assert project.ruff("check", "settings.py") == ""
    assert project.ruff("format", "--check", "settings.py") == ""


@pytest.mark.parametrize("name", ["plain", "%(prog)d 100 %", "{{ 7 * 7 }}"])
def test_help_works_whatever_the_projects_name(bake, name):
    project = bake(project_name=as_typed(name))
    help_ = subprocess.run([sys.executable, "job.py", "--help"], cwd=project.path, capture_output=True, text=True)
    assert (help_.returncode, help_.stderr) == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        "$(touch {trap})",
        "`touch {trap}`",
        "'; touch {trap} #",
        '"; touch {trap} #',
        "'''; open('{trap}', 'w') #",
        '"""; open("{trap}", "w") #',
        "' + str(open('{trap}', 'w')) + '",
        "{{{{ cycler.__init__.__globals__.os.system('touch {trap}') }}}}",
    ],
)
def test_a_name_is_never_executed(bake, tmp_path, name):
    trap = tmp_path / "trap"
    name = name.format(trap=trap)
    project = bake(hooks=True, project_name=as_typed(name))
    subprocess.run([sys.executable, "settings.py"], cwd=project.path, check=True)
    assert project.settings()["PROJECT_NAME"] == name
    assert not trap.exists()


def test_what_is_typed_at_the_prompt_arrives_as_typed(tmp_path):
    name = '{{ 7 * 7 }} $(touch x) "quoted" C:\\new 🏥'
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"replay_dir": str(tmp_path / "replay"), "cookiecutters_dir": str(tmp_path)}))
    answers = [name, "", "4", "3", "", "y", "2"]  # name, default slug, digits, 3 sites, default rounds, GPU, skip
    command = [sys.executable, "-m", "cookiecutter", TEMPLATE, "--output-dir", tmp_path / "out"]
    subprocess.run(
        [*command, "--config-file", config],
        input="\n".join(answers) + "\n",
        env={**os.environ, "PYTHONUTF8": "1"},
        encoding="utf-8",
        check=True,
        capture_output=True,
    )
    [path] = (tmp_path / "out").iterdir()
    settings = BakedProject(path).settings()
    assert path.name == "fl-7-7-touch-x-quoted-c-new"
    assert settings["PROJECT_NAME"] == name
    assert settings["dataset"] == "digits"
    assert (settings["n_clients"], settings["num_rounds"], settings["gpu"]) == (3, 2, True)
