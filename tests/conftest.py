"""Shared fixtures: render the template in-process, offline, into temporary folders."""

import runpy
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from template import PROJECT, TEMPLATE, BakedProject, checked, files_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job ignore Ctrl-C otherwise

# The same examples on every run. How long one takes depends on the machine, so no deadline.
settings.register_profile("template", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("template")


@pytest.fixture(scope="session")
def template_without_hooks(tmp_path_factory) -> Path:
    """A copy of the template without hooks: faster, and `setup=full` does nothing."""
    copy = tmp_path_factory.mktemp("template")
    shutil.copy(TEMPLATE / "cookiecutter.json", copy)
    for name in files_of(PROJECT):
        (copy / PROJECT.name / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, copy / PROJECT.name / name)
    return copy


@pytest.fixture(scope="session")
def bake(cookies_session, template_without_hooks):
    """Render a project, without hooks by default: `bake(dataset="digits")`."""

    def bake(hooks: bool = False, **answers) -> BakedProject:
        template = TEMPLATE if hooks else template_without_hooks
        result = cookies_session.bake(extra_context=checked(answers), template=str(template))
        if result.exception:
            raise result.exception
        return BakedProject(result.project_path)

    return bake


@pytest.fixture(scope="session")
def faults():
    """The function of hooks/pre_gen_project.py that validates answers."""
    return runpy.run_path(str(TEMPLATE / "hooks" / "pre_gen_project.py"))["faults"]
