"""POC and real sites, as far as one machine can test them: flags, an export, the health check, a whole POC."""

import contextlib
import json
import re
import shlex
import shutil
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_reply
from nvflare.fuel.flare_api.flare_api import Session
from nvflare.fuel.hci.shell_cmd_val import TailValidator
from nvflare.private.fed.server.job_cmds import JobCommandModule
from nvflare.private.fed.utils.fed_utils import execute_command_directly

from federation.launch import session as server
from federation.launch.prod import submit
from federation.protocol import BACK, LATE, OPTIONS
from federation.run.folder import RunFolder
from federation.server import heartbeat
from settings import Options

PROD = ["--env", "prod", "--dataset", "digits"]
BAD_FLAGS = {
    "a kit without sites": (["--startup_kit", "."], "--startup_kit is for real sites: add --env prod"),
    "no kit": (PROD, "--startup_kit DIR is missing"),
    "a folder that is not a kit": ([*PROD, "--startup_kit", "."], "startup/fed_admin.json does not exist"),
    "a partition for real sites": ([*PROD, "--partition", "iid"], "real sites have their own: use none"),
    "a local folder of images": ([*PROD, "--data_root", "."], "each site sets its own FL_DATA_ROOT"),
    "a share of files to skip at real sites": ([*PROD, "--skip_unreadable", "0.1"], "sets its own FL_SKIP_UNREADABLE"),
    "a check of real sites": ([*PROD, "--check"], "remove --env prod"),
    "no classes": (["--env", "prod", "--dataset", "image_folder"], "--classes FILE is missing"),
    "a missing file of classes": ([*PROD, "--classes", "/nowhere"], "/nowhere does not exist"),
    "an export to an existing folder": ([*PROD, "--export", "."], "exists: choose another folder"),
    "a site twice": ([*PROD, "--sites", "a,b,a"], "--sites names a twice"),
    "a timeout in the simulator": (["--site_timeout", "9"], "--site_timeout has no effect in the simulator"),
    "no time for a round": (
        [*PROD, "--site_timeout", "0"],
        "'--site_timeout': 0.0 is not in the range x>0",
    ),
    "spaces among sites": ([*PROD, "--sites", "a, b"], "--sites has the name ' b'"),
}


@pytest.mark.parametrize("fault", BAD_FLAGS)
def test_an_invalid_flag_is_rejected_in_one_line(project, fault):
    flags, message = BAD_FLAGS[fault]
    run = project.run("job.py", *flags)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"job.py: .*\n", run.stderr)
    assert message in run.stderr
    assert not (project.folder / "runs").exists()


def test_an_export_is_the_whole_job_without_an_image(project, tmp_path):
    """It is for the sites of deploy/project.yml and continues while more than half of them are connected."""
    (tmp_path / "classes.txt").write_text("cat\n\ndog \n")
    flags = ["--dataset", "image_folder", "--classes", str(tmp_path / "classes.txt"), "--export", str(tmp_path / "job")]
    run = project.run("job.py", "--env", "prod", *flags)
    assert run.returncode == 0, run.stderr
    meta = json.loads((tmp_path / "job" / "meta.json").read_text())
    provision = yaml.safe_load((project.folder / "deploy" / "project.yml").read_text())
    sites = [member["name"] for member in provision["participants"] if member["type"] == "client"]
    assert meta["deploy_map"] == {"app": ["server", *sites]}
    assert meta["min_clients"] == len(sites) // 2 + 1
    options = json.loads((tmp_path / "job" / "app" / "custom" / OPTIONS).read_text())
    assert (options["classes"], options["partition"]) == (["cat", "dog"], "none")


