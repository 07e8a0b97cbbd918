"""Every command of deploy/README.md runs here as written, or is listed with the reason why not.

The federation joins as the guide says: each participant has a folder of its own, and only zip files go between them.
"""

import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from template import BakedProject, run, surroundings
from test_readme import commands

RUN = {
    "init": "nvflare cert init --profile deploy/project.yml -o ca",
    "request": "nvflare cert request -p participant.yml --out request",
    "read aloud": "sha256sum request/NAME.request.zip",
    "compare": "sha256sum NAME.request.zip",
    "approve": "nvflare cert approve NAME.request.zip -c ca --profile deploy/project.yml",
    "package": ("(umask 077; nvflare package NAME.signed.zip --request-dir request -w kits --fingerprint FINGERPRINT)"),
    "keep logs": (
        'sed -i \'s/"allow_log_streaming": true/"allow_log_streaming": false/\' KIT/local/resources.json.default'
    ),
    "close folders": "cp deploy/authorization.json KIT/local/",
    "store": "sed -i 's#/tmp/nvflare#/var/lib/nvflare#' KIT/local/resources.json.default",
    "provision": "(umask 077; nvflare provision -p deploy/project.yml -w provisioned)",
    "provision again": "(umask 077; nvflare provision -p deploy/project.yml -w provisioned --force)",
    "doctor": "python deploy/doctor.py --data_root /path/to/images --classes classes.txt --startup_kit KIT",
    "start server": "KIT/startup/start.sh",
    "start site": "FL_DATA_ROOT=/path/to/images OMP_NUM_THREADS=8 KIT/startup/start.sh",
    "runtime": "cp deploy/study_runtime.yaml KIT/local/",
    "prepare": "nvflare deploy prepare KIT --config deploy/k8s.yaml --output PREPARED",
    "stage": "nvflare deploy k8 stage PREPARED",
    "start on Slurm": "PREPARED/startup/start_slurm.sh",
    "submit": "python job.py --env prod --startup_kit KIT --dataset image_folder --classes classes.txt",
    "status": "nvflare system status --startup-kit KIT",
    "jobs": "nvflare job list --startup-kit KIT",
    "here": "python deploy/status.py KIT",
    "ledger": "python ledger.py KIT/ledger/SITE.jsonl",
    "stop": "echo y | KIT/startup/stop_fl.sh",
    "expiry": "openssl x509 -enddate -noout -in KIT/startup/client.crt",
    "renew": "cp RENEWED/startup/client.* KIT/startup/",
    "disable": "nvflare system disable-client SITE --startup-kit KIT",
    "new root": "nvflare cert init --profile deploy/project.yml -o ca-01 --deploy-version 01",
    "upgrade": "pip install -r requirements.txt",
}
NO_DOCKER = "needs Docker; test_deploy.py checks the compose file and the image"
NOT_RUN = {
    "python job.py --env poc": "tests/project/test_sites.py runs it",
    "cd DIR/app && find * -type f ! -name '*.pyc' | LC_ALL=C sort | xargs sha256sum | sha256sum": (
        "tests/project/test_ledger.py runs it"
    ),
    "sudo chown -R 10001:10001 KIT": "needs root",
    "KIT=/path/to/kit docker compose -f deploy/compose.yml up -d server": NO_DOCKER,
    "KIT=/path/to/kit IMAGES=/path/to/images docker compose -f deploy/compose.yml up -d site": NO_DOCKER,
    "helm upgrade --install site-1 PREPARED/helm_chart --namespace nvflare": "needs Kubernetes",
    "PREPARED/startup/start_docker.sh": "needs Docker",
    "docker compose -f deploy/compose.yml down": NO_DOCKER,
    "docker compose -f deploy/compose.yml build": NO_DOCKER,
}
NOT_RUN |= {
    "python ledger.py KIT/ledger/SITE.jsonl": "tests/project/test_ledger.py runs it",
    "cd DIR/app && find * -type f ! -name '*.pyc' | LC_ALL=C sort | xargs sha256sum | sha256sum": (
        "tests/project/test_ledger.py runs it on an exported job"
    ),
    "srun --nodes 3 --ntasks-per-node 1 sh -c 'exec KITS/host-$((SLURM_PROCID + 1))/startup/sub_start.sh --once'": (
        "needs several machines with Slurm; tests/project/test_real_sites.py starts three kits with this script"
    ),
    "python job.py --env prod --startup_kit KIT --sites host-1,host-2,host-3 --simulate --n_clients 2000"
    " --dataset digits": "tests/project/test_real_sites.py runs it with fewer sites",
}
CLASSES = ["benign", "malign"]


