"""job.py's command line: what it rejects, how fast it responds, what it prints."""

import errno
import json
import os
import re
import signal
import sys

import pytest

import settings
from federation.errors import UserError, exit_code
from federation.launch import options as command_line
from federation.launch.model_file import model_names
from federation.run import folder
from federation.run.folder import RunFolder
from federation.site import catalog
from job import main
from programs import names_in, on_a_terminal

BAD_FLAGS = {
    "no client": (["--n_clients", "0"], "Invalid value for '--n_clients': 0 is not in the range x>=1"),
    "no round": (["--num_rounds", "0"], "Invalid value for '--num_rounds': 0 is not in the range x>=1"),
    "no image in a batch": (["--batch_size", "0"], "Invalid value for '--batch_size': 0 is not in the range x>=1"),
    "no epoch": (["--local_epochs", "-1"], "Invalid value for '--local_epochs': -1 is not in the range x>=1"),
    "no shard": (["--shards_per_site", "0"], "Invalid value for '--shards_per_site': 0 is not in the range x>=1"),
    "tiny images": (["--image_size", "8"], "Invalid value for '--image_size': 8 is not in the range x>=16"),
    "alpha of zero": (["--alpha", "0"], "Invalid value for '--alpha': 0.0 is not in the range x>0"),
    "infinite alpha": (["--alpha", "inf"], "--alpha is inf: it must be a finite number"),
    "no learning": (["--learning_rate", "nan"], "--learning_rate is nan: it must be a finite number"),
    "a negative seed": (["--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x<=4294967295"),
    "an unknown data set": (["--dataset", "imagenet"], "Invalid value for '--dataset': 'imagenet' is not one of"),
    "an unknown partition": (["--partition", "fair"], "Invalid value for '--partition': 'fair' is not one of"),
    "an unknown tracker": (["--tracking", "paper"], "Invalid value for '--tracking': 'paper' is not one of"),
    "an unknown model": (["--model", "Net"], "--model is 'Net': model.py has LitNet, LitResNet"),
    "an unknown flag": (["--rounds", "2"], "No such option"),
    "a misspelled flag": (["--learning_rat", "1"], "--learning_rate"),  # the closest flag is suggested
    "a word for a number": (["--n_clients", "two"], "Invalid value for '--n_clients': 'two' is not a valid integer"),
    "a path for a name": (["--name", "../x"], "--name is '../x': use only letters, digits"),
    "a name that is too long": (["--name", "a" * 101], "--name has 101 characters: it must have 100 or fewer"),
    "a reserved name": (
        ["--name", "latest"],
        "--name latest is reserved for the link to the newest run: choose another name",
    ),
    "a replaced run without a name": (["--overwrite"], "--overwrite replaces a run: name it with --name"),
    "a schedule that ends before the run": (
        ["--num_rounds", "5", "--total_rounds", "4"],
        "--total_rounds is 4: it must be 5 or more, because this run ends there",
    ),
    "a partition of images that each site has": (
        ["--data_root", "/nowhere/{site}", "--partition", "iid"],
        "--partition iid splits one data set, but with {site}, each site has its own",
    ),
}


@pytest.mark.parametrize("fault", BAD_FLAGS)
def test_an_invalid_flag_is_rejected_in_one_line(project, fault):
    flags, message = BAD_FLAGS[fault]
    run = project.run("job.py", *flags)
    assert run.returncode == 2
    assert run.stdout == ""
    assert re.fullmatch(r"job.py: .*\n", run.stderr)
    assert message in run.stderr
    assert not (project.folder / "runs").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"admin": 7}', '{"admin": {"name": "x"}}'])
def test_a_startup_kit_without_a_submitter_is_rejected(project, tmp_path, text):
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    (tmp_path / "kit" / "startup" / "fed_admin.json").write_text(text, encoding="utf-8")
    run = project.run("job.py", "--env", "prod", "--dataset", "digits", "--startup_kit", str(tmp_path / "kit"))
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"job.py: --startup_kit: .*/fed_admin.json does not name a submitter: .*\n", run.stderr)
    assert not (project.folder / "runs").exists()


def test_an_existing_name_is_rejected(project):
    (project.folder / "runs" / "first").mkdir(parents=True)
    run = project.run("job.py", "--name", "first")
    assert (run.returncode, run.stderr) == (
        2,
        "job.py: runs/first exists: choose another --name, or add --overwrite to replace it\n",
    )


