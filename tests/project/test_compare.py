"""compare.py on digits, in this process: what it trains on, what it measures, what it rejects."""

import dataclasses
import json
import math
import re
import signal
import sys

import numpy as np
import pytest

import compare
from federation.errors import exit_code
from federation.launch.distribution import describe
from federation.run import schema
from federation.run.folder import RunFolder

ACCURACY = 0.5  # of the global model in these tests


@pytest.fixture
def run(tmp_path, monkeypatch, options):
    """run(**changes): the folder of a run, with the files that job.py writes, and its result."""
    monkeypatch.setattr("federation.run.folder.RUNS", tmp_path)

    def make(**changes):
        made = options(**{"num_rounds": 1, "local_epochs": 1, "learning_rate": 0.01, **changes})
        folder = tmp_path / "first"
        folder.mkdir()
        distribution = describe(made)
        (folder / "partition.json").write_text(json.dumps(dataclasses.asdict(distribution)))
        sites = {
            site: {"accuracy": ACCURACY, "loss": 1.0, "images": len(own["test"])}
            for site, own in distribution.sites.items()
        }
        result = {
            **made.of_run(),
            "device": "cpu",
            "rounds": [{"round": number, "accuracy": ACCURACY, "sites": {}} for number in range(made.num_rounds + 1)],
            "test": {"accuracy": ACCURACY, "sites": sites},
        }
        (folder / "results.json").write_text(json.dumps(result))
        return folder, schema.read(RunFolder(folder))

    return make


