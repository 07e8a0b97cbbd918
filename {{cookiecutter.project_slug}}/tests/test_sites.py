"""POC and real sites, as far as one machine shows them: refused flags, an export, the health check, a whole POC."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml

PROD = ["--env", "prod", "--dataset", "digits"]
BAD_FLAGS = {
    "a kit without sites": (["--startup_kit", "."], "--startup_kit is for real sites: add --env prod"),
    "no kit": (PROD, "--startup_kit DIR is missing"),
    "a kit that is none": ([*PROD, "--startup_kit", "."], "startup/fed_admin.json is not there"),
    "images dealt to real sites": ([*PROD, "--partition", "iid"], "real sites have their own: use none"),
    "the sites' images here": ([*PROD, "--data_root", "."], "each site sets its own FL_DATA_ROOT"),
    "a check of real sites": ([*PROD, "--check"], "leave --env prod out"),
    "no classes": (["--env", "prod", "--dataset", "image_folder"], "--classes FILE is missing"),
    "classes that are not there": ([*PROD, "--classes", "/nowhere"], "there is no file /nowhere"),
    "an export over something": ([*PROD, "--export", "."], "exists: choose another folder"),
    "a site twice": ([*PROD, "--sites", "a,b,a"], "--sites names a twice"),
    "spaces among sites": ([*PROD, "--sites", "a, b"], "--sites has a name ' b'"),
}


@pytest.mark.parametrize("fault", BAD_FLAGS)
def test_a_wrong_flag_is_refused_in_one_line(project, fault):
    flags, message = BAD_FLAGS[fault]
    run = project.run("job.py", *flags)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"job.py: .*\n", run.stderr)
    assert message in run.stderr
    assert not (project.folder / "runs").exists()


def test_an_export_is_the_whole_job_without_an_image(project, tmp_path):
    """It goes to the sites of deploy/project.yml, and goes on as long as more than half of them are there."""
    (tmp_path / "classes.txt").write_text("cat\n\ndog \n")
    flags = ["--dataset", "image_folder", "--classes", str(tmp_path / "classes.txt"), "--export", str(tmp_path / "job")]
    run = project.run("job.py", "--env", "prod", *flags)
    assert run.returncode == 0, run.stderr
    meta = json.loads((tmp_path / "job" / "meta.json").read_text())
    provision = yaml.safe_load((project.folder / "deploy" / "project.yml").read_text())
    sites = [member["name"] for member in provision["participants"] if member["type"] == "client"]
    assert meta["deploy_map"] == {"app": ["server", *sites]}
    assert meta["min_clients"] == len(sites) // 2 + 1
    custom = tmp_path / "job" / "app" / "custom"
    assert (custom / "classes.txt").read_text() == "cat\ndog\n"
    assert "--partition none" in (tmp_path / "job" / "app" / "config" / "config_fed_client.json").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc, for containers")
def test_the_health_check_tells_a_server_that_listens_and_a_site_that_is_connected(project, tmp_path):
    for name in ("server", "client"):
        (tmp_path / name / "startup").mkdir(parents=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        for name in ("server", "client"):
            config = {"servers": [{"service": {"target": f"localhost:{port}"}}]}
            (tmp_path / name / "startup" / f"fed_{name}.json").write_text(json.dumps(config))

        def health(name):
            run = project.run("deploy/healthy.py", str(tmp_path / name))
            return run.returncode, run.stdout

        assert health("server") == (1, f"nothing listens at port {port}\n")
        server.listen()
        assert health("server") == (0, "")
        assert health("client") == (1, f"not connected to localhost:{port}\n")
        with socket.create_connection(("127.0.0.1", port)):
            assert health("client") == (0, "")


@pytest.mark.slow
def test_a_poc_gives_the_same_model_as_the_simulator_and_leaves_a_foreign_one_alone(project):
    """Another POC is likely to hold port 8002, and has its files in /tmp/nvflare."""
    flags = ("--dataset", "digits", "--n_clients", "2", "--num_rounds", "2")
    foreign = socket.socket()
    foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with foreign:
        try:
            foreign.bind(("127.0.0.1", 8002))
            foreign.listen()
        except OSError:
            pass  # there is a foreign one already
        before = Path("/tmp/nvflare").exists()
        run = project.run("job.py", *flags, "--env", "poc", "--name", "poc")
        assert run.returncode == 0, run.stderr
        assert Path("/tmp/nvflare").exists() == before
    assert project.processes() == []
    assert project.run("job.py", *flags, "--name", "sim").returncode == 0
    poc, sim = (torch.load(project.folder / "runs" / name / "final.pt", weights_only=True) for name in ("poc", "sim"))
    assert poc.keys() == sim.keys()
    assert all(torch.equal(poc[name], sim[name]) for name in sim)
    results = [json.loads((project.folder / "runs" / name / "results.json").read_text()) for name in ("poc", "sim")]
    assert results[0]["rounds"] == results[1]["rounds"]
    assert results[0]["test"] == results[1]["test"]
