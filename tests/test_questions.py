"""The questions, and the answers that are rejected before anything is written."""

import ast
import re
import sys

import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.generate import generate_context
from cookiecutter.prompt import prompt_for_config
from rich.console import Console

from template import ANSWERS, QUESTIONS, TEMPLATE, checked

HOOKS = sorted((TEMPLATE / "hooks").glob("*.py"))
GOOD = {"project_name": "Eyes", "project_slug": "eyes", "num_clients": "2", "rounds": "2"}


@pytest.fixture
def refusal(cookies, tmp_path, capfd):
    """Give answers that must be rejected; return the lines that the user sees."""

    def refusal(**answers) -> list[str]:
        result = cookies.bake(extra_context=checked(answers), template=str(TEMPLATE))
        assert isinstance(result.exception, FailedHookException)
        assert "exit status: 1" in str(result.exception)
        assert [path.name for path in tmp_path.rglob("*")] == ["cookies", "bake00"], "something is left on disk"
        return capfd.readouterr().err.splitlines()

    return refusal


def test_these_are_all_the_questions():
    assert list(QUESTIONS) == [
        "project_name",
        "project_slug",
        "dataset",
        "num_clients",
        "rounds",
        "use_gpu",
        "setup",
    ]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_a_sentence_and_each_of_its_choices_has_a_label(question):
    prompt, default = ANSWERS["__prompts__"][question], QUESTIONS[question]
    if isinstance(default, list):
        assert list(prompt) == ["__prompt__", *default]
        assert all(" " in text for text in prompt.values())
    else:
        assert " " in prompt


def test_the_prompts_fit_80_columns(monkeypatch, capsys):
    """With the choices' numbers and the defaults, as cookiecutter prints them."""
    monkeypatch.setattr("rich._console", Console(width=1000))
    monkeypatch.setattr("builtins.input", lambda: print() or "")  # Enter: take the default
    prompt_for_config(generate_context(str(TEMPLATE / "cookiecutter.json")))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len([line for line in lines if re.match(r" *\[\d/\d\]", line)]) == len(QUESTIONS)
    assert [line for line in lines if len(line) > 80] == []


def test_a_rejected_answer_fits_80_columns(faults):
    bad = {"project_name": "two\nlines", "project_slug": "Eyes", "num_clients": "1001", "rounds": "10001"}
    assert [line for line in faults(bad) if len(line) > 80] == []


def test_the_default_answers_are_accepted(bake):
    assert "settings.py" in bake(hooks=True).files()


@pytest.mark.parametrize(
    ("question", "answer", "allowed"),
    [
        ("project_name", "", "non-empty"),
        ("project_name", "   ", "non-empty"),
        ("project_name", "two\nlines", "control characters"),
        ("project_name", "bell\a", "control characters"),
        ("project_slug", "Eyes", "a-z, 0-9"),
        ("project_slug", "../eyes", "a-z, 0-9"),
        ("project_slug", "con/sole", "a-z, 0-9"),
        ("num_clients", "0", "from 1 to 1000"),
        ("rounds", "ten", "from 1 to 10000"),
    ],
)
def test_an_invalid_answer_is_rejected_in_one_line_that_says_what_is_allowed(refusal, question, answer, allowed):
    [line] = refusal(**{question: answer})
    assert line.startswith(f"{question} is {answer!r}")
    assert allowed in line


def test_all_invalid_answers_are_reported_at_once(refusal):
    lines = refusal(project_name="a\tb", project_slug="3eyes", num_clients="1001", rounds="-1")
    assert [line.split()[0] for line in lines] == ["project_name", "project_slug", "num_clients", "rounds"]


@pytest.mark.parametrize(
    "slug", ["", "1eye", "-eye", "_eye", "eye-", "eye_", "an eye", "eye.s", "éye", "eye\n", "a/b", "a" * 65]
)
def test_a_slug_is_rejected_for_its_characters_or_length(faults, slug):
    assert len(faults({**GOOD, "project_slug": slug})) == 1


@pytest.mark.parametrize("slug", ["a", "z9", "an-eye_2", "data", "a" * 64])
def test_a_valid_slug_is_accepted(faults, slug):
    assert faults({**GOOD, "project_slug": slug}) == []


@pytest.mark.parametrize(("question", "highest"), [("num_clients", 1000), ("rounds", 10000)])
def test_a_number_is_whole_and_within_its_bounds(faults, question, highest):
    for good in ("1", "2", str(highest)):
        assert faults({**GOOD, question: good}) == []
    for bad in ("", "0", "-1", "+1", "2.0", "1e2", "1_0", " 2", "two", "٣", str(highest + 1), "9" * 5000):
        assert len(faults({**GOOD, question: bad})) == 1, bad


@pytest.mark.parametrize("hook", HOOKS, ids=lambda path: path.stem)
def test_a_hook_uses_only_the_standard_library(hook):
    for node in ast.walk(ast.parse(hook.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("hook", HOOKS, ids=lambda path: path.stem)
def test_a_hook_takes_the_answers_as_json_and_has_no_other_template_code(hook):
    text = hook.read_text(encoding="utf-8")
    assert len(re.findall(r"json\.loads\(\{\{ ?cookiecutter \| tojson \| tojson ?\}\}\)", text)) == 1
    assert len(re.findall(r"\{\{|\{%|\{#", text)) == 1
