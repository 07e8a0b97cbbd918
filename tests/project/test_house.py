"""Rules that keep the project easy to change: imports, options in one line, a short client.py."""

import ast
import json
import re
from pathlib import Path

import pytest

from programs import PROJECT, Project

SHARED = {"protocol", "exchange", "sums", "errors"}  # files of federation/ that travel along with site/ and server/


def imports(path) -> set[str]:
    """The modules of federation/ that a file imports, without `federation.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("federation.") for name in found if name.startswith("federation")}


@pytest.mark.parametrize("room", ["site", "server"])
def test_code_that_travels_imports_only_code_that_travels(room):
    for path in (PROJECT / "federation" / room).glob("*.py"):
        for name in imports(path):
            assert name in SHARED or (name.startswith(f"{room}.") and name.count(".") == 1), f"{path.name}: {name}"


def test_code_that_travels_is_not_imported_for_a_constant():
    for path in [*PROJECT.glob("*.py"), *(PROJECT / "federation").rglob("*.py")]:
        if path.parent.name in ("site", "server"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(r"federation\.(site|server)\.", node.module or ""):
                constants = [alias.name for alias in node.names if alias.name.isupper() and alias.name != "SOURCES"]
                assert constants in ([], ["DEAD_CLIENT_TIMING"]), f"{path.name}: {constants}"


def test_no_folder_is_a_package_because_nvflare_would_not_send_it():
    assert not list(PROJECT.glob("federation/**/__init__.py"))


def test_no_module_writes_environment_variables():
    writes = re.compile(r"os\.environ(\[[^]]+\] *=[^=]|\.(setdefault|update|pop|clear)\()|os\.putenv")
    found = {path.name for path in PROJECT.rglob("*.py") if writes.search(path.read_text(encoding="utf-8"))}
    allowed = {"simulator.py"}  # at the start of a process, to be what its parent asked for
    assert {name for name in found if not name.startswith("test_")} <= allowed


def test_client_py_is_short_and_parses_no_flags():
    text = (PROJECT / "client.py").read_text(encoding="utf-8")
    code = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert ast.unparse(code["main"]).count("\n") < 25
    assert "argparse" not in text and "argv" not in text
    assert all(f"# ({number})" in text for number in (1, 2, 3, 4))


OPTION = '    weight_decay: float = training(0.0, "of the sites\' optimizer", least=0.0, resume=INHERITED)\n'


@pytest.fixture(scope="module")
def with_option(tmp_path_factory, shared_cache) -> Project:
    """A project to which an option was added: one line in settings.py, one use in model.py."""
    project = Project(tmp_path_factory.mktemp("option") / "project")
    line = next(line for line in (PROJECT / "settings.py").read_text().splitlines(True) if "learning_rate: " in line)
    project.replace("settings.py", line, line + OPTION)
    project.replace(
        "model.py",
        "lr=self.options.learning_rate, momentum=MOMENTUM, fused",
        "lr=self.options.learning_rate, weight_decay=self.options.weight_decay, momentum=MOMENTUM, fused",
    )
    return project


class TestAnOptionOfOneLine:
    def test_is_a_flag_with_help_default_and_bounds(self, with_option):
        said = with_option.run("job.py", "--help").stdout
        training = said[said.index("Training:") : said.index("Algorithm:")]
        assert re.search(r"--weight_decay X +of the sites' optimizer +\[default: 0\.0; +x>=0\.0\]", training)
        refused = with_option.run("job.py", "--weight_decay", "-1")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "'--weight_decay': -1.0 is not in the range x>=0.0" in refused.stderr

    @pytest.mark.slow
    def test_reaches_the_sites_the_result_the_report_and_the_baselines(self, with_option):
        results, baselines = {}, {}
        for name, flags in {"without": [], "with": ["--weight_decay", "0.5"]}.items():
            run = with_option.run("job.py", "--dataset", "digits", "--num_rounds", "1", "--name", name, *flags)
            assert run.returncode == 0, run.stderr
            folder = with_option.folder / "runs" / name
            results[name] = json.loads((folder / "results.json").read_text())
            compared = with_option.run("compare.py", name)
            assert compared.returncode == 0, compared.stderr
            baselines[name] = json.loads((folder / "compare.json").read_text())["rows"]["centralized"]
        assert [result["weight_decay"] for result in results.values()] == [0.0, 0.5]
        assert results["with"]["stages"] == [{**results["without"]["stages"][0], "weight_decay": 0.5}]
        assert results["with"]["sha256"] != results["without"]["sha256"]
        assert baselines["with"] != baselines["without"]
        page = with_option.run("results.py", "with", "--html").stdout.strip()
        assert "weight_decay" in (with_option.folder / page).read_text(encoding="utf-8")
        side_by_side = with_option.run("results.py", "with", "without").stdout
        assert re.search(r"weight_decay +0\.5 +0\.0", side_by_side)

    def test_leaves_an_older_run_readable(self, with_option):
        folder = with_option.folder / "runs" / "older"
        folder.mkdir(parents=True)
        older = Path(__file__).with_name("results_version_0.json").read_text(encoding="utf-8")
        (folder / "results.json").write_text(older, encoding="utf-8")
        (folder / "partition.json").write_text('{"counts": {}}', encoding="utf-8")
        shown = with_option.run("results.py", "older")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "Final test accuracy 0.195" in shown.stdout


def result_of(project, name):
    return json.loads((project.folder / "runs" / name / "results.json").read_text())


@pytest.mark.slow
def test_rewording_what_client_py_prints_changes_nothing_but_the_log(project):
    run = ("job.py", "--dataset", "digits", "--num_rounds", "1")
    before = project.run(*run, "--name", "before")
    text = (project.folder / "client.py").read_text(encoding="utf-8")
    (project.folder / "client.py").write_text(re.sub(r'print\(.*"\)', 'print("x")', text), encoding="utf-8")
    after = project.run(*run, "--name", "after")
    assert (before.returncode, after.returncode) == (0, 0), after.stderr
    results = [result_of(project, name) for name in ("before", "after")]
    assert results[0]["sha256"] == results[1]["sha256"]
    assert set(results[0]["timing"]) == set(results[1]["timing"]) == {"site-1", "site-2"}
    for timing in results[1]["timing"].values():
        assert timing["computing"] > 0 and timing["evaluating"] > 0
    assert "round 1 of 1 done in" in after.stdout


@pytest.mark.slow
def test_client_py_runs_unchanged_under_nvflares_own_executor(project):
    run = ("job.py", "--dataset", "digits")
    ours = project.run(*run, "--name", "ours")
    project.replace("federation/launch/recipes.py", "    _app(recipe, ALL_SITES).executors = []\n", "")
    project.replace("federation/launch/recipes.py", "    recipe._job.to_clients(SiteHost(", "    print(SiteHost(")
    project.replace("federation/launch/recipes.py", '), tasks=["*"])', "))")
    theirs = project.run(*run, "--name", "theirs")
    assert (ours.returncode, theirs.returncode) == (0, 0), theirs.stderr
    told = (project.folder / "runs" / "theirs" / "job" / "app" / "config" / "config_fed_client.json").read_text()
    assert "client_api_executor" in told and "SiteHost" not in told
    assert result_of(project, "ours")["sha256"] == result_of(project, "theirs")["sha256"]