class FakeSession:
    """Stands in for NVFlare's session: the server's log grows with each poll of the job.

    The log is sent as NVFlare does, with NVFlare's own check of the command and the real `tail`.
    """

    LIMIT = JobCommandModule.MAX_RETURNED_JOB_LOG_BYTES

    def __init__(self, folder: Path, growth: list[bytes]):
        self.growth, self.left, self.sent = growth, list(growth), 0
        self.folder, self.log = folder, folder / "job-id" / "log.txt"
        self.aborted: list[str] = []

    def get_connected_client_list(self):
        return [SimpleNamespace(name=name) for name in ("north", "south")]

    def get_system_info(self):
        return SimpleNamespace(server_info=SimpleNamespace(start_time=0))

    def submit_job(self, job):
        return "job-id"

    def get_job_meta(self, job_id):
        if not self.left:
            return {"status": "FINISHED:COMPLETED"}
        if self.left != self.growth or self.log.parent.exists():  # at the first poll, the job has no folder yet
            with self.log.open("ab") as log:
                log.write(self.left.pop(0))
        self.log.parent.mkdir(exist_ok=True)
        return {"status": "RUNNING"}

    def get_job_logs(self, job_id, target):
        text = self.log.read_bytes()[-self.LIMIT :].decode(errors="replace") if self.log.exists() else ""
        self.sent += len(text.encode())
        return {"logs": {"server": text}}

    def _do_command(self, command, enforce_meta):
        name, target, *arguments = shlex.split(command)
        assert (name, target) == ("tail", "server") and TailValidator().validate(arguments)[0] == ""
        output = execute_command_directly([name, *arguments])
        self.sent += len(output.encode())
        return {"data": [{"type": "string", "data": output}]}

    _get_string_data = staticmethod(Session._get_string_data)

    def download_job_result(self, job_id):
        (self.folder / "result" / "workspace").mkdir(parents=True)
        shutil.copy(self.log, self.folder / "result" / "workspace")
        return self.folder / "result"

    def abort_job(self, job_id):
        self.aborted.append(job_id)

    def close(self):
        pass


def submit_job(monkeypatch, folder: Path, growth: list[bytes], follow) -> FakeSession:
    """Submit a job while the server's log grows by these parts."""
    session = FakeSession(folder, growth)
    monkeypatch.chdir(folder)  # NVFlare's server runs in its own folder
    monkeypatch.setattr(server, "new_secure_session", lambda *_, **__: session)
    monkeypatch.setattr(server, "POLL_S", 0.0)
    (folder / "job").mkdir()
    (folder / "job" / "meta.json").write_text('{"deploy_map": {"app": []}}')
    options = Options(env="prod", startup_kit=".", username="admin", wait=1.0, site_names=["north", "south"])
    with contextlib.suppress(KeyboardInterrupt):
        submit(RunFolder(folder), options, {}, follow)
    return session


def follow_a_job(monkeypatch, folder: Path, growth: list[bytes]) -> tuple[FakeSession, str, list[int]]:
    """The session, the job's log as shown, and the finished rounds."""
    shown: list[str] = []
    over: list[int] = []

    def follow(log, rounds):
        shown.append(log)
        over[:] = [record["round"] for record in rounds]

    return submit_job(monkeypatch, folder, growth, follow), "".join(shown), over


def test_a_servers_log_of_any_length_is_followed_and_sent_only_once(monkeypatch, tmp_path, capsys):
    filler = b"2026-01-01 some line of the log, for example of Zo\xc3\xab\n" * 20_000  # 1 MB
    growth = [b"Round 0 started.\n", filler, b"Client south is deemed", b" disconnected!\n"]
    for number in range(1, 9):
        growth += [b"Round %d started.\n" % number, filler]
    session, shown, over = follow_a_job(monkeypatch, tmp_path, growth)
    log = b"".join(growth)
    assert len(log) > session.LIMIT
    assert shown.encode() == log == (tmp_path / "log.txt").read_bytes()
    assert over == list(range(8))
    assert session.sent < len(log) + 10_000
    assert session.aborted == []
    assert capsys.readouterr().out.count("south is lost") == 1


