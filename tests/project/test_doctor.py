"""deploy/doctor.py: what it says of good and bad sites, before they connect."""

import json
import os
import re
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from deploy import doctor, doctor_kit
from programs import PROJECT, data_error
from settings import Options
from test_real_sites import free_port

CLASSES = ["bird", "cat", "dog"]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of two of the federation's three classes."""
    random = np.random.RandomState(0)
    for split, n_images in (("train", 20), ("test", 5)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(n_images):
                pixels = random.randint(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    (tmp_path / "images").chmod(0o700)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path / "images"


def provision(folder: Path) -> Path:
    """The kits of a federation whose server is on this machine."""
    definition = yaml.safe_load((PROJECT / "deploy" / "project.yml").read_text())
    definition["name"] = folder.name
    server = next(member for member in definition["participants"] if member["type"] == "server")
    server["name"], server["fed_learn_port"] = "localhost", free_port()
    folder.mkdir()
    (folder / "project.yml").write_text(yaml.safe_dump(definition))
    nvflare = [str(Path(sys.executable).with_name("nvflare")), "provision", "-p", "project.yml", "-w", "out"]
    subprocess.run(nvflare, cwd=folder, check=True, capture_output=True)
    return folder / "out" / folder.name / "prod_00"


@pytest.fixture(scope="module")
def kits(tmp_path_factory) -> list[Path]:
    """The kits of two federations."""
    folder = tmp_path_factory.mktemp("federations")
    return [provision(folder / "ours"), provision(folder / "theirs")]


@pytest.fixture
def kit(kits, tmp_path) -> Path:
    return Path(shutil.copytree(kits[0] / "site-1", tmp_path / "kit"))


@contextmanager
def listening(kit: Path, server: Path, trusts: Path):
    """A server with this federation's certificate where a kit looks for it, which accepts only clients of another."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "localhost" / "startup" / "server.crt", server / "localhost/startup/server.key")
    context.load_verify_locations(trusts / "localhost" / "startup" / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    class Greeting(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                with context.wrap_socket(self.request, server_side=True) as client:
                    client.sendall(b"\0")
                    client.recv(1)
            except OSError:
                pass  # a client that is not accepted

    config = json.loads((kit / "startup" / "fed_client.json").read_text())
    port = int(config["servers"][0]["service"]["target"].rpartition(":")[2])
    socketserver.TCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", port), Greeting) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield
        listener.shutdown()
        thread.join()


@pytest.fixture
def diagnose(monkeypatch, capsys, images):
    """diagnose(*flags): the exit code, and check -> its line."""

    def run(*flags: str) -> tuple[int, dict[str, dict]]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--data_root", str(images), *flags, "--json"])
        code = doctor.main()
        return code, {line["check"]: line for line in json.loads(capsys.readouterr().out)}

    return run


def statuses(lines: dict[str, dict]) -> dict[str, list[str]]:
    """Status -> the checks that have it."""
    return {status: [name for name in lines if lines[name]["status"] == status] for status in ("warning", "failed")}


def test_a_good_site_gets_a_line_per_check_and_exit_code_0(images, kit, kits):
    flags = ["--data_root", images, "--classes", images.parent / "classes.txt", "--startup_kit", kit]
    with listening(kit, *kits[:1], *kits[:1]):
        run = subprocess.run([sys.executable, PROJECT / "deploy" / "doctor.py", *flags], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout + run.stderr
    lines = dict(re.findall(r"^\w+ +(\w+) +(.*)$", run.stdout, re.M))
    assert len(lines) == len(run.stdout.splitlines())
    assert "40 to train and validate, 10 to test. Shown only here: cat 20 + 5, dog 20 + 5" in lines["images"]
    assert lines["classes"] == "2 of the federation's 3; no bird here, which is allowed"
    assert re.fullmatch(r"\S+ s per epoch of 32 images, from \d+ steps of LitNet with \d+ threads", lines["speed"])
    assert "valid for 359 more days" in lines["certificate"] and "accepts this kit" in lines["server"]
    warnings = [line.split()[1] for line in run.stdout.splitlines() if not line.startswith("ok ")]
    assert warnings == ["logs"]  # NVFlare's default, unless the site forbids it


def test_unreadable_files_are_all_listed_and_fail_unless_their_share_is_allowed(images, diagnose, monkeypatch):
    for number in range(3):
        (images / "train" / "cat" / f"broken {number}.png").touch()
    Image.new("I;16", (4, 4), 4095).save(images / "test" / "dog" / "x-ray.png")
    code, lines = diagnose()
    assert (code, lines["readable"]["status"]) == (1, "failed")
    assert lines["readable"]["found"] == "4 of 54 files are not"
    assert "FL_SKIP_UNREADABLE=0.08" in lines["readable"]["todo"]
    assert [Path(fault.split(".png")[0]).name for fault in lines["readable"]["details"]] == [
        *("broken 0", "broken 1", "broken 2", "x-ray"),
    ]
    assert "RGB 50;" in lines["pixels"]["found"]
    monkeypatch.setenv("FL_SKIP_UNREADABLE", "0.08")
    code, lines = diagnose()
    assert (code, lines["readable"]["status"]) == (0, "warning")


def test_classes_that_are_not_the_federations_fail_with_the_nearest_one(images, diagnose):
    for split in ("train", "test"):
        (images / split / "cat").rename(images / split / "Cat")
        (images / split / "dog").rename(images / split / "dogs")
    code, lines = diagnose("--classes", str(images.parent / "classes.txt"))
    assert (code, lines["classes"]["status"]) == (1, "failed")
    found = lines["classes"]["found"]
    assert found == "'Cat' is not one of them (should it be 'cat'?); 'dogs' is not one of them (should it be 'dog'?)"
    assert "bird, cat, dog" in lines["classes"]["todo"]
    assert lines["speed"]["status"] == "ok"  # the other checks go on


def test_turned_and_gray_images_are_counted(images, diagnose):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (8, 8)).save(images / "train" / "cat" / "turned.jpg", exif=exif)
    _, lines = diagnose()
    assert lines["pixels"]["found"].startswith("RGB 50, L 1; 1 are turned")


def test_images_of_more_than_8_bits_and_dicom_files_are_read_as_a_job_would(images, diagnose):
    pydicom = pytest.importorskip("pydicom")
    shutil.copy(Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm", images / "train/cat/scan.dcm")
    Image.new("I;16", (4, 4), 4095).save(images / "test" / "dog" / "x-ray.png")
    code, lines = diagnose("--image_white", "4095")
    assert (code, lines["readable"]["found"]) == (0, "all 52 files")
    assert lines["pixels"]["found"].startswith("RGB 50, DICOM 1, I;16 1; 0 are turned")


def test_a_folder_that_others_can_enter_is_a_warning(images, diagnose):
    images.chmod(0o755)
    code, lines = diagnose()
    assert (code, statuses(lines)) == (0, {"warning": ["classes", "folder", "kit"], "failed": []})
    assert lines["folder"]["todo"] == f"chmod o= {images}"


def test_too_little_disk_fails_before_anything_is_converted(diagnose, monkeypatch, empty_cache):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    code, lines = diagnose()
    assert (code, lines["space"]["status"]) == (1, "failed")
    assert "0.00015 GB" in lines["space"]["found"] and "XDG_CACHE_HOME" in lines["space"]["todo"]
    assert list(empty_cache.iterdir()) == [] and "readable" not in lines


def test_without_images_the_other_checks_go_on(images, diagnose, kit):
    shutil.rmtree(images)
    code, lines = diagnose("--startup_kit", str(kit))
    assert (code, lines["images"]["status"]) == (1, "failed")
    assert str(images) in lines["images"]["found"] and lines["certificate"]["status"] == "ok"


def test_other_versions_of_packages_fail(project, monkeypatch):
    monkeypatch.setattr(doctor, "PROJECT", project.folder)
    assert [line.status for line in doctor.packages(Options())] == ["ok"]
    project.replace("requirements.txt", "tqdm>=4.66", "tqdm<4\nno-such-package>=1")
    [line] = doctor.packages(Options())
    assert line.status == "failed" and line.todo == "python3 install.py"
    assert re.search(r"tqdm is 4\S+ instead of <4, no-such-package is missing", line.found)


def test_a_python_without_the_packages_says_so_in_every_check(images, kit):
    flags = ["--data_root", images, "--startup_kit", kit]
    command = [sys.executable, "-S", PROJECT / "deploy" / "doctor.py", *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "")
    assert re.findall(
        r"^failed +(\w+) +not checked, because \w+ is missing -> python3 install.py$", run.stdout, re.M
    ) == [
        *("packages", "images", "kit"),
    ]


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ([], {}, "--data_root DIR is missing"),
        (["--data_rot", "x"], {}, "unrecognized arguments: --data_rot x"),
        (["--data_root", "x", "--classes", "/nowhere"], {}, "--classes: /nowhere does not exist"),
        (["--data_root", "x"], {"FL_SKIP_UNREADABLE": "2 %"}, "FL_SKIP_UNREADABLE must be a share"),
        (["--data_root", "x"], {"FL_SKIP_UNREADABLE": "2"}, "FL_SKIP_UNREADABLE must be a share"),
    ],
    ids=["nothing", "unknown flag", "no classes", "text", "more than all"],
)
def test_wrong_usage_is_one_line_and_exit_code_2(flags, variables, said):
    command = [sys.executable, PROJECT / "deploy" / "doctor.py", *flags]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert said in run.stderr


# ---- the startup kit


def examine(kit: Path) -> dict[str, tuple[str, str, str]]:
    """Check -> status, what was found, what to do."""
    return {check: (status, found, todo) for status, check, found, todo in doctor_kit.check_kit(kit)}


def test_the_server_must_be_the_kits_and_accept_the_kit(kit, kits):
    ours, theirs = kits
    with listening(kit, ours, ours):
        assert examine(kit)["server"][0] == "ok"
    with listening(kit, theirs, theirs):
        status, found, todo = examine(kit)["server"]
    assert status == "failed" and "is not the server of this kit" in found and "proxy" in todo
    with listening(kit, ours, theirs):
        status, found, _ = examine(kit)["server"]
    assert status == "failed" and "does not accept a connection" in found
    config = kit / "startup" / "fed_client.json"
    config.write_text(config.read_text().replace('"identity": "localhost"', '"identity": "elsewhere"'))
    with listening(kit, ours, ours):
        status, found, _ = examine(kit)["server"]
    assert status == "failed" and "is not the server of this kit" in found


def test_a_server_that_is_not_running_is_named(kit):
    status, found, todo = examine(kit)["server"]
    assert status == "failed" and re.fullmatch(r"nothing listens on localhost:\d+", found) and "start" in todo


@pytest.mark.parametrize(
    ("days", "status", "said"),
    [
        (-1, "failed", "set the clock of this machine"),
        (329, "ok", ""),
        (331, "warning", "renew it"),
        (361, "failed", "renew it"),
    ],
)
def test_a_certificate_must_be_valid_now_and_for_some_time(kit, monkeypatch, days, status, said):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days)

    monkeypatch.setattr(doctor_kit, "datetime", Later)
    found = examine(kit)["certificate"]
    assert found[0] == status and said in found[2]


def test_a_key_that_others_can_read_fails(kit):
    assert examine(kit)["permissions"][0] == "ok"
    (kit / "startup" / "client.key").chmod(0o640)
    status, found, todo = examine(kit)["permissions"]
    assert (status, todo) == ("failed", f"chmod -R go= {kit}") and "client.key" in found
    kit.chmod(0o700)
    assert examine(kit)["permissions"][0] == "ok"
    kit.chmod(0o755)
    (kit / "startup" / "client.key").chmod(0o600)
    (kit / "startup" / "start.sh").chmod(0o775)
    assert "start.sh" in examine(kit)["permissions"][1]


def test_the_roles_that_may_submit_code_and_read_files_are_named(kit):
    rights = examine(kit)
    assert "may be submitted by: lead, project_admin." in rights["code"][1]
    assert rights["logs"][0] == "warning"
    assert "files and logs may be read by lead of site_1, org_admin of site_1, project_admin" in rights["logs"][1]
    strict = (PROJECT / "deploy" / "authorization.json").read_text(encoding="utf-8")
    (kit / "local" / "authorization.json").write_text(strict.replace('"byoc": "any"', '"byoc": "none"'))
    rights = examine(kit)
    assert "may be submitted by: nobody." in rights["code"][1]
    assert rights["logs"][0] == "ok"


@pytest.mark.parametrize("name", ["fed_client.json", "client.key", "client.crt", "rootCA.pem"])
@pytest.mark.parametrize("content", [None, b"", b"{}"], ids=["missing", "empty", "other"])
def test_an_incomplete_kit_is_one_line(kit, name, content):
    (kit / "startup" / name).unlink()
    if content is not None:
        (kit / "startup" / name).write_bytes(content)
    assert "is not a complete startup kit of a site" in data_error(examine, kit)


def test_the_certificate_must_be_from_the_kits_own_root(kit, kits):
    shutil.copy(kits[1] / "site-1" / "startup" / "rootCA.pem", kit / "startup")
    assert "is not a complete startup kit of a site" in data_error(examine, kit)


def test_an_authorization_file_that_cannot_be_used_is_named(kit):
    (kit / "local" / "authorization.json").write_text("{")
    assert str(kit / "local" / "authorization.json") in data_error(examine, kit)