def typed(
    name: str, folder: Path, words: Mapping[str, object] | None = None, added: str = "", on_path: Path | None = None
) -> str:
    """Type a command of the guide in a folder, with some of its words replaced; return its output.

    Fail if it fails. The folder next to it, `home`, is the home of all; programs in `on_path` replace others.
    """
    command, environment = prepared_command(name, folder, words or {}, added, on_path)
    code, said = run(command, folder, environment)
    assert code == 0, f"{command[-1]}\n{said}"
    return said


def prepared_command(
    name: str, folder: Path, words: Mapping[str, object], added: str, on_path: Path | None = None
) -> tuple[list[str], dict[str, str]]:
    command = RUN[name]
    for word, replacement in words.items():
        assert word in command
        command = command.replace(word, str(replacement))
    path = f"{on_path or ''}:{Path(sys.executable).parent}:{surroundings(folder)['PATH']}".lstrip(":")
    environment = surroundings(folder.parent / "home", PATH=path, PIP_NO_INDEX="1", OMP_NUM_THREADS="1")
    return ["sh", "-c", f"umask 022; {command} {added}"], environment


class Federation:
    """Participants and their folders; the project admin's, `admin`, is the project, which the researcher has, too."""

    def __init__(self, project: BakedProject, root: Path):
        self.root, self.admin = root, root / "admin"
        self.kits: dict[str, Path] = {}
        shutil.copytree(project.path, self.admin)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        profile = (self.admin / "deploy" / "project.yml").read_text()
        for old, new in {"server.example.com": "localhost", "8002": str(self.port), "site-1": "north"}.items():
            assert old in profile
            profile = profile.replace(old, new)
        (self.admin / "deploy" / "project.yml").write_text(profile.replace("site-2", "south"))
        (self.admin / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        self.said = typed("init", self.admin)

    def join(self, name: str, definition: str, attempt: str = "") -> Path:
        """Request, approve, package: the kit of a new participant; the folder is new, too."""
        folder = self.root / f"{name}{attempt}"
        shutil.copytree(self.admin / "deploy", folder / "deploy")
        asked = (folder / "deploy" / "participant.yml").read_text()
        assert asked.endswith("  - {name: site-1, type: client, org: site_1}\n")
        (folder / "participant.yml").write_text(asked[: asked.rindex("  - ")] + f"  - {definition}\n")
        typed("request", folder)
        for zip_file in (self.admin / f"{name}.request.zip", self.admin / f"{name}.signed.zip"):
            zip_file.unlink(missing_ok=True)  # of an earlier certificate
        shutil.copy(folder / "request" / f"{name}.request.zip", self.admin)
        read_aloud = typed("read aloud", folder, {"NAME": name}).split()[0]
        assert read_aloud == typed("compare", self.admin, {"NAME": name}).split()[0]
        said = typed("approve", self.admin, {"NAME": name})
        (fingerprint,) = re.findall(r"^rootca_fingerprint_sha256: (\S+)$", said, re.M)
        shutil.copy(self.admin / f"{name}.signed.zip", folder)
        typed("package", folder, {"NAME": name, "FINGERPRINT": fingerprint})
        (kit,) = folder.glob(f"kits/*/prod_00/{name}")
        return kit

    def processes(self) -> list[psutil.Process]:
        """Those that run in the kits."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self.root) in word for word in process.info["cmdline"] or [])
        ]

    def start(self, name: str, images: Path | None = None) -> None:
        words = {"/path/to/images": images, "OMP_NUM_THREADS=8": "OMP_NUM_THREADS=1"} if images else {}
        redirected = f"> {self.root / name}.log 2>&1"  # it continues in the background
        typed(
            "start site" if images else "start server", self.root / name, {"KIT": self.kits[name], **words}, redirected
        )

    def stop(self, name: str) -> None:
        typed("stop", self.root / name, {"KIT": self.kits[name]})
        kit = str(self.kits[name])
        mine = [process for process in self.processes() if any(kit in word for word in process.info["cmdline"])]
        assert mine and not psutil.wait_procs(mine, timeout=60)[1]


@pytest.fixture(scope="module")
def federation(bake, tmp_path_factory):
    """A server, two sites, and two users that have joined."""
    federation = Federation(bake(dataset="image_folder", project_slug="eyes_2"), tmp_path_factory.mktemp("federation"))
    for name, definition in {
        "localhost": "{name: localhost, type: server, org: coordinator}",
        "ops@example.com": "{name: ops@example.com, type: admin, org: coordinator, role: org_admin}",
        "lead@example.com": "{name: lead@example.com, type: admin, org: coordinator, role: lead}",
        "north": "{name: north, type: client, org: north}",
        "south": "{name: south, type: client, org: south}",
    }.items():
        federation.kits[name] = federation.join(name, definition)
    for site in ("north", "south"):
        typed("keep logs", federation.root / site, {"KIT": federation.kits[site]})
        typed("close folders", federation.root / site, {"KIT": federation.kits[site]})
    server = {"KIT": federation.kits["localhost"], "/var/lib/nvflare": federation.root / "storage"}
    typed("store", federation.root / "localhost", server)
    yield federation
    for process in federation.processes():
        process.kill()


def write_images(root: Path, seed: int) -> Path:
    """Learnable classes: dark or bright, with noise."""
    random = np.random.RandomState(seed)
    for number in range(40):
        label, split = number % 2, "test" if number < 10 else "train"
        folder = root / split / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.randint(128 * label, 128 * label + 128, (32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def test_every_command_of_the_guide_is_run_or_has_a_reason(bake):
    assert set(commands(bake().path / "deploy" / "README.md")) == {*RUN.values(), *NOT_RUN}
    text = inspect.getsource(sys.modules[__name__])
    assert [name for name in RUN if text.count(f'"{name}"') < 2] == []  # listed, and typed


@pytest.mark.slow
def test_private_keys_stay_where_they_were_made(federation):
    exchanged = list(federation.admin.glob("*.zip"))
    assert {path.name.removesuffix(".signed.zip") for path in exchanged if ".signed." in path.name} >= {
        *federation.kits
    }
    with_keys = [path for path in federation.admin.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert with_keys == [federation.admin / "ca" / "rootCA.key"]
    for path in exchanged:
        shutil.unpack_archive(path, federation.root / "unpacked" / path.name)
    unpacked = [path for path in (federation.root / "unpacked").rglob("*") if path.is_file()]
    assert unpacked and not any(b"PRIVATE KEY" in path.read_bytes() for path in unpacked)


@pytest.mark.slow
def test_keys_and_kits_are_private_under_the_default_umask(federation):
    folders = [federation.admin / "ca", *federation.root.glob("*/request"), *federation.root.glob("*/kits")]
    assert len(folders) > 10
    assert [path for path in folders if path.stat().st_mode & 0o077] == []


@pytest.mark.slow
def test_one_person_can_create_all_kits_and_add_a_site_later(bake, tmp_path):
    project = shutil.copytree(bake(project_slug="eyes_2").path, tmp_path / "project")
    typed("provision", project)
    assert (project / "provisioned").stat().st_mode & 0o077 == 0
    definition = project / "deploy" / "project.yml"
    new = "name: new\n    type: client\n    org: new\n  - name: site-1"
    definition.write_text(definition.read_text().replace("name: site-1", new))
    typed("provision again", project)
    first, second = (project / "provisioned" / "eyes_2" / name for name in ("prod_00", "prod_01"))
    assert not (first / "new").exists() and (second / "new" / "startup" / "client.key").exists()
    for key in first.rglob("*.key"):
        assert key.read_bytes() == (second / key.relative_to(first)).read_bytes()


@pytest.mark.slow
def test_a_kit_has_the_profile_of_the_project_and_the_choices_of_its_site(federation):
    server = (federation.kits["localhost"] / "startup" / "fed_server.json").read_text()
    site = yaml.safe_load((federation.kits["north"] / "startup" / "fed_client.json").read_text())
    assert f'"target": "localhost:{federation.port}"' in server and '"scheme": "grpc"' in server
    service = {"target": f"localhost:{federation.port}", "scheme": "grpc"}
    assert site["servers"][0]["service"] == service and site["client"]["connection_security"] == "mtls"
    resources = yaml.safe_load((federation.kits["north"] / "local" / "resources.json.default").read_text())
    assert resources["allow_log_streaming"] is False
    assert "/tmp/nvflare" not in (federation.kits["localhost"] / "local" / "resources.json.default").read_text()


@pytest.mark.slow
def test_a_new_root_is_another_one(federation):
    old, new = (
        re.findall("rootca_fingerprint.*", said) for said in (federation.said, typed("new root", federation.admin))
    )
    assert old and new and old != new


def prepare(federation: Federation, site: str, runtime: str, study_runtime: str, **changes: object) -> Path:
    """A copy of a site's kit for a cluster, prepared as the guide says with this text of study_runtime.yaml."""
    folder, prepared = federation.root / site, federation.root / site / runtime
    (folder / "deploy" / "study_runtime.yaml").write_text(study_runtime)
    typed("runtime", folder, {"KIT": federation.kits[site]})
    config = yaml.safe_load((folder / "deploy" / f"{runtime}.yaml").read_text())
    config["job_launcher"] |= changes
    (folder / "deploy" / f"{runtime}.yaml").write_text(yaml.safe_dump(config))
    words = {"KIT": federation.kits[site], "k8s": runtime, "PREPARED": prepared}
    said = typed("prepare", folder, words)
    assert f"runtime: {runtime}" in said
    return prepared


def component(prepared: Path, name: str) -> dict:
    """A component of the site, from its resources."""
    resources = yaml.safe_load((prepared / "local" / "resources.json.default").read_text())
    assert resources["allow_log_streaming"] is False
    (found,) = [each for each in resources["components"] if each["id"] == name]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["docker", "k8s"])
