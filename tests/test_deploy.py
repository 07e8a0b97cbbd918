"""What the project ships for real sites: the federation's definition, rights, hardened containers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.mark.parametrize("num_clients", ["1", "3", "1000"])
def test_provisioning_lists_the_requested_number_of_sites(bake, num_clients):
    project = bake(project_slug="eyes_2", num_clients=num_clients)
    provision = yaml.safe_load(project.read("deploy/project.yml"))
    names = [member["name"] for member in provision["participants"] if member["type"] == "client"]
    assert names == [f"site-{number}" for number in range(1, int(num_clients) + 1)]
    assert provision["name"] == "eyes_2"
    assert provision["allow_log_streaming"] is False
    server = next(member for member in provision["participants"] if member["type"] == "server")
    assert provision["server"] == {"host": server["name"], "fed_learn_port": server["fed_learn_port"]}
    assert {member["role"] for member in provision["participants"] if member["type"] == "admin"} == {
        "project_admin",
        "lead",
        "member",
    }


def test_the_authorization_file_forbids_looking_into_a_site_and_nothing_else(bake, tmp_path):
    """All other rights stay NVFlare's default."""
    from nvflare.apis.fl_constant import AdminCommandNames
    from nvflare.fuel.sec.authz import AuthzContext, Person
    from nvflare.security.security import COMMAND_CATEGORIES, CommandCategory, FLAuthorizer

    project = bake()
    nvflare = [Path(sys.executable).with_name("nvflare"), "provision", "-p", "deploy/project.yml", "-w", tmp_path]
    subprocess.run(nvflare, cwd=project.path, check=True, capture_output=True)
    [default] = tmp_path.glob("*/prod_00/site-1/local/authorization.json.default")
    default = json.loads(default.read_text(encoding="utf-8"))
    roles, rights = default["permissions"], {*COMMAND_CATEGORIES, *default["permissions"]["lead"]}
    shell = {command for command, category in COMMAND_CATEGORIES.items() if category == CommandCategory.SHELL_COMMANDS}
    forbidden = {*shell, CommandCategory.SHELL_COMMANDS, AdminCommandNames.SHOW_ERRORS}
    people = [Person("ann", org, role) for role in roles for org in ("site_1", "coordinator")]
    asked = [(right, user, submitter) for right in rights for user in people for submitter in people]

    def allowed(policy: dict) -> list:
        site = FLAuthorizer("site_1", policy)
        return [
            (right, str(user), str(submitter))
            for right, user, submitter in asked
            if site.authorize(AuthzContext(right, user, submitter))[0]
        ]

    by_default = allowed(default)
    assert ("cat", "ann:coordinator:project_admin") in {entry[:2] for entry in by_default}  # the file has a purpose
    assert allowed(json.loads(project.read("deploy/authorization.json"))) == [
        entry for entry in by_default if entry[0] not in forbidden
    ]


def test_the_compose_file_follows_its_schema(bake):
    file = bake().path / "deploy" / "compose.yml"
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_containers_are_hardened(bake):
    services = yaml.safe_load(bake().read("deploy/compose.yml"))["services"]
    assert set(services) == {"server", "site", "site-gpu"}
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["user"] == "10001:10001"
        assert "/usr/local/bin/healthy.py" in service["healthcheck"]["test"]
        mounted = [volume for volume in service["volumes"] if volume.startswith("$")]
        assert all(volume.endswith(":ro") for volume in mounted), name
        assert ("ports" in service) == (name == "server")


def test_the_image_is_pinned_and_does_not_run_as_root(bake):
    lines = bake().read("deploy/Dockerfile").splitlines()
    assert any(re.fullmatch(r"ARG PYTHON_IMAGE=python:3\.12-slim@sha256:[0-9a-f]{64}", line) for line in lines)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert not any(line.startswith("ENTRYPOINT") for line in lines)  # a launcher's command would be its arguments
