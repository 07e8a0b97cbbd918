"""A federation provisioned from deploy/project.yml, with server and sites as separate processes, and its failures."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from federation.server.cohort import draw
from programs import Project

pytestmark = pytest.mark.slow

CLASSES = ["benign", "malign"]
SITES = ["north", "east", "south"]  # real sites have their own names
SIZE = 32
N_IMAGES = 40

# On the server's Python path: writes every frame that it receives, after TLS decryption, to a file.
TAP = """
import os
from nvflare.fuel.f3.sfm import conn_manager
def tapped(self, sfm_conn, frame, real=conn_manager.ConnManager.process_frame_task):
    with open(os.environ["TAP"] + f".{os.getpid()}", "ab") as file:
        file.write(bytes(frame))
    return real(self, sfm_conn, frame)
conn_manager.ConnManager.process_frame_task = tapped
"""

# A relay between a site and the server. Stopped, it acts like a network that drops everything.
RELAY = """
import asyncio, sys
async def pass_on(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
async def connect(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("localhost", int(sys.argv[2]))
    await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer), return_exceptions=True)
async def main():
    await (await asyncio.start_server(connect, "localhost", int(sys.argv[1]))).serve_forever()
asyncio.run(main())
"""
OUTAGE_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_images(root: Path, classes: list[str], seed: int) -> Path:
    """Learnable classes: dark or bright, with noise."""
    random = np.random.RandomState(seed)
    for split, n_images in (("train", N_IMAGES), ("test", N_IMAGES // 4)):
        for number in range(n_images):
            label = number % len(classes)
            folder = root / split / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.randint(128 * label, 128 * label + 128, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"patient-{seed}-{number:03}.png")
    return root


class Federation:
    """Server and sites provisioned from deploy/project.yml, each in its own process."""

    def __init__(self, project: Project, folder: Path, name: str):
        self.project, self.folder = project, folder
        self.processes: dict[str, subprocess.Popen] = {}
        definition = yaml.safe_load((project.folder / "deploy" / "project.yml").read_text())
        definition["name"] = name
        members = definition["participants"]
        server = next(member for member in members if member["type"] == "server")
        server["name"], server["fed_learn_port"] = "localhost", free_port()
        self.port = server["fed_learn_port"]
        client = next(member for member in members if member["type"] == "client")
        others = [member for member in members if member["type"] != "client"]
        definition["participants"] = others + [{**client, "name": site} for site in SITES]
        folder.mkdir()
        (folder / "project.yml").write_text(yaml.safe_dump(definition))
        provision = [str(Path(sys.executable).with_name("nvflare")), "provision", "-p", "project.yml", "-w", "out"]
        subprocess.run(provision, cwd=folder, check=True, capture_output=True)
        self.kits = folder / "out" / name / "prod_00"
        resources = (self.kits / "localhost" / "local" / "resources.json.default").read_text()
        (self.kits / "localhost" / "local" / "resources.json").write_text(
            resources.replace("/tmp/nvflare", str(folder / "storage"))
        )

    def start(self, name: str, **environment: str) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(self.folder / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                ["bash", self.kits / name / "startup" / "sub_start.sh", "--once"],
                cwd=self.kits / name,
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self, name: str) -> None:
        """Kill the process and its descendants at once, like a power failure."""
        parent = psutil.Process(self.processes.pop(name).pid)
        process_tree = [*parent.children(recursive=True), parent]
        for process in process_tree:
            process.kill()
        psutil.wait_procs(process_tree, timeout=10)

    def stop(self) -> None:
        for name in list(self.processes):
            if self.processes[name].poll() is None:
                self.kill(name)

    def job(self, *flags: str, by: str = "lead@example.com", sites: list[str] = SITES) -> list[str]:
        (self.folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        return [
            *("job.py", "--env", "prod", "--startup_kit", str(self.kits / by), "--sites", ",".join(sites)),
            *("--dataset", "image_folder", "--classes", str(self.folder / "classes.txt"), "--num_rounds", "2", *flags),
        ]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("sites") / "project")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("images")
    return {site: write_images(root / site, CLASSES, seed) for seed, site in enumerate(SITES)}


@pytest.fixture(scope="module")
def federation(project, images, tmp_path_factory):
    """A running federation; only `east` shares its number of images per class."""
    folder = tmp_path_factory.mktemp("federation")
    (folder / "tap").mkdir()
    (folder / "tap" / "sitecustomize.py").write_text(TAP)
    federation = Federation(project, folder / "own", "ours")
    try:
        federation.start("localhost", PYTHONPATH=str(folder / "tap"), TAP=str(folder / "received"))
        for site in SITES:
            federation.start(site, FL_DATA_ROOT=str(images[site]), FL_SHARE_COUNTS="1" if site == "east" else "")
        yield federation
    finally:
        federation.stop()


@pytest.fixture(scope="module")
def finished(federation, project):
    """The result of a job that a lead submitted."""
    run = project.run(*federation.job("--name", "first", "--local_epochs", "20"))
    assert run.returncode == 0, run.stderr + run.stdout
    project.screen = run.stdout
    return json.loads((project.folder / "runs" / "first" / "results.json").read_text())


class TestAFederationOfSites:
    def test_trains_a_model_on_images_that_the_submitter_does_not_have(self, finished, project):
        assert finished["env"] == "prod"
        assert finished["lost"] == []
        untrained, *_, last = (entry["accuracy"] for entry in finished["rounds"])
        assert last > untrained
        assert set(finished["test"]["sites"]) == set(SITES)
        assert torch.load(project.folder / "runs" / "first" / "final.pt", weights_only=True)

    def test_shows_each_round_to_a_lead_of_the_servers_organization(self, finished, project):
        assert "round 1 of 2 done" in project.screen
        assert "may not read the server's log" not in project.screen

    def test_shows_images_per_class_only_of_a_site_that_opts_in(self, finished, project):
        held = json.loads((project.folder / "runs" / "first" / "partition.json").read_text())
        half = N_IMAGES // 2
        assert held["counts"] == {"north": {}, "east": {"benign": half, "malign": half}, "south": {}}
        assert held["sites"] == {}
        tested = json.loads((project.folder / "runs" / "first" / "test_counts.json").read_text())
        assert list(tested["sites"]) == ["east"] and tested["classes"] == ["benign", "malign"]
        assert sum(map(sum, tested["sites"]["east"]["test_confusion"])) == finished["test"]["sites"]["east"]["images"]

    def test_is_ready_at_each_site_according_to_its_doctor_and_its_status(self, finished, federation, images):
        (federation.folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        flags = ["--data_root", str(images["north"]), "--startup_kit", str(federation.kits / "north")]
        run = federation.project.run("deploy/doctor.py", *flags, "--classes", str(federation.folder / "classes.txt"))
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"^ok +server +localhost:\d+ is localhost and accepts this kit$", run.stdout, re.MULTILINE)
        run = federation.project.run("deploy/status.py", str(federation.kits / "north"))
        assert run.stdout.startswith("north: running, connected\n")
        assert "submitted by lead@example.com" in run.stdout and "ended; last active" in run.stdout
        assert "2 after training" in run.stdout and "after an evaluation" in run.stdout
        assert run.stdout.endswith("to do: nothing: this site is ready for jobs\n")

    def test_sends_no_image_label_or_file_name_to_the_server(self, finished, federation, images):
        received = b"".join(path.read_bytes() for path in federation.folder.parent.glob("received.*"))
        stored = [path for top in (federation.kits / "localhost", federation.folder / "storage") for path in files(top)]
        everything = received + b"".join(path.read_bytes() for path in stored)
        assert b"val_acc" in received and b"north" in received  # the tap works, and the text is readable
        assert finished["test"]["sites"]["north"]["images"] == N_IMAGES // 4
        for root in images.values():
            for path in files(root):
                pixels = np.asarray(Image.open(path))
                for form in (pixels, pixels.transpose(2, 0, 1)):
                    assert form[:2].tobytes() not in everything
                    assert (form[:2] / np.float32(127.5) - 1).astype(np.float32).tobytes()[:64] not in everything
                assert path.stem.encode() not in everything
            assert str(root).encode() not in everything
        labels = np.arange(N_IMAGES, dtype=np.int64) % 2
        for form in (np.sort(labels), labels):
            assert form.tobytes() not in everything


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestIsRejected:
    def test_a_submitter_without_the_right(self, finished, federation, project):
        run = project.run(*federation.job("--name", "member", by="member@example.com"))
        assert run.returncode == 1
        assert "member@example.com has no right to submit" in run.stderr

    def test_a_site_and_a_submitter_of_another_federation(self, finished, federation, project, images, tmp_path):
        other = Federation(project, tmp_path / "other", "theirs")
        for kit, name in (("north", "fed_client.json"), ("lead@example.com", "fed_admin.json")):
            config = other.kits / kit / "startup" / name
            config.write_text(config.read_text().replace(str(other.port), str(federation.port)))
        federation.kill("north")
        try:
            other.start("north")
            run = project.run(*federation.job("--name", "intruder", "--wait", "15"))
        finally:
            other.stop()
            federation.start("north", FL_DATA_ROOT=str(images["north"]))
        # The server may not have noticed the killed site yet, and the other two are a majority: the job runs.
        assert run.returncode == 0, run.stderr
        assert "WARNING: no final evaluation from north" in run.stdout
        result = json.loads((project.folder / "runs" / "intruder" / "results.json").read_text())
        assert result["lost"] == ["north"] and set(result["test"]["sites"]) == {"east", "south"}
        run = project.run(*other.job("--name", "stranger", "--wait", "1"))
        assert run.returncode == 1
        assert "no connection to the server within 1 s" in run.stderr


def test_a_seeded_cohort_of_the_connected_sites_trains_in_each_round(finished, federation, project):
    run = project.run(*federation.job("--name", "cohort", "--sites_per_round", "2", "--evaluate_sites", "1"))
    assert run.returncode == 0, run.stderr + run.stdout
    assert "each round trains 2 random sites of 3\nthe final model is evaluated by 1 random sites of 3\n" in run.stdout
    result = json.loads((project.folder / "runs" / "cohort" / "results.json").read_text())
    cohorts = [draw(SITES, 2, seed=0, round_=number) for number in (0, 1)]
    assert [sorted(entry["participants"]) for entry in result["rounds"][1:]] == [sorted(names) for names in cohorts]
    assert list(result["test"]["sites"]) == draw(SITES, 1, seed=0, round_=None)
    assert result["lost"] == []


def test_real_sites_can_run_simulated_ones_with_the_same_bits_as_one_machine(finished, federation, project):
    flags = ("--dataset", "digits", "--partition", "dirichlet", "--n_clients", "10", "--sites_per_round", "8")
    here = project.run("job.py", *flags, "--num_rounds", "2", "--name", "here")
    assert here.returncode == 0, here.stderr + here.stdout
    own = federation.job("--name", "spread", "--simulate", *flags)
    place = own.index("--classes")  # of the real sites' images
    run = project.run(*own[:place], *own[place + 2 :])
    assert run.returncode == 0, run.stderr + run.stdout
    assert "3 processes run the sites, one after the other" in run.stdout
    one, spread = (json.loads((project.folder / "runs" / n / "results.json").read_text()) for n in ("here", "spread"))
    assert spread["sha256"] == one["sha256"]
    assert spread["rounds"] == one["rounds"] and spread["test"] == one["test"]
    [job] = re.findall("submitted job ([-a-f0-9]+)", run.stdout)
    ledgers = federation.kits / "north" / "ledger"
    assert {path.name for path in (ledgers / f"simulated-{job}").iterdir()} == {
        f"site-{n}.jsonl" for n in (1, 4, 7, 10)
    }
    assert not list(ledgers.glob("site-*.jsonl"))  # nor could they be taken for a real site's


def test_a_site_that_does_not_connect_is_named_after_the_timeout(finished, federation, project):
    run = project.run(*federation.job("--name", "nobody", "--wait", "3", sites=["east", "west"]))
    assert run.returncode == 1
    assert "waiting up to 3 s for west" in run.stdout
    assert "west did not connect within 3 s" in run.stderr


@pytest.mark.parametrize("fault", ["missing", "other classes"])
def test_a_site_with_unusable_data_is_named_at_once(finished, federation, project, images, tmp_path, fault):
    root = write_images(tmp_path / "other", ["benign", "unclear"], 9) if fault == "other classes" else tmp_path / "none"
    federation.kill("south")
    federation.start("south", FL_DATA_ROOT=str(root))
    try:
        run = project.run(*federation.job("--name", fault.replace(" ", "-"), sites=["east", "south"]))
    finally:
        federation.kill("south")
        federation.start("south", FL_DATA_ROOT=str(images["south"]))
    assert run.returncode == 1
    assert re.search("south failed: see its own log|south: its task failed, and its own log says why", run.stderr)
    assert "unclear" not in run.stderr + run.stdout  # the reason stays in the site's own log


class TestInTheMiddleOfARound:
    def submit(self, federation, project) -> subprocess.Popen:
        """Submit a long job as project_admin; return it in its second round."""
        flags = ("--name", "long", "--local_epochs", "150", "--num_rounds", "3")
        process = project.start(*federation.job(*flags, by="admin@example.com"))
        process.seen = []
        for line in process.stdout:
            process.seen.append(line)
            if line.startswith("round 1 "):
                return process
        pytest.fail(process.communicate()[1])

    def test_a_site_that_is_killed_and_restarted_is_named_and_the_others_continue(
        self, finished, federation, images, tmp_path
    ):
        project = Project(tmp_path / "project")
        project.replace(
            "federation/server/heartbeat.py", "LOST_AFTER_S = 60.0", "LOST_AFTER_S = 8.0"
        )  # to keep the test short
        process = self.submit(federation, project)
        federation.kill("south")
        federation.start("south", FL_DATA_ROOT=str(images["south"]))
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert "south is lost: it does not answer" in out
        assert "WARNING: no final evaluation from south" in out
        result = json.loads((project.folder / "runs" / "long" / "results.json").read_text())
        assert result["lost"] == ["south"]
        assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2, 3]
        assert set(result["test"]["sites"]) == {"east", "north"}

    def test_a_site_survives_a_temporary_network_failure(self, finished, federation, images, tmp_path):
        project = Project(tmp_path / "project")
        config = federation.kits / "south" / "startup" / "fed_client.json"
        direct, port = config.read_text(), free_port()
        federation.kill("south")
        relay = subprocess.Popen([sys.executable, "-c", RELAY, str(port), str(federation.port)])
        try:
            config.write_text(direct.replace(str(federation.port), str(port)))
            federation.start("south", FL_DATA_ROOT=str(images["south"]))
            process = self.submit(federation, project)
            relay.send_signal(signal.SIGSTOP)
            time.sleep(OUTAGE_S)
            relay.send_signal(signal.SIGCONT)
            _, error = process.communicate(timeout=300)
        finally:
            federation.kill("south")
            relay.kill()
            relay.wait()
            config.write_text(direct)
            federation.start("south", FL_DATA_ROOT=str(images["south"]))
        assert process.returncode == 0, error
        result = json.loads((project.folder / "runs" / "long" / "results.json").read_text())
        assert result["lost"] == []
        assert [set(entry["sites"]) for entry in result["rounds"]] == [set(SITES)] * 4
        assert None not in [accuracy for entry in result["rounds"] for accuracy in entry["sites"].values()]

    def test_a_killed_server_ends_the_job_and_job_py_says_so(self, finished, federation, tmp_path):
        process = self.submit(federation, Project(tmp_path / "project"))
        federation.kill("localhost")
        federation.start("localhost")
        _, error = process.communicate(timeout=300)
        assert process.returncode == 1
        assert re.search("the server was restarted, which ended the job .*: submit it again", error)