def test_a_job_gets_its_image_images_and_environment_on(federation, runtime):
    """Read back with NVFlare's own parsers, which reject unknown keys."""
    from nvflare.app_opt.job_launcher.docker_launcher import ClientDockerJobLauncher
    from nvflare.app_opt.job_launcher.study_runtime import load_study_runtime_file

    text = (federation.admin / "deploy" / "study_runtime.yaml").read_text()
    prepared = prepare(federation, "north", runtime, text)
    study = load_study_runtime_file(str(prepared / "local" / "study_runtime.yaml"), runtime)["default"]
    assert study.container_image == "eyes_2:cpu"
    images, ledger = study.datasets
    assert (images.source, images.mount_path, images.read_only) == ("/path/to/images", "/data/default/images", True)
    assert (ledger.source, ledger.mount_path, ledger.read_only) == ("/path/to/ledger", "/data/default/ledger", False)
    assert (study.env["FL_DATA_ROOT"], study.env["FL_LEDGER"]) == (images.mount_path, ledger.mount_path)
    launcher = component(prepared, f"{runtime}_launcher")
    if runtime == "docker":
        assert launcher["path"].endswith(".ClientDockerJobLauncher")
        kwargs = ClientDockerJobLauncher(**launcher["args"]).default_job_container_kwargs
        assert kwargs["cap_drop"] == ["ALL"] and kwargs["security_opt"] == ["no-new-privileges:true"]
        script = (prepared / "startup" / "start_docker.sh").read_text()
        assert 'DOCKER_IMAGE=${NVFL_P_IMAGE:-"eyes_2:cpu"}' in script
    else:
        assert launcher["path"].endswith(".ClientK8sJobLauncher")
        assert launcher["args"]["security_context"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
        }


