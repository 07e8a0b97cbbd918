"""Fixtures of all tests: rendering the template in-process, offline, into temporary folders."""

import runpy
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from template import PROJECT, TEMPLATE, BakedProject, checked, files_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # else what a background job starts ignores Ctrl-C

# The same examples on every machine and day; how long one takes depends on the machine and is no fault.
settings.register_profile("template", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("template")


@pytest.fixture(scope="session")
def template_without_hooks(tmp_path_factory) -> Path:
    """The template as `--accept-hooks no` uses it: quick, and safe with `setup=full`."""
    copy = tmp_path_factory.mktemp("template")
    shutil.copy(TEMPLATE / "cookiecutter.json", copy)
    for name in files_of(PROJECT):
        (copy / PROJECT.name / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, copy / PROJECT.name / name)
    return copy


@pytest.fixture(scope="session")
def bake(cookies_session, template_without_hooks):
    """Render a project: `bake(dataset="digits")`. Without its hooks unless `hooks=True`."""

    def bake(hooks: bool = False, **answers) -> BakedProject:
        template = TEMPLATE if hooks else template_without_hooks
        result = cookies_session.bake(extra_context=checked(answers), template=str(template))
        if result.exception:
            raise result.exception
        return BakedProject(result.project_path)

    return bake


@pytest.fixture(scope="session")
def faults():
    """The rules of hooks/pre_gen_project.py: a function that returns what is wrong with some answers."""
    return runpy.run_path(str(TEMPLATE / "hooks" / "pre_gen_project.py"))["faults"]