def test_a_site_that_timed_out_is_named_once_with_the_flag_that_sets_it(monkeypatch, tmp_path, capsys):
    timed_out = f"WARNING - {LATE.format('south', 30)}\n".encode()
    flapping = b"Client south is deemed disconnected!\nClient south is reconnected\n" * 3
    follow_a_job(monkeypatch, tmp_path, [timed_out, flapping, f"INFO - {BACK.format('south')}\n".encode()])
    lines = [line for line in capsys.readouterr().out.splitlines() if "south" in line]
    assert len(lines) == 2
    assert lines[0].startswith("south has not answered within --site_timeout 30 s; continuing without it")
    assert lines[1] == "south is back"


def test_ctrl_c_stops_the_job_on_the_server(monkeypatch, tmp_path):
    def interrupt(log, rounds):
        raise KeyboardInterrupt

    assert submit_job(monkeypatch, tmp_path, [b"Round 0 started.\n"], interrupt).aborted == ["job-id"]


class Monitored:
    """A heartbeat monitor with fake sites, a fake clock, and the workflow that it reports to."""

    def __init__(self, monkeypatch, sites: list[str], site_timeout: float):
        self.now, self.sites = 0.0, sites
        self.dead: list[str] = []
        monkeypatch.setattr("federation.server.heartbeat.time.monotonic", lambda: self.now)
        self.monitor = heartbeat.HeartbeatMonitor(site_timeout)
        self.monitor.heard = dict.fromkeys(sites, 0.0)

    def send_aux_request(self, targets, **_):
        return {site: make_reply(ReturnCode.OK) for site in self.sites}

    def fire_event(self, event_type, fl_ctx):
        pass  # the monitor's log lines are events, too

    def handle_dead_job(self, site, fl_ctx):
        self.dead.append(site)

    def context(self, site: str = "", **properties) -> FLContext:
        context, peer = FLContext(), FLContext()
        peer.set_prop(ReservedKey.IDENTITY_NAME, site, private=False)
        context.set_peer_context(peer)
        for name, value in {ReservedKey.ENGINE: self, FLContextKey.RUNNER: self, **properties}.items():
            context.set_prop(name, value, private=True, sticky=False)
        return context

    def check_at(self, now: float) -> list[str]:
        """The sites reported to the workflow at this time."""
        self.now, self.dead = now, []
        self.monitor.check(self.context())
        return self.dead

    def send_task(self, site: str, task: str) -> None:
        self.monitor.handle_event(EventType.AFTER_TASK_DATA_FILTER, self.context(site, **{FLContextKey.TASK_ID: task}))

    def answer(self, site: str) -> None:
        self.monitor.handle_event(EventType.BEFORE_TASK_RESULT_FILTER, self.context(site))


class TestTheHeartbeatMonitor:
    def test_reports_a_site_whose_task_times_out_until_it_gets_another(self, monkeypatch):
        sites = Monitored(monkeypatch, ["north", "south"], site_timeout=30)
        sites.send_task("north", "n1")
        sites.send_task("south", "s1")
        sites.now = 20.0
        sites.answer("north")
        sites.send_task("south", "s1")  # sent again, as after a network failure
        assert sites.check_at(29) == []
        assert sites.check_at(31) == ["south"]
        sites.send_task("south", "s1")
        assert sites.check_at(36) == ["south"]
        sites.send_task("south", "s2")
        assert sites.check_at(66) == []
        assert sites.check_at(67) == ["south"]

    def test_reports_a_silent_site(self, monkeypatch):
        sites = Monitored(monkeypatch, ["north"], site_timeout=1e9)
        assert sites.check_at(1) == []
        sites.sites = []
        assert sites.check_at(1 + heartbeat.LOST_AFTER_S) == []
        assert sites.check_at(2 + heartbeat.LOST_AFTER_S) == ["north"]

    def test_continues_after_an_error(self, monkeypatch):
        monkeypatch.setattr(heartbeat, "POLL_INTERVAL_S", 0.01)
        asked = threading.Semaphore(0)

        class Engine:
            def get_clients(self):
                return []

            @contextlib.contextmanager
            def new_context(self):
                context = FLContext()
                context.set_prop(ReservedKey.ENGINE, self, private=True, sticky=False)
                yield context

            def fire_event(self, event_type, fl_ctx):
                pass

            def send_aux_request(self, **_):
                asked.release()
                raise OSError("the network is down")

        with Engine().new_context() as context:
            monitor = heartbeat.HeartbeatMonitor(1.0)
            monitor.handle_event(EventType.START_RUN, context)
            assert asked.acquire(timeout=30) and asked.acquire(timeout=30)
            monitor.handle_event(EventType.END_RUN, context)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, only root sees all connections")