def values_used(chart: Path) -> set[str]:
    """The values that the templates of a chart ask for, without those inside of a `with` of their own."""
    text = "".join(path.read_text() for path in (chart / "templates").iterdir())
    return set(re.findall(r"\.Values\.([\w.]+)", text))


@pytest.mark.slow
def test_the_helm_chart_has_all_values_and_the_keys_become_a_secret(federation):
    text = (federation.admin / "deploy" / "study_runtime.yaml").read_text()
    prepared = prepare(federation, "north", "k8s", text)
    chart = prepared / "helm_chart"
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    assert about["apiVersion"] == "v2" and re.fullmatch(r"\d+\.\d+\.\d+", about["version"]) and about["name"]
    values = yaml.safe_load((chart / "values.yaml").read_text())
    for path in values_used(chart):
        found = values
        for name in path.split("."):
            assert name in found, path
            found = found[name]
    assert values["image"] == {"repository": "registry.example.com/eyes_2", "tag": "cpu", "pullPolicy": "Always"}
    assert values["persistence"]["workspace"]["claimName"] == "nvflare-workspace"
    assert values["securityContext"]["runAsUser"] == 10001

    kubectl = federation.root / "kubectl" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(f"#!/bin/sh\ncat >> {kubectl.parent}/applied.yaml; echo --- >> {kubectl.parent}/applied.yaml\n")
    kubectl.chmod(0o755)
    typed("stage", federation.root / "north", {"PREPARED": prepared}, on_path=kubectl.parent)
    applied = [each for each in yaml.safe_load_all((kubectl.parent / "applied.yaml").read_text()) if each]
    kinds = {each["kind"]: each for each in applied}
    assert set(kinds) == {"ConfigMap", "Secret"}
    assert {each["metadata"]["namespace"] for each in applied} == {"nvflare"}
    assert any("client.key" in name for name in kinds["Secret"].get("data", {}) | kinds["Secret"].get("stringData", {}))
    assert "PRIVATE KEY" not in str(kinds["ConfigMap"])
    mounted = yaml.safe_load((chart / "values.yaml").read_text())["workspaceConfig"]
    assert mounted["startup"]["secretName"] == kinds["Secret"]["metadata"]["name"]
    assert mounted["local"]["configMapName"] == kinds["ConfigMap"]["metadata"]["name"]


