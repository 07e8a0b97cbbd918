"""Simulations in which a few processes, the hosts, run all sites: bits, cohorts, failures, one task in a debugger."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from federation.errors import UserError
from federation.launch import machine
from federation.launch import options as command_line
from federation.protocol import COHORT, COHORTS, read_json_lines
from federation.server.cohort import Cohort, draw
from federation.site.partition import hosts
from programs import Project, read_events

REFUSED = {
    "more hosts than sites": (["--n_hosts", "3"], "--n_hosts is 3, but there are only 2 sites"),
    "a cohort of more sites": (["--sites_per_round", "3"], "--sites_per_round is 3, but there are only 2 sites"),
    "an evaluation by more sites": (["--evaluate_sites", "3"], "--evaluate_sites is 3, but there are only 2 sites"),
    "no host": (["--n_hosts", "0"], "Invalid value for '--n_hosts': 0 is not in the range x>=1"),
    "hosts of real sites": (["--env", "prod", "--n_hosts", "1", "--export", "x"], "--n_hosts is for a simulation"),
    "debugging a site that does not exist": (
        ["--debug", "site-3"],
        "--debug is 'site-3': the sites are site-1 to site-2",
    ),
    "debugging a real site": (
        ["--env", "prod", "--debug", "site-1", "--export", "x"],
        "--debug is for a simulation on this machine",
    ),
    "fewer simulated sites than real ones that run them": (
        ["--env", "prod", "--simulate", "--sites", "a,b,c", "--export", "x"],
        "--n_clients is 2, but 3 real sites run them",
    ),
    "simulated sites with the images of real ones": (
        ["--env", "prod", "--simulate", "--dataset", "image_folder", "--sites", "a", "--export", "x"],
        "--simulate partitions a public data set",
    ),
    "simulated sites of real sites without --env prod": (["--simulate"], "--simulate is for real sites"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_numbers_are_rejected_in_one_line(case):
    flags, message = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        command_line.parse(["--dataset", "digits", "--n_clients", "2", *flags])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_site_has_one_host(options):
    assert hosts(options(n_clients=5, n_hosts=2)) == {
        "host-1": ["site-1", "site-3", "site-5"],
        "host-2": ["site-2", "site-4"],
    }
    assert (
        hosts(options(n_clients=2, n_hosts=2))
        == hosts(options(n_clients=2))
        == {
            "site-1": ["site-1"],
            "site-2": ["site-2"],
        }
    )
    own = options(n_clients=3, n_hosts=2, host_names=["north", "south"])
    assert hosts(own) == {"north": ["site-1", "site-3"], "south": ["site-2"]}


class TestCohorts:
    names = [f"site-{i}" for i in range(1, 101)]

    def test_follow_from_seed_and_round_alone(self):
        cohort = draw(self.names, 10, seed=1, round_=3)
        assert cohort == draw(self.names[::-1], 10, seed=1, round_=3)
        others = [draw(self.names, 10, seed=2, round_=3), draw(self.names, 10, seed=1, round_=4)]
        assert cohort not in others and len(set(cohort)) == 10

    def test_have_every_site_equally_often(self):
        rounds = [draw(self.names, 10, seed=0, round_=number) for number in range(1000)]
        often = [sum(name in cohort for cohort in rounds) for name in self.names]
        assert min(often) > 60 and max(often) < 145  # binomial: 100 on average, standard deviation 9.5

    @pytest.mark.parametrize("simulated", [True, False])
    def test_are_told_with_each_task(self, tmp_path, simulated):
        """A host learns the whole cohort, a real site only whether it takes part."""
        workspace = SimpleNamespace(get_run_dir=lambda job_id: str(tmp_path))
        connected = [SimpleNamespace(name=name) for name in self.names[:20]]
        engine = SimpleNamespace(get_workspace=lambda: workspace, get_clients=lambda: connected)
        sites = self.names[:20] if simulated else None
        component = Cohort(seed=0, sizes={AppConstants.TASK_TRAIN: 4}, sites=sites)

        def told(client: str, task: str = AppConstants.TASK_TRAIN):
            context, peer, message = FLContext(), FLContext(), Shareable()
            context.get_engine, context.get_job_id = lambda: engine, lambda: "job"
            peer.get_identity_name = lambda: client
            context.set_peer_context(peer)
            message.set_header(AppConstants.CURRENT_ROUND, 2)
            context.set_prop(FLContextKey.TASK_NAME, task)
            context.set_prop(FLContextKey.TASK_DATA, message)
            component.handle_event(EventType.AFTER_TASK_DATA_FILTER, context)
            return message.get_header(COHORT)

        drawn = draw(self.names[:20], 4, seed=0, round_=2)
        clients = [f"host-{i}" for i in (1, 2)] if simulated else self.names[:20]
        for client in clients:
            assert told(client) == (drawn if simulated else [name for name in drawn if name == client])
        assert told(clients[0], "another task") is None
        assert read_json_lines(tmp_path / COHORTS) == [{"task": "train", "round": 2, "sites": drawn}]


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_control_group(tmp_path, version):
    group = tmp_path / ("memory/batch/job" if version == 1 else "batch/job")
    group.mkdir(parents=True)
    limit, used, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    (group.parent / limit).write_text("300000000\n")  # a limit of the group above holds, too
    (group.parent / used).write_text("250000000\n")
    (group.parent / "memory.stat").write_text(f"active_file 1\n{cached} 20000000\n")
    (group / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    (group / used).write_text("1\n")
    (group / "memory.stat").write_text("")
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/batch/job\n3:cpu:/other\n" if version == 1 else "0::/batch/job\n")
    assert machine.free_memory(tmp_path, own) == 70e6


def test_without_a_control_group_free_memory_is_the_machines(tmp_path):
    free = machine.free_memory(tmp_path, tmp_path / "missing")
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_the_number_of_hosts_follows_from_cores_memory_and_sites(options, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "free_memory", lambda: 100e9)
    assert machine.n_hosts(options(n_clients=3)) == 3
    assert machine.n_hosts(options(n_clients=100)) == 8
    assert machine.n_hosts(options(n_clients=100, n_hosts=20)) == 20
    assert machine.n_hosts(options(n_clients=100, env="poc")) == 100
    monkeypatch.setattr(machine, "free_memory", lambda: 1.6e9 if machine.FORKS else 4e9)
    assert machine.n_hosts(options(n_clients=100)) == 3


def test_threads_do_not_follow_from_the_number_of_hosts(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [machine.n_threads(n) for n in (1, 2, 8, 100)] == [8, 4, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert machine.n_threads(100) == 5


@pytest.fixture(scope="module")
def simulations(tmp_path_factory, shared_cache):
    """simulations(*flags): the results.json of a run on digits, with its screen, log and folder."""
    project = Project(tmp_path_factory.mktemp("hosts") / "project")
    known: dict[tuple, SimpleNamespace] = {}

    def simulate(*flags: str) -> SimpleNamespace:
        if flags not in known:
            name = f"run{len(known)}"
            done = project.run("job.py", "--dataset", "digits", *flags, "--name", name)
            assert done.returncode == 0, done.stderr
            folder = project.folder / "runs" / name
            result = json.loads((folder / "results.json").read_text())
            known[flags] = SimpleNamespace(result=result, screen=done.stdout, folder=folder, name=name)
        return known[flags]

    return simulate


SIX = ("--n_clients", "6")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold", "fedopt"])
@pytest.mark.parametrize("other", [("--n_hosts", "2"), ("--n_hosts", "3"), ("--n_hosts", "2", "--env", "poc")])
def test_any_number_of_hosts_gives_the_same_bits(simulations, algorithm, other):
    one = simulations(*SIX, "--algorithm", algorithm, "--n_hosts", "1").result
    several = simulations(*SIX, "--algorithm", algorithm, *other).result
    assert several["sha256"] == one["sha256"]
    assert [several[key] for key in ("rounds", "test", "best")] == [one[key] for key in ("rounds", "test", "best")]


@pytest.mark.slow
def test_a_process_for_each_site_gives_the_same_bits_as_one_for_all(simulations):
    one = simulations(*SIX, "--algorithm", "fedavg", "--n_hosts", "1").result
    six = simulations(*SIX, "--algorithm", "fedavg", "--n_hosts", "6").result
    assert six["sha256"] == one["sha256"]
    assert six["rounds"] == one["rounds"]


COHORT_FLAGS = ("--n_clients", "12", "--sites_per_round", "4", "--evaluate_sites", "5", "--num_rounds", "3")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedopt"])
def test_a_cohort_trains_in_each_round_and_a_sample_evaluates_the_final_model(simulations, algorithm):
    run = simulations(*COHORT_FLAGS, "--algorithm", algorithm, "--n_hosts", "2")
    assert "each round trains 4 random sites of 12\n" in run.screen
    assert "the final model is evaluated by 5 random sites of 12\n" in run.screen
    names = [f"site-{i}" for i in range(1, 13)]
    rounds = run.result["rounds"]
    assert rounds[0]["participants"] is None
    cohorts = [sorted(draw(names, 4, seed=0, round_=number)) for number in range(3)]
    assert [sorted(entry["participants"]) for entry in rounds[1:]] == cohorts
    assert [sorted(entry["sites"]) for entry in rounds[:-1]] == cohorts  # who trains in a round validates before it
    assert sorted(run.result["test"]["sites"]) == sorted(draw(names, 5, seed=0, round_=None))
    assert [entry["missing"] for entry in rounds] == [[]] * 4
    assert run.result["lost"] == []
    log = (run.folder / "log.txt").read_text()
    assert "--- train new model ---" in log and "--- test new model ---" not in log  # too many sites to look at each
    trained = [r for r in read_json_lines(run.folder / "audit.jsonl") if r["task"] == "train"]
    assert sorted(site for record in trained if record["round"] == 1 for site in record["sites"]) == cohorts[1]
    other = simulations(*COHORT_FLAGS, "--algorithm", algorithm, "--n_hosts", "3").result
    assert (other["sha256"], other["rounds"]) == (run.result["sha256"], rounds)


@pytest.mark.slow
def test_a_resumed_run_continues_the_series_of_cohorts(simulations):
    flags = ("--n_clients", "12", "--sites_per_round", "4")
    whole = simulations(*flags, "--num_rounds", "4").result
    first = simulations(*flags, "--num_rounds", "2")
    second = simulations("--resume", first.name, "--num_rounds", "2").result
    assert second["sites_per_round"] == 4
    assert second["sha256"] == whole["sha256"]


@pytest.mark.slow
def test_a_hosts_sites_are_known_one_by_one(simulations):
    """What a user can know of each site is the same as if each had a process of its own."""
    hosted, alone = (simulations(*SIX, "--algorithm", "fedavg", "--n_hosts", n) for n in ("2", "6"))
    assert hosted.result["images"] == alone.result["images"]
    assert set(hosted.result["timing"]) == {"host-1", "host-2"}
    left = []
    for run in (hosted, alone):
        records = read_json_lines(run.folder / "audit.jsonl")
        names = {
            (site, r["task"], r["round"], *(t["name"] for t in r["tensors"])) for r in records for site in r["sites"]
        }
        left.append(names)
    assert left[0] == left[1]
    assert {site for site, *_ in left[0]} == {f"site-{i}" for i in range(1, 7)}


@pytest.mark.slow
def test_tensorboard_has_the_curves_of_each_site(simulations):
    run = simulations("--n_clients", "4", "--n_hosts", "2", "--tracking", "tensorboard", "--num_rounds", "1")
    scalars = set(read_events(run.folder / "tensorboard")["host-2"])
    assert {"site-2/val/acc", "site-4/val/acc", "site-4/test/loss"} <= scalars
    assert not any(tag.startswith("site-1/") for tag in scalars)


BOOM = """        if site == "site-5" and round_ == 1:
            {what}
        print("--- train new model ---")
