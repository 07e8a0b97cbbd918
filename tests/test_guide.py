"""Every command of deploy/README.md runs here as written, or is listed with the reason why not.

The federation joins as the guide says: each participant has a folder of its own, and only zip files go between them.
"""

import inspect
import re
import shutil
import socket
import sys
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
    "preflight": "nvflare preflight-check -p KIT",
    "start server": "KIT/startup/start.sh",
    "start site": "FL_DATA_ROOT=/path/to/images OMP_NUM_THREADS=8 KIT/startup/start.sh",
    "submit": "python job.py --env prod --startup_kit KIT --dataset image_folder --classes classes.txt",
    "status": "nvflare system status --startup-kit KIT",
    "jobs": "nvflare job list --startup-kit KIT",
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
    "sudo chown -R 10001:10001 KIT": "needs root",
    "KIT=/path/to/kit docker compose -f deploy/compose.yml up -d server": NO_DOCKER,
    "KIT=/path/to/kit IMAGES=/path/to/images docker compose -f deploy/compose.yml up -d site": NO_DOCKER,
    "docker compose -f deploy/compose.yml down": NO_DOCKER,
    "docker compose -f deploy/compose.yml build": NO_DOCKER,
}
CLASSES = ["benign", "malign"]


def typed(name: str, folder: Path, added: str = "", **words: object) -> str:
    """Type a command of the guide in a folder, with some of its words replaced; return its output.

    Fail if it fails. The folder next to it, `home`, is the home of all.
    """
    command = RUN[name]
    for word, replacement in words.items():
        assert word in command
        command = command.replace(word, str(replacement))
    path = f"{Path(sys.executable).parent}:{surroundings(folder)['PATH']}"
    environment = surroundings(folder.parent / "home", PATH=path, PIP_NO_INDEX="1", OMP_NUM_THREADS="1")
    code, said = run(["sh", "-c", f"umask 022; {command} {added}"], folder, environment)
    assert code == 0, f"{command}\n{said}"
    return said


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
        read_aloud = typed("read aloud", folder, NAME=name).split()[0]
        assert read_aloud == typed("compare", self.admin, NAME=name).split()[0]
        said = typed("approve", self.admin, NAME=name)
        (fingerprint,) = re.findall(r"^rootca_fingerprint_sha256: (\S+)$", said, re.M)
        shutil.copy(self.admin / f"{name}.signed.zip", folder)
        typed("package", folder, NAME=name, FINGERPRINT=fingerprint)
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
        typed("start site" if images else "start server", self.root / name, redirected, KIT=self.kits[name], **words)

    def stop(self, name: str) -> None:
        typed("stop", self.root / name, KIT=self.kits[name])
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
        typed("keep logs", federation.root / site, KIT=federation.kits[site])
        typed("close folders", federation.root / site, KIT=federation.kits[site])
    server = {"KIT": federation.kits["localhost"], "/var/lib/nvflare": federation.root / "storage"}
    typed("store", federation.root / "localhost", **server)
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
    typed("provision", federation.admin)
    folders = [federation.admin / "provisioned", federation.admin / "ca", *federation.root.glob("*/request")]
    folders += federation.root.glob("*/kits")
    assert len(folders) > 10
    assert [path for path in folders if path.stat().st_mode & 0o077] == []


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


@pytest.mark.slow
def test_a_federation_runs_grows_renews_revokes_and_upgrades(federation):
    images = {
        site: write_images(federation.root / "images" / site, seed) for seed, site in enumerate(("north", "south"))
    }
    federation.start("localhost")
    for site, root in images.items():
        federation.start(site, root)
    researcher, operator = ({"KIT": federation.kits[name]} for name in ("lead@example.com", "ops@example.com"))
    flags = "--num_rounds 1 --name"
    said = typed("submit", federation.admin, f"{flags} first", **researcher)
    assert "Final test accuracy" in said and "may not read the server's log" not in said
    assert "north" in typed("status", federation.admin, **operator)
    assert "FINISHED:COMPLETED" in typed("jobs", federation.admin, **operator)

    # a new site, a renewed one, a revoked one
    federation.kits["east"] = federation.join("east", "{name: east, type: client, org: east}")
    assert "overall: pass" in typed("preflight", federation.root / "east", KIT=federation.kits["east"])
    federation.start("east", images["north"])
    renewed = federation.join("south", "{name: south, type: client, org: south}", "-renewed")
    old = (federation.kits["south"] / "startup" / "client.crt").read_bytes()
    typed("renew", federation.root / "south", RENEWED=renewed, KIT=federation.kits["south"])
    assert (federation.kits["south"] / "startup" / "client.crt").read_bytes() != old
    assert "notAfter" in typed("expiry", federation.root / "south", KIT=federation.kits["south"])
    federation.stop("south")
    typed("upgrade", federation.admin)
    federation.start("south", images["south"])
    typed("disable", federation.admin, "--force", SITE="north", **operator)  # asks for confirmation otherwise

    # a newer version of the project: east has been running all the time
    client = federation.admin / "client.py"
    client.write_text(client.read_text().replace("--- train new model ---", "--- train with version 2 ---"))
    typed("submit", federation.admin, f"{flags} second --sites east,south", **researcher)
    for site in ("east", "south"):
        assert "--- train with version 2 ---" in (federation.root / f"{site}.log").read_text()
    status = typed("status", federation.admin, **operator)
    assert "east" in status and "south" in status and "north" not in status
    for name in ("east", "south", "north", "localhost"):
        federation.stop(name)