@pytest.fixture(scope="module")
def running(federation):
    """The same with the server and both sites started; stopped as the guide says."""
    federation.start("localhost")
    for seed, site in enumerate(("north", "south")):
        federation.start(site, write_images(federation.root / "images" / site, seed))
    yield federation
    federation.stop("south")
    federation.stop("localhost")


@pytest.mark.slow
def test_a_researcher_submits_and_an_operator_watches(running):
    researcher, operator = ({"KIT": running.kits[name]} for name in ("lead@example.com", "ops@example.com"))
    said = typed("submit", running.admin, researcher, "--num_rounds 1 --name first")
    assert "Final test accuracy" in said and "may not read the server's log" not in said
    assert "north" in typed("status", running.admin, operator)
    assert "FINISHED:COMPLETED" in typed("jobs", running.admin, operator)
    said = typed("here", running.admin, {"KIT": running.kits["north"]})
    assert said.startswith("north: running, connected") and "chain intact" in said
    assert "chain intact" in typed("ledger", running.admin, {"KIT": running.kits["north"], "SITE": "north"})


@pytest.mark.slow
def test_a_running_federation_grows_renews_revokes_and_upgrades(running):
    operator = {"KIT": running.kits["ops@example.com"]}
    running.kits["east"] = running.join("east", "{name: east, type: client, org: east}")
    ready = {"KIT": running.kits["east"], "/path/to/images": running.root / "images" / "north"}
    assert re.search("^ok +server .* accepts this kit$", typed("doctor", running.admin, ready), re.M)
    running.start("east", running.root / "images" / "north")

    renewed = running.join("south", "{name: south, type: client, org: south}", "-renewed")
    certificate = running.kits["south"] / "startup" / "client.crt"
    old = certificate.read_bytes()
    typed("renew", running.root / "south", {"RENEWED": renewed, "KIT": running.kits["south"]})
    assert certificate.read_bytes() != old
    assert "notAfter" in typed("expiry", running.root / "south", {"KIT": running.kits["south"]})
    running.stop("south")
    typed("upgrade", running.admin)
    running.start("south", running.root / "images" / "south")

    typed("disable", running.admin, {"SITE": "north", **operator}, "--force")  # asks for confirmation otherwise
    running.stop("north")

    client = running.admin / "client.py"  # a newer version of the project; east runs all the time
    client.write_text(client.read_text().replace("--- train new model ---", "--- train with version 2 ---"))
    researcher = {"KIT": running.kits["lead@example.com"]}
    typed("submit", running.admin, researcher, "--num_rounds 1 --name second --sites east,south")
    for site in ("east", "south"):
        assert "--- train with version 2 ---" in (running.root / f"{site}.log").read_text()
    status = typed("status", running.admin, operator)
    assert "east" in status and "south" in status and "north" not in status
    running.stop("east")


