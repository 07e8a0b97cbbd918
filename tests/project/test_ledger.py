"""The site's own ledger: what left a site, in a chain of lines that shows every later change."""

import json
import multiprocessing
import resource
import subprocess

import pytest

from federation.errors import UserError
from federation.protocol import LEDGER_VARIABLE
from federation.site import ledger
from federation.site.ledger import append, code_hash, place, read
from programs import data_error


@pytest.fixture
def file(tmp_path):
    """A ledger of four answers."""
    file = tmp_path / "ledger" / "site-1.jsonl"
    for number in range(4):
        append(file, {"job": "job", "round": number}, durable=True)
    return file


def test_a_ledger_keeps_what_was_appended_in_order(file):
    assert [record["round"] for record in read(file)] == [0, 1, 2, 3]
    assert read(file.with_name("site-2.jsonl")) == []


def test_only_the_sites_user_can_read_it(file):
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


CHANGES = {  # what was done to the lines -> the line at which it shows
    "a changed number": (lambda lines: [lines[0], lines[1].replace(b'"round": 1', b'"round": 9'), *lines[2:]], 3),
    "a line removed": (lambda lines: [lines[0], *lines[2:]], 2),
    "the first line removed": (lambda lines: lines[1:], 1),
    "two lines swapped": (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),
    "a line inserted": (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
    "a line that is not JSON": (lambda lines: [*lines[:3], b"{}\n", lines[3]], 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_breaks_the_chain(file, change):
    edit, line = CHANGES[change]
    file.write_bytes(b"".join(edit(file.read_bytes().splitlines(keepends=True))))
    assert f"site-1.jsonl, line {line}: the chain is broken" in data_error(read, file)


def test_a_line_removed_from_the_end_changes_the_last_hash(file):
    """The chain alone cannot show it: whoever has noted the last hash can."""
    lines = file.read_bytes().splitlines(keepends=True)
    noted = ledger.digest(lines[-1].rstrip())
    file.write_bytes(b"".join(lines[:-1]))
    assert len(read(file)) == 3
    append(file, {"job": "other"}, durable=False)
    assert noted.encode() not in file.read_bytes()


def test_nothing_is_appended_to_an_incomplete_line(file):
    file.write_bytes(file.read_bytes()[:-5])
    before = file.read_bytes()
    assert "is incomplete" in data_error(append, file, {"job": "next"}, True)
    assert "line 4: the line is incomplete" in data_error(read, file)
    assert file.read_bytes() == before


def test_a_full_disk_leaves_the_ledger_as_it_was(file):
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="no space left"):
            append(file, {"job": "next"}, durable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before


def append_some(file):
    for number in range(50):
        append(file, {"round": number}, durable=False)


def test_jobs_that_run_at_the_same_time_share_one_chain(tmp_path):
    file = tmp_path / "site-1.jsonl"
    jobs = [multiprocessing.get_context("fork").Process(target=append_some, args=(file,)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(read(file)) == 200


def test_a_ledger_lies_in_the_workspace_or_where_the_site_wants_it(tmp_path, monkeypatch):
    assert place(tmp_path, "site-1", None) == tmp_path / "ledger" / "site-1.jsonl"
    monkeypatch.setenv(LEDGER_VARIABLE, str(tmp_path / "elsewhere"))
    assert place(tmp_path, "site-1", str(tmp_path / "images")) == tmp_path / "elsewhere" / "site-1.jsonl"


def test_a_ledger_is_never_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(LEDGER_VARIABLE, str(tmp_path / "images" / "ledger"))
    with pytest.raises(UserError, match="inside the data folder"):
        place(tmp_path, "site-1", str(tmp_path / "images"))


def test_the_hash_of_the_code_is_what_coreutils_say(tmp_path):
    for name in ("custom/client.py", "custom/federation/site/host.py", "config/config_fed_client.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (command,) = [line.strip(" `.") for line in (code_hash.__doc__ or "").splitlines() if "sha256sum" in line]
    said = subprocess.run(
        ["sh", "-c", command.replace("cd app", f"cd {tmp_path}")], capture_output=True, text=True, check=True
    ).stdout
    before = code_hash(tmp_path)
    assert said.split()[0] == before
    (tmp_path / "custom" / "client.pyc").write_text("compiled")
    assert code_hash(tmp_path) == before
    (tmp_path / "custom" / "client.py").write_text("something else")
    assert code_hash(tmp_path) != before


def test_a_command_verifies_and_prints_the_ledger(project, file):
    answer = {"job": "a1b2", "submitter": "lead@example.com", "code": "c0de", "task": "train", "curves": []}
    tensors = [{"name": "conv.weight", "shape": [6, 3], "dtype": "float32", "bytes": 72}]
    file.unlink()
    for number in range(3):
        plan = {"noise": 1.0, "rate": 0.1, "steps": 9, "epsilon": number + 0.5, "delta": 1e-4, "seeded": False}
        left = {"tensors": tensors, "metrics": ["val_acc"], "meta": {"val_images": "int"}, "dp": plan}
        append(file, {**answer, "round": number, **left}, durable=False)
    shown = project.run("ledger.py", str(file.parent))
    assert shown.returncode == 0, shown.stderr
    assert "3 answers, chain intact" in shown.stdout
    assert ledger.digest(file.read_bytes().splitlines()[-1]) in shown.stdout
    assert "Job a1b2 of lead@example.com" in shown.stdout and "code c0de" in shown.stdout
    assert "all weights that have left: ε = 2.50 at δ = 1.0e-04." in shown.stdout
    for text in ("1-3", "216", "val_acc", "val_images", "conv.weight", "[6, 3]"):
        assert text in shown.stdout
    file.write_text(file.read_text().replace("val_acc", "val_loss", 1))
    refused = project.run("ledger.py", str(file))
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "line 2: the chain is broken" in refused.stderr


@pytest.mark.slow
def test_a_run_leaves_a_ledger_per_site_and_a_resumed_run_continues_it(project):
    run = ("job.py", "--n_clients", "3", "--n_hosts", "2", "--num_rounds", "1")
    first = project.run(*run, "--name", "first")
    second = project.run("job.py", "--resume", "first", "--num_rounds", "1", "--name", "second")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    runs = project.folder / "runs"
    for site in ("site-1", "site-2", "site-3"):
        before, after = (read(runs / name / "ledger" / f"{site}.jsonl") for name in ("first", "second"))
        assert [(record["task"], record["round"]) for record in before] == [("train", 0), ("validate", None)]
        assert after[:2] == before and [record["round"] for record in after[2:]] == [1, None]
        code = {code_hash(runs / name / "job" / "app") for name in ("first", "second")}
        assert {record["code"] for record in after} == code
    audit = [json.loads(line) for line in (runs / "first" / "audit.jsonl").read_text().splitlines()]
    received = next(record for record in audit if record["task"] == "train")
    assert before[0]["tensors"] == received["tensors"]
    assert set(before[0]["metrics"]) == set(received["metrics"])
