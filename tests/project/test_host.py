"""The executor: a task is a call of client.main for each site, and only control variates outlive it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import client
from federation.protocol import COHORT, DESCRIBED, LEFT_OUT, SITES
from federation.site.host import SiteHost
from federation.site.ledger import read
from federation.sums import AnswerSum
from settings import Options
from trainer import make_model


@pytest.fixture
def task(tmp_path, monkeypatch, options):
    """task(name, sites, **meta): what a host answers that has just been started, and the weights that it was given."""
    monkeypatch.setattr(client, "seed_everything", lambda *_, **__: None)
    context = FLContext()
    workspace = SimpleNamespace(get_log_root=lambda job_id: str(tmp_path), get_root_dir=lambda: str(tmp_path))
    context.get_engine = lambda: SimpleNamespace(get_workspace=lambda: workspace)
    context.get_job_id = lambda: "job"

    def run(name, *sites, cohort=None, **meta):
        algorithm = "fedopt" if meta.pop("difference", False) else "scaffold" if meta else "fedavg"
        few = {"partition": "shards", "n_clients": 2, "max_batches": 5, "algorithm": algorithm}
        monkeypatch.setattr(Options, "of_job", lambda: options(**few, n_hosts=3 - len(sites)))
        context.get_identity_name = lambda: sites[0] if len(sites) == 1 else "host-1"
        torch.manual_seed(0)
        weights = {key: value.numpy().copy() for key, value in make_model(options()).state_dict().items()}
        given = FLModel(params_type=ParamsType.FULL, params=weights, current_round=0, meta=meta)
        host, message = SiteHost(), FLModelUtils.to_shareable(given)
        if cohort is not None:
            message.set_header(COHORT, cohort)
        host.handle_event(EventType.START_RUN, context)
        return host.execute(name, message, context, Signal()), weights

    return run


def answer(reply) -> FLModel:
    assert reply.get_return_code() == ReturnCode.OK
    return FLModelUtils.from_shareable(reply)


def test_a_host_answers_with_the_sum_of_its_sites(task):
    together = AnswerSum()
    together.add_host(answer(task(AppConstants.TASK_TRAIN, "site-1", "site-2")[0]))
    alone = {site: answer(task(AppConstants.TASK_TRAIN, site)[0]) for site in ("site-1", "site-2")}
    images = {site: one.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] for site, one in alone.items()}
    assert {site: own["train"] for site, own in together.sites.items()} == images
    assert {site: own["metrics"] for site, own in together.sites.items()} == {
        s: one.metrics for s, one in alone.items()
    }
    for name, value in together.mean().params.items():
        expected = np.average([one.params[name] for one in alone.values()], axis=0, weights=[*images.values()])
        np.testing.assert_allclose(value, expected, 1e-5)
        assert not np.array_equal(alone["site-1"].params[name], alone["site-2"].params[name])


def test_a_host_reports_the_evaluation_of_each_site(task):
    together = answer(task(AppConstants.TASK_VALIDATION, "site-1", "site-2")[0]).metrics
    alone = {site: answer(task(AppConstants.TASK_VALIDATION, site)[0]).metrics for site in ("site-1", "site-2")}
    np.testing.assert_equal(together, alone)


def test_a_host_describes_what_each_site_would_send(task):
    meta = answer(task(AppConstants.TASK_TRAIN, "site-1", "site-2")[0]).meta
    (record,) = meta[DESCRIBED]
    assert record["sites"] == ["site-1", "site-2"]
    assert {tensor["dtype"] for tensor in record["tensors"]} == {"float32"} and len(record["tensors"]) == 10
    assert set(record["metrics"]) == {"val_acc", "val_loss"}


def test_each_site_of_a_host_keeps_a_ledger_of_its_own(task, tmp_path):
    task(AppConstants.TASK_TRAIN, "site-1", "site-2")
    task(AppConstants.TASK_VALIDATION, "site-2")
    first, second = (read(tmp_path / "ledger" / f"site-{number}.jsonl") for number in (1, 2))
    assert [(record["site"], record["task"], record["round"]) for record in first] == [("site-1", "train", 0)]
    assert [(record["site"], record["task"]) for record in second] == [("site-2", "train"), ("site-2", "validate")]
    assert len(first[0]["tensors"]) == 10 and set(first[0]["metrics"]) == {"val_acc", "val_loss"}
    assert {"val_images", "test_images", "test_acc"} <= set(second[1]["metrics"])


def test_a_ledger_lists_the_curves_that_a_tracker_gets(task, tmp_path, monkeypatch):
    monkeypatch.setattr("federation.site.host.send_analytic_dxo", lambda *_: None)
    given = Options.__init__

    def tracked(self, *arguments, **values):
        given(self, *arguments, **{**values, "tracking": "tensorboard"})

    monkeypatch.setattr(Options, "__init__", tracked)
    task(AppConstants.TASK_TRAIN, "site-1")
    (record,) = read(tmp_path / "ledger" / "site-1.jsonl")
    assert {"train/loss", "val/acc", "test/acc"} <= set(record["curves"])


def test_a_site_that_refuses_a_task_says_why_and_sends_nothing_else(task, tmp_path, monkeypatch):
    monkeypatch.setenv("FL_DP_EPSILON", "4")
    sent = answer(task(AppConstants.TASK_TRAIN, "site-1", "site-2")[0])
    reason = "it declined: this site requires differential privacy (FL_DP_EPSILON): use --dp_epsilon"
    assert (sent.meta[SITES], sent.meta[LEFT_OUT]) == ({}, {"site-1": reason, "site-2": reason})
    (record,) = read(tmp_path / "ledger" / "site-1.jsonl")
    assert (record["tensors"], record["metrics"]) == ([], [])


def test_a_failed_task_is_in_the_ledger(task, tmp_path, monkeypatch):
    monkeypatch.setattr("data.SiteDataModule.setup", lambda *_: 1 / 0)
    task(AppConstants.TASK_TRAIN, "site-1")
    (record,) = read(tmp_path / "ledger" / "site-1.jsonl")
    assert (record["task"], record["tensors"], record["metrics"]) == ("train", [], [])


def test_nothing_leaves_a_site_that_cannot_write_its_ledger(task, tmp_path):
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "site-1.jsonl").write_text("incomplete")
    reply, _ = task(AppConstants.TASK_TRAIN, "site-1")
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION


def test_a_host_leaves_out_a_site_whose_answer_fails_the_checks(task, monkeypatch):
    weights = client.weights
    monkeypatch.setattr(
        client, "weights", lambda data: {**weights(data), **({"val_images": -1} if data.site == "site-2" else {})}
    )
    sent = answer(task(AppConstants.TASK_TRAIN, "site-1", "site-2")[0])
    assert list(sent.meta[SITES]) == ["site-1"]
    assert sent.meta[LEFT_OUT] == {"site-2": "its number of val images is -1, which is not within 0 to 1000000000"}
    assert sent.meta[DESCRIBED][0]["sites"] == ["site-1", "site-2"]  # it would have left the site all the same


@pytest.mark.parametrize("name", [AppConstants.TASK_TRAIN, AppConstants.TASK_VALIDATION])
def test_only_the_sites_of_a_cohort_do_a_task(task, name):
    host = answer(task(name, "site-1", "site-2", cohort=["site-2", "site-9"])[0])
    assert list(host.meta[SITES] if name == AppConstants.TASK_TRAIN else host.metrics) == ["site-2"]
    reply, _ = task(name, "site-1", cohort=[])
    assert from_shareable(reply).data == {}
    assert reply.get_header(COHORT) == []


def test_the_change_of_the_weights_is_sent_for_fedopt(task):
    full, weights = task(AppConstants.TASK_TRAIN, "site-1")
    difference, _ = task(AppConstants.TASK_TRAIN, "site-1", difference=True)
    assert answer(difference).params_type == ParamsType.DIFF
    for name, change in answer(difference).params.items():
        np.testing.assert_array_equal(change, answer(full).params[name] - weights[name])


def test_a_sites_control_variate_outlives_its_process(task, tmp_path):
    """What the server is told adds up to what the site keeps: the second change is not that from zero again."""
    shapes = {name: value.shape for name, value in task(AppConstants.TASK_TRAIN, "site-2")[1].items()}
    zero = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    changes = []
    for _ in range(2):
        reply, _ = task(AppConstants.TASK_TRAIN, "site-1", **{AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL: zero})
        changes.append(answer(reply).meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF])
    kept = torch.load(tmp_path / "site-1.variate.pt", weights_only=True)
    for name, value in kept.items():
        np.testing.assert_allclose(changes[0][name] + changes[1][name], value, rtol=1e-4, atol=1e-6)
    assert any(np.abs(change).max() > 1e-6 for change in changes[1].values())


def test_a_failed_task_logs_where_it_failed(task, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("boom at the site")

    monkeypatch.setattr("data.SiteDataModule.setup", fail)
    reply, _ = task(AppConstants.TASK_TRAIN, "site-1")
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "RuntimeError: boom at the site" in caplog.text and "client.py" in caplog.text