def test_overwriting_a_run_removes_all_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "RUNS", tmp_path / "runs")
    (RunFolder.create("first").path / "old.txt").touch()
    with pytest.raises(UserError, match="--overwrite"):
        RunFolder.create("first")
    assert list(RunFolder.create("first", overwrite=True).path.iterdir()) == []


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """federate() without a federation: it returns a recorded result at once."""
    collected: dict = {
        "rounds": [
            {
                "round": k,
                "accuracy": 0.5,
                "sites": {"site-1": 0.5},
                "loss": 1.0,
                "losses": {"site-1": 1.0},
                "missing": [],
            }
            for k in (0, 1)
        ],
        "test": {"accuracy": 0.5, "loss": 1.0, "sites": {"site-1": {"accuracy": 0.5, "images": 3}}, "worst": "site-1"},
        **{"best": None, "lost": [], "rejected": [], "stopped_early": False, "model": "final.pt", "counts": {}},
    }
    import job as program
    from federation.launch import simulator
    from federation.run import outcome

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(folder, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(program, "write_job", lambda *_: None)
    monkeypatch.setattr(simulator, "simulate", lambda *_: None)
    monkeypatch.setattr(outcome, "collect", lambda *_: dict(collected))
    options, start = command_line.parse(["--dataset", "digits", "--n_clients", "1", "--num_rounds", "1"])
    return program, (options, program.get_data(options), start)


def test_results_are_written_before_anything_is_shown(recorded, monkeypatch):
    """Even if the output fails, the result is saved, and the run is the newest."""
    program, arguments = recorded

    def fail(result):
        raise RuntimeError("the screen is broken")

    monkeypatch.setattr("results.show", fail)
    run = RunFolder.create("first")
    with pytest.raises(RuntimeError, match="the screen is broken"):
        program.federate(*arguments, run)
    assert json.loads(run.results.read_text())["test"]["accuracy"] == 0.5
    assert (run.path.parent / "latest").resolve() == run.path.resolve()


def test_a_full_disk_at_the_end_is_reported_in_one_line(recorded, monkeypatch):
    program, arguments = recorded

    def full(source, target):
        if str(target).endswith("results.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    run = RunFolder.create("first")
    with pytest.raises(program.RunError) as failure:
        program.federate(*arguments, run)
    assert str(failure.value) == f"cannot write the results into {run.path}: No space left on device"
    assert sorted(path.name for path in run.path.iterdir()) == ["partition.json", "start.json"]
    assert not (run.path.parent / "latest").exists()


def test_a_run_that_could_not_start_leaves_no_folder(recorded, monkeypatch):
    program, arguments = recorded

    def broken(*_):
        raise TypeError("a program error")

    monkeypatch.setattr(program, "write_job", broken)
    run = RunFolder.create("first")
    with pytest.raises(TypeError):
        program.federate(*arguments, run)
    assert not run.path.exists()


DATA_FAULTS = {
    "more clients than images": (["--dataset", "digits", "--n_clients", "1000"], "1437 training images are too few"),
    "an impossible Dirichlet draw": (
        ["--dataset", "digits", "--n_clients", "144", "--partition", "dirichlet"],
        "no Dirichlet draw with alpha 0.5 gives each of 144 sites 10 of the 1437 training images",
    ),
    "no folder of images": (["--dataset", "image_folder"], "image_folder needs a folder"),
    "a folder that is not there": (["--dataset", "image_folder", "--data_root", "/nowhere"], "/nowhere"),
}


@pytest.fixture
def job(monkeypatch, tmp_path, capsys):
    """Run job.py in this process, which has done the slow imports: (exit code, standard error)."""
    monkeypatch.setattr("federation.run.folder.RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["job.py", *flags])
        return exit_code("job.py", main), capsys.readouterr().err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_unusable_data_is_rejected_in_one_line(job, fault):
    flags, message = DATA_FAULTS[fault]
    code, error = job(*flags)
    assert code == 2
    assert re.fullmatch(r"job.py: .*\n", error)
    assert message in error


def test_a_failed_download_says_what_to_do(job, monkeypatch):
    for name in ("FL_DATA_MIRROR", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    code, error = job("--dataset", "cifar10")
    assert code == 2
    *progress, last = error.splitlines()
    assert progress and not any("Traceback" in line for line in progress)
    for hint in ("127.0.0.1:9: ", "www.cs.toronto.edu: ", "./prepare_data.sh", "FL_DATA_MIRROR", "--dataset digits"):
        assert hint in last
    assert "copy cifar-10-python.tar.gz (MD5 c58f30108f718f92721af3b95e74349a) to " in last


def test_the_choices_of_dataset_are_those_of_the_catalog():
    assert set(settings.DATASETS) == {*catalog.SOURCES, "image_folder"}


def test_help_lists_every_flag_with_its_default(project):
    run = project.run("job.py", "--help")
    assert run.returncode == 0
    for flag in ("--n_clients", "--num_rounds", "--partition", "--gpu / --no-gpu", "--verbose", "--data_root"):
        assert flag in run.stdout
    assert "[default: 16; x>=1]" in run.stdout
    groups = [line for line in run.stdout.splitlines() if re.fullmatch(r"\w.*:", line)]
    assert groups[:7] == ["Data:", "Training:", "Algorithm:", "Simulation:", "Real sites:", "Privacy:", "Output:"]


@pytest.mark.parametrize("flags", [["--help"], ["--n_clients", "0"]], ids=["help", "an invalid flag"])
def test_help_and_errors_need_no_heavy_imports(project, flags):
    heavy = "{'torch', 'numpy', 'nvflare', 'pytorch_lightning', 'rich', 'sklearn'}"
    program = (
        "import contextlib, sys\n"
        "import job\n"
        "from federation.errors import UserError\n"
        f"sys.argv = ['job.py', *{flags!r}]\n"
        "with contextlib.suppress(SystemExit, UserError):\n"
        "    job.main()\n"
        f"print('heavy:', sorted({heavy} & set(sys.modules)))\n"
    )
    assert "heavy: []" in project.run("-c", program).stdout


def test_without_nvflare_it_names_the_interpreter_to_use(project):
    run = project.run("-S", "job.py")  # -S: without installed packages
    assert run.returncode == 2
    assert "python3 install.py" in run.stderr
    own = project.folder / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert "use .venv/bin/python job.py" in project.run("-S", "job.py").stderr


@pytest.mark.parametrize("name", ["my project", "Ann's", 'so "called"', "back\\slash", "#1"])
def test_a_path_that_nvflare_does_not_support_is_rejected(project, name):
    project.folder = project.folder.rename(project.folder.with_name(name))
    run = project.run("job.py", "--dataset", "digits")
    assert run.returncode == 2
    assert re.fullmatch(r"job.py: NVFlare does not run in paths with spaces, quotes, .*\n", run.stderr)
    assert not (project.folder / "runs").exists()


@pytest.mark.parametrize("name", ["a%&;(){}$b", "a:,[]*?`b", "a!~=+@^|<>b", "aé猫b"])
def test_a_path_with_other_characters_is_accepted(monkeypatch, name):
    monkeypatch.setattr(command_line, "PROJECT", command_line.PROJECT.with_name(name))
    monkeypatch.setattr(command_line, "model_names", lambda file: ["LitNet"])  # the folder does not exist
    command_line.parse([])


def test_prepare_data_prepares_the_data_and_stops(project):
    run = project.run(
        "-c",
        "import subprocess; subprocess.run(['./prepare_data.sh', '--dataset', 'digits'], check=True)",
        PYTHON=sys.executable,
    )
    assert (run.returncode, run.stdout) == (0, "digits is ready\n")
    assert not (project.folder / "runs").exists()
    assert os.listdir(os.environ["XDG_CACHE_HOME"])


def test_a_syntax_error_in_model_py_is_rejected(project):
    project.replace("model.py", "class LitNet(LightningModule):", "class LitNet(LightningModule:")
    run = project.run("job.py", "--dataset", "digits")
    assert run.returncode == 2
    assert re.fullmatch(r"job.py: model.py, line \d+: .*\n", run.stderr)


def test_on_a_terminal_a_long_error_breaks_between_words(project):
    command = ("job.py", "--dataset", "digits", "--n_clients", "900")
    run = project.run(*command)
    code, shown = on_a_terminal([sys.executable, *command], project.folder)
    assert code == run.returncode == 2
    assert run.stderr.count("\n") == 1 and len(run.stderr) > 80
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines) == run.stderr.strip()


UNREACHED = """
import sys
from federation.errors import RunError, exit_code
from federation.launch import prod as sites


def no_answer(*_):
    raise RunError("there is no server")


def not_connected(self, run, *_):
    self.run, self.patience = run, 0.0

sites.Server.__init__, sites.Server.ask = not_connected, no_answer
import job
sys.exit(exit_code("job.py", job.main))
"""


def files_in(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_equals_a_submitted_job_and_leaves_no_run(project, tmp_path):
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    (tmp_path / "kit" / "startup" / "fed_admin.json").write_text('{"admin": {"username": "ann@example.com"}}')
    flags = ["--env", "prod", "--dataset", "digits", "--tracking", "tensorboard", "--sites", "north,south"]
    before = names_in(project.folder)
    run = project.run("job.py", *flags, "--export", str(tmp_path / "job"))
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted({*names_in(project.folder)} - {"__pycache__"}) == before
    run = project.run("-c", UNREACHED, *flags, "--startup_kit", str(tmp_path / "kit"), "--name", "sent")
    assert run.returncode == 1 and "there is no server" in run.stderr
    exported = files_in(tmp_path / "job")
    assert exported == files_in(project.folder / "runs" / "sent" / "job")
    assert b"TBAnalyticsReceiver" in exported["app/config/config_fed_server.json"]


def test_an_export_that_cannot_be_written_is_rejected(project, tmp_path, permissions_bind):
    (tmp_path / "closed").mkdir(mode=0o500)
    flags = ["--env", "prod", "--dataset", "digits", "--export", str(tmp_path / "closed" / "job")]
    run = project.run("job.py", *flags)
    assert run.returncode == 2
    assert re.fullmatch(r"job.py: --export: cannot write .*/job: .*\n", run.stderr)


OTHERS = """
from collections import OrderedDict
import pytorch_lightning as pl
from pytorch_lightning import LightningModule as Base
from elsewhere import Mine, Other

class Table(OrderedDict): pass
class Layer(nn.Module): pass
class Reporter(pl.Callback): pass
class First(Base): pass
class Second(pl.LightningModule): pass
class Third(Mine): pass
class Fourth(Third): pass
class Fifth(Layer, Third): pass
class NoModel(Other): pass
"""
ELSEWHERE = """
from pytorch_lightning import LightningModule

class Mine(LightningModule): pass
class Other: pass
"""


@pytest.fixture
def with_others(project):
    """A project whose model.py has additional classes of many kinds."""
    (project.folder / "elsewhere.py").write_text(ELSEWHERE, encoding="utf-8")
    with (project.folder / "model.py").open("a", encoding="utf-8") as file:
        file.write(OTHERS)
    return project


def test_a_model_may_derive_from_an_imported_lightning_module(with_others):
    known = ["LitNet", "LitResNet", "First", "Second", "Third", "Fourth", "Fifth", "NoModel"]
    assert model_names(with_others.folder / "model.py") == known
    run = with_others.run("job.py", "--dataset", "digits", "--prepare_only", "--model", "Fifth")
    assert (run.returncode, run.stderr) == (0, "")


def test_a_class_that_is_not_a_lightning_module_is_rejected(with_others):
    run = with_others.run("job.py", "--dataset", "digits", "--model", "NoModel")
    assert (run.returncode, run.stdout) == (2, "")
    said = "--model is 'NoModel': that class in model.py does not derive from LightningModule"
    assert run.stderr == f"job.py: {said}\n"
    assert not (with_others.folder / "runs").exists()


def test_a_model_py_that_cannot_be_imported_is_rejected(with_others):
    (with_others.folder / "elsewhere.py").unlink()
    run = with_others.run("job.py", "--dataset", "digits")
    assert run.returncode == 2
    said = "cannot import model.py (ModuleNotFoundError: No module named 'elsewhere')"
    assert run.stderr == f"job.py: {said}: for the traceback, run  python -c 'import model'\n"
    assert not (with_others.folder / "runs").exists()


def test_results_py_without_a_run_says_what_to_do(project):
    run = project.run("results.py")
    assert run.returncode == 2
    assert run.stderr.endswith("does not exist: finish a run with python job.py\n")