"""


@pytest.mark.slow
@pytest.mark.parametrize("env", ["sim", "poc"])
def test_a_site_that_fails_is_named_with_exception_and_line(project, env):
    project.replace(
        "client.py",
        '        print("--- train new model ---")\n',
        BOOM.format(what='raise ValueError("no such scanner")'),
    )
    run = project.run("job.py", "--dataset", "digits", *SIX, "--n_hosts", "2", "--env", env, "--name", "boom")
    assert run.returncode == 1
    first = run.stderr.splitlines()[0]
    assert first.startswith("job.py: site-5 failed: ValueError: no such scanner (client.py, line ")
    assert project.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("env", ["sim", "poc"])
def test_a_host_that_dies_is_named_with_its_site(project, env):
    kill = f"import os; os.kill(os.getpid(), {signal.SIGKILL:d})"
    project.replace("client.py", '        print("--- train new model ---")\n', BOOM.format(what=kill))
    run = project.run("job.py", "--dataset", "digits", *SIX, "--n_hosts", "2", "--env", env, "--name", "dead")
    assert run.returncode == 1
    assert run.stderr.splitlines()[0] == "job.py: host-1 died at site-5: its process is gone"
    assert project.processes() == []


WITHOUT_FORKS = """
import runpy, sys
import federation.launch.machine
federation.launch.machine.FORKS = False
if __name__ == "__main__":
    runpy.run_path("job.py", run_name="__main__")