@pytest.fixture
def program(monkeypatch, capsys):
    """program(*arguments): (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        return exit_code("compare.py", compare.main), *capsys.readouterr()

    return call


def test_a_run_gets_a_table_a_file_and_a_plot(run, program):
    folder, _ = run(n_clients=3)
    code, out, err = program("first")
    assert (code, err) == (0, "")
    assert [re.sub(r"\d+ s$", "", line) for line in out.splitlines()[:4]] == [
        "centralized: trained on 1149 images, epochs: 1, steps: 72, ",
        "site-1 alone: trained on 383 images, epochs: 1, steps: 24, ",
        "site-2 alone: trained on 383 images, epochs: 1, steps: 24, ",
        "site-3 alone: trained on 383 images, epochs: 1, steps: 24, ",
    ]
    rows = json.loads((folder / "compare.json").read_text())["rows"]
    for key, title in schema.COMPARED.items():
        values = [rows[key]["all"], *rows[key]["sites"].values()]
        line = next(line for line in out.splitlines() if line.startswith(f"{title}  "))
        assert line.removeprefix(title).split() == [f"{value:.3f}" for value in values]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"Federated minus centralized: {ACCURACY - rows['centralized']['all']:+.3f}" in out


def test_results_are_reproducible(run):
    folder, result = run()
    assert compare.compare(RunFolder(folder), result) == compare.compare(RunFolder(folder), result)


def test_every_mean_is_weighted_like_the_federated_one(run):
    """By test images, so that each pooled test image counts once."""
    folder, result = run(n_clients=3, partition="dirichlet", alpha=0.3)
    images = {site: test["images"] for site, test in result["test"]["sites"].items()}
    assert len(set(images.values())) > 1
    rows = compare.compare(RunFolder(folder), result)["rows"]
    for key in ("centralized", "alone"):
        values = [rows[key]["sites"][site] for site in images]
        assert rows[key]["all"] == pytest.approx(np.average(values, weights=list(images.values())))
    assert rows["alone_on_all"]["all"] == pytest.approx(np.mean(list(rows["alone_on_all"]["sites"].values())))
    assert rows["federated"] == {"all": ACCURACY, "sites": dict.fromkeys(images, ACCURACY)}


def test_a_site_alone_learns_only_its_own_classes(run):
    """With few classes each, a site does well on its own test images and poorly on all."""
    folder, result = run(partition="shards", shards_per_site=1, local_epochs=5)
    rows = compare.compare(RunFolder(folder), result)["rows"]
    assert rows["alone"]["all"] > rows["alone_on_all"]["all"] + 0.2
    assert max(rows["alone_on_all"]["sites"].values()) < 0.65  # five or six of ten classes


def test_the_budget_is_rounds_times_local_epochs(run):
    folder, result = run(num_rounds=2, local_epochs=1)
    turned = {**result, "num_rounds": 1, "local_epochs": 2, "rounds": result["rounds"][:2]}
    assert compare.compare(RunFolder(folder), result) == compare.compare(RunFolder(folder), turned)


def test_only_finished_rounds_count(run):
    folder, result = run(num_rounds=3)
    assert compare.compare(RunFolder(folder), {**result, "rounds": result["rounds"][:2]})["epochs"] == 1


def test_the_budget_includes_the_runs_that_were_resumed(run):
    """One epoch, then three: the runs can differ."""
    stage = {"batch_size": 16, "learning_rate": 0.01}
    stages = [{"rounds": 1, "local_epochs": 1, **stage}, {"rounds": 1, "local_epochs": 3, **stage}]
    folder, result = run(num_rounds=2, local_epochs=3)
    assert compare.compare(RunFolder(folder), {**result, "stages": stages})["epochs"] == 4


def test_a_run_resumed_with_a_different_learning_rate_is_rejected(run, program):
    folder, result = run()
    stage = {"rounds": 1, "local_epochs": 1, "batch_size": 16}
    stages = [{**stage, "learning_rate": 0.01}, {**stage, "learning_rate": 0.1}]
    (folder / "results.json").write_text(json.dumps({**result, "stages": stages}))
    message = "runs/first was resumed with a different --learning_rate (0.01, 0.1): choose a run that kept it"
    assert message in rejected(program, folder, "first")


def test_the_baselines_use_as_many_threads_as_the_sites(run, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    folder, result = run(n_clients=1)
    compare.compare(RunFolder(folder), {**result, "threads": 3})
    assert asked == [3]


def test_the_baselines_respect_max_batches(run, capsys):
    folder, result = run()
    compare.compare(RunFolder(folder), {**result, "max_batches": 4})
    assert "centralized: trained on 1149 images, epochs: 1, steps: 4, " in capsys.readouterr().out


def test_a_site_without_test_images_has_a_dash(capsys):
    def row(first, all_sites):
        return {"all": all_sites, "sites": {"site-1": first, "site-2": None}}

    rows = {key: row(0.5, 0.5) for key in schema.COMPARED}
    compare.show({"epochs": 1, "model_class": "LitNet", "rows": rows})
    out = capsys.readouterr().out
    assert re.search(r"^federated +0\.500 +0\.500 +-$", out, re.MULTILINE)
    assert "0 of 1 sites gain" in out


def comparison_of(n_sites):
    row = {"all": 0.5, "sites": {f"site-{i}": 1 - i / 1000 for i in range(1, n_sites + 1)}}
    return {"run": "first", "epochs": 1, "model_class": "LitNet", "rows": dict.fromkeys(schema.COMPARED, row)}


@pytest.mark.parametrize("n_sites", [2, 6, 21, 1001])
def test_its_table_has_each_site_or_quantiles(capsys, monkeypatch, n_sites):
    monkeypatch.setenv("COLUMNS", "80")
    compare.show(comparison_of(n_sites))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    each = {i: f"{1 - i / 1000:.3f}" for i in range(1, n_sites + 1)}
    if n_sites <= 6:
        assert lines[2].split() == ["all", "sites", *(f"site-{i}" for i in each)]
        expected = ["0.500", *each.values()]
    else:
        assert lines[2].split()[:3] == ["mean", "sites", "min"]
        low, median, high = (each[n_sites - math.ceil(share * n_sites) + 1] for share in (0.1, 0.5, 0.9))
        expected = ["0.500", f"{n_sites:,}", each[n_sites], low, median, high, each[1]]
    for title, line in zip(schema.COMPARED.values(), lines[4:8], strict=True):
        assert line.removeprefix(title).split() == expected


@pytest.mark.parametrize("n_sites", [8, 1000])
def test_its_plot_has_no_overlapping_labels(tmp_path, monkeypatch, n_sites):
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig

    def note_and_save(figure, *arguments, **more):
        figures.append(figure)
        save(figure, *arguments, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note_and_save)
    comparison = comparison_of(n_sites)
    comparison["rows"]["centralized"]["sites"]["site-4"] = 1.0  # the bar reaches the top
    compare.plot(comparison, tmp_path / "plot.png")
    figures[0].draw_without_rendering()  # with the figure's own resolution again
    (axes,) = figures[0].axes
    boxes = [text.get_window_extent() for text in (axes.title, *axes.texts, *axes.get_xticklabels()) if text.get_text()]
    assert len(boxes) == {8: 4 * 9 + 9, 1000: 4}[n_sites] + 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_tested_sample_is_compared_with_the_same_sites(run):
    folder, result = run(n_clients=3)
    test = {**result["test"], "sites": {"site-2": result["test"]["sites"]["site-2"]}}
    compared = compare.compare(RunFolder(folder), {**result, "test": test})
    assert all(list(row["sites"]) == ["site-2"] for row in compared["rows"].values())
    compare.show(compared)


def test_few_of_many_sites_are_listed_while_they_train(run, capsys):
    folder, result = run(n_clients=10)
    compare.compare(RunFolder(folder), {**result, "max_batches": 1})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:10]] == [
        *("centralized", *(f"site-{i} alone" for i in range(1, 9)), "and 2 more sites alone")
    ]


def test_its_plot_shows_sites_without_test_images(tmp_path):
    rows = {key: {"all": 1.0, "sites": {"site-1": 1.0, "site-2": None}} for key in schema.COMPARED}
    compare.plot({"run": "first", "epochs": 1, "model_class": "LitNet", "rows": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_ctrl_c_during_training_leaves_nothing_behind(run, program, monkeypatch):
    import model

    def interrupted(*_):
        raise KeyboardInterrupt

    folder, _ = run()
    monkeypatch.setattr(model.LitNet, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, _, err = program("first")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert (code, err) == (130, "\ncompare.py: stopped; no process is left\n")
    assert not list(folder.glob("compare.*"))


def rejected(program, folder, *arguments) -> str:
    code, out, err = program(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"compare.py: .*\n", err)
    assert not folder.exists() or not list(folder.glob("compare.*"))
    return err


def test_a_missing_run_is_rejected(run, program, tmp_path):
    assert "latest/results.json does not exist: finish a run with python job.py" in rejected(program, tmp_path)
    assert "other/results.json does not exist" in rejected(program, tmp_path, "other")


def test_a_run_of_real_sites_is_rejected(run, program):
    folder, result = run()
    (folder / "results.json").write_text(json.dumps({**result, "env": "prod"}))
    assert "runs/first used images that stay at its sites" in rejected(program, folder, "first")


def test_an_unfinished_run_is_rejected(run, program):
    folder, _ = run()
    (folder / "results.json").unlink()
    assert "first/results.json does not exist: finish a run with python job.py" in rejected(
        program, folder, "runs/first/"
    )


def test_a_run_whose_images_are_gone_is_rejected(run, program, tmp_path):
    folder, result = run()
    (folder / "results.json").write_text(json.dumps({**result, "dataset": "image_folder"}))
    gone = str(tmp_path / "gone")
    assert gone in rejected(program, folder, "first", "--data_root", gone)


def test_images_are_expected_where_the_run_had_them(run, program, tmp_path):
    folder, result = run()
    there = str(tmp_path / "there")
    changed = {**result, "dataset": "image_folder", "data_root": there}
    (folder / "results.json").write_text(json.dumps(changed))
    assert there in rejected(program, folder, "first")


def test_a_run_whose_images_have_changed_is_rejected(run, program):
    folder, _ = run()
    partition = json.loads((folder / "partition.json").read_text())
    partition["sites"]["site-1"]["train"].pop()
    (folder / "partition.json").write_text(json.dumps(partition))
    assert "the images differ from those of runs/first" in rejected(program, folder, "first")


def test_a_run_of_a_deleted_model_is_rejected(run, program):
    folder, result = run()
    (folder / "results.json").write_text(json.dumps({**result, "model_class": "LitOld"}))
    assert "LitOld, which is no longer in model.py" in rejected(program, folder, "first")


def test_a_wrong_flag_is_rejected(program, tmp_path):
    assert "python compare.py --help lists the flags" in rejected(program, tmp_path, "--rounds", "2")