def test_the_health_check_passes_for_a_listening_server_and_a_connected_site(project, tmp_path):
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

        assert health("server") == (1, f"nothing is listening on port {port}\n")
        server.listen()
        assert health("server") == (0, "")
        assert health("client") == (1, f"not connected to localhost:{port}\n")
        with socket.create_connection(("127.0.0.1", port)):
            assert health("client") == (0, "")


@pytest.mark.slow
def test_a_poc_gives_the_same_model_as_the_simulator_and_leaves_other_pocs_alone(project):
    """Another POC is likely to use port 8002 and to have its files in /tmp/nvflare."""
    flags = ("--dataset", "digits", "--n_clients", "2", "--num_rounds", "2")
    foreign = socket.socket()
    foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with foreign:
        try:
            foreign.bind(("127.0.0.1", 8002))
            foreign.listen()
        except OSError:
            pass  # there is another one already
        before = Path("/tmp/nvflare").exists()
        run = project.run("job.py", *flags, "--env", "poc", "--name", "poc")
        assert run.returncode == 0, run.stderr
        assert Path("/tmp/nvflare").exists() == before
    assert project.processes() == []
    left = list((project.folder / "runs" / "poc" / "federation").rglob("*"))
    assert any(path.name == "log.txt" for path in left)
    assert [path for path in left if path.stat().st_mode & 0o077] == []
    assert [path for path in left if path.is_file() and b"PRIVATE KEY" in path.read_bytes()] == []
    assert project.run("job.py", *flags, "--name", "sim").returncode == 0
    poc, sim = (torch.load(project.folder / "runs" / name / "final.pt", weights_only=True) for name in ("poc", "sim"))
    assert poc.keys() == sim.keys()
    assert all(torch.equal(poc[name], sim[name]) for name in sim)
    results = [json.loads((project.folder / "runs" / name / "results.json").read_text()) for name in ("poc", "sim")]
    assert results[0]["rounds"] == results[1]["rounds"]
    assert results[0]["test"] == results[1]["test"]


CALL = "x, labels = batch\n        hang(self.round)\n        outputs = self(x)\n        loss"
# Site 2 hangs in its first round until it times out and the next round runs, which then waits for it.
HANG = """
import os, time
from pathlib import Path
def wait_for(path):
    while not path.exists():
        time.sleep(0.1)
def hang(number):
    released, back = Path(os.environ["SIGNS"], "released"), Path(os.environ["SIGNS"], "back")
    site = next(name for name in ("site-1", "site-2", "site-3") if name in os.getcwd())
    if (site, number) == ("site-2", 0):
        wait_for(released)
    elif (site, number) == ("site-2", 1):
        back.touch()
    elif (site, number) == ("site-1", 1):
        released.touch()
        wait_for(back)
"""


@pytest.mark.slow
def test_a_site_whose_training_hangs_times_out_and_may_come_back(project, tmp_path):
    project.replace("model.py", "x, labels = batch\n        outputs = self(x)\n        loss", CALL)
    (project.folder / "model.py").write_text((project.folder / "model.py").read_text() + HANG)
    flags = ["--dataset", "digits", "--n_clients", "3", "--num_rounds", "2", "--name", "hung"]
    run = project.run("job.py", "--env", "poc", *flags, "--site_timeout", "45", SIGNS=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "site-2 has not answered within --site_timeout 45 s; continuing without it" in run.stdout
    assert "site-2 is back" in run.stdout
    result = json.loads((project.folder / "runs" / "hung" / "results.json").read_text())
    assert result["lost"] == []
    untrained, *later = (entry["sites"]["site-2"] for entry in result["rounds"])
    assert untrained is None and None not in later