"""


@pytest.mark.slow
def test_processes_that_are_not_forks_give_the_same_bits(project):
    """As on macOS and with CUDA, where forking is unsafe."""
    (project.folder / "without_forks.py").write_text(WITHOUT_FORKS)
    flags = ("--dataset", "digits", "--n_clients", "3", "--n_hosts", "2", "--num_rounds", "1")
    for program in ("job.py", "without_forks.py"):
        run = project.run(program, *flags, "--name", program.removesuffix(".py"))
        assert run.returncode == 0, run.stderr
    forked, spawned = (
        json.loads((project.folder / "runs" / name / "results.json").read_text()) for name in ("job", "without_forks")
    )
    assert spawned["sha256"] == forked["sha256"]
    assert project.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold", "fedopt"])
def test_debug_runs_one_task_in_this_process_and_leaves_nothing(project, algorithm):
    project.replace(
        "client.py",
        '        print("--- train new model ---")\n',
        '        import os\n        print("process", os.getpid())\n        print("--- train new model ---")\n',
    )
    process = project.start("job.py", "--dataset", "digits", "--algorithm", algorithm, "--debug", "site-2")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert f"process {process.pid}\n" in out
    assert "[Current Round=0, Site = site-2]" in out
    assert "site-2 would send 10 tensors, and of the model it received: val_acc 0." in out
    assert not (project.folder / "runs").exists()
    assert not list(project.folder.glob("**/options.json"))


@pytest.mark.slow
def test_a_breakpoint_stops_in_the_users_code(project):
    project.replace("model.py", "        x, labels = batch\n", "        x, labels = batch\n        breakpoint()\n")
    done = subprocess.run(
        [sys.executable, "job.py", "--dataset", "digits", "--debug", "site-1"],
        cwd=project.folder,
        input="p 'shape', tuple(x.shape)\nq\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "('shape', (" in done.stdout
    assert "model.py(" in done.stdout
    assert done.returncode == 0