@pytest.mark.slow
def test_slurm_runs_the_same_job(running):
    """With stand-ins for Slurm's commands; the job runs in an environment without the site's variables."""
    slurm = running.root / "slurm"
    slurm.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel"):
        (slurm / name).write_text(f"#!{sys.executable}\n{(Path(__file__).parent / 'slurm.py').read_text()}")
        (slurm / name).chmod(0o755)
    running.kits["west"] = running.join("west", "{name: west, type: client, org: west}")
    typed("keep logs", running.root / "west", {"KIT": running.kits["west"]})
    images = write_images(running.root / "images" / "west", seed=3)
    study = yaml.safe_load((running.admin / "deploy" / "study_runtime.yaml").read_text())
    del study["studies"]["default"]["container"], study["studies"]["default"]["datasets"]
    study["studies"]["default"]["env"] |= {
        "FL_DATA_ROOT": str(images),
        "FL_LEDGER": str(slurm / "ledger"),
        "XDG_CACHE_HOME": str(running.root / "home" / "cache"),
    }
    with socket.create_server(("127.0.0.1", 0)) as probe:
        changes = {"internal_port": probe.getsockname()[1], "parent_host": "localhost", "python_path": sys.executable}
    prepared = prepare(running, "west", "slurm", yaml.safe_dump(study), **changes, poll_interval=1)
    assert component(prepared, "slurm_launcher")["path"].endswith(".ClientSlurmJobLauncher")

    redirected = f"> {running.root / 'west.log'} 2>&1 &"
    typed("start on Slurm", running.root / "west", {"PREPARED": prepared}, redirected, slurm)
    researcher = {"KIT": running.kits["lead@example.com"]}
    said = typed("submit", running.admin, researcher, "--num_rounds 1 --name slurm --sites west")
    assert "Final test accuracy" in said
    submission = yaml.safe_load((slurm / "1.json").read_text())
    assert {"--export=NIL", "--partition=gpu", "--time=24:00:00"} <= {*submission["words"]}
    assert "--- validate global model ---" in Path(submission["chdir"], "log.txt").read_text()
    assert not (slurm / "1.cancelled").exists() and (slurm / "ledger" / "west.jsonl").stat().st_size > 0

    long = prepared_command("submit", running.admin, researcher, "--num_rounds 10000 --name long --sites west")
    job = subprocess.Popen(
        long[0], cwd=running.admin, env=long[1], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert job.stdout and any(line.startswith("round 1 ") for line in job.stdout)
    batch_job = psutil.Process(yaml.safe_load((slurm / "2.json").read_text())["pid"])
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) != 0 and not psutil.wait_procs([batch_job], timeout=60)[1]
    parents = [process for process in running.processes() if any(str(prepared) in word for word in process.cmdline())]
    for process in parents:
        process.terminate()
    assert parents and not psutil.wait_procs(parents, timeout=60)[1]
