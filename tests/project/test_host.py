"""The executor: a task is a call of client.main, for one site or for several, and nothing else outlives it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import client
from federation.site.host import SiteHost
from settings import Options
from trainer import make_model


@pytest.fixture
def task(tmp_path, monkeypatch, options):
    """task(name, sites, **meta): what a host answers that has just been started, and the weights that it was given."""
    monkeypatch.setattr(Options, "of_job", lambda: options(partition="shards", n_clients=2, max_batches=5))
    monkeypatch.setattr(client, "seed_everything", lambda *_, **__: None)
    context = FLContext()
    workspace = SimpleNamespace(get_log_root=lambda job_id: str(tmp_path))
    context.get_engine = lambda: SimpleNamespace(get_workspace=lambda: workspace)
    context.get_job_id = lambda: "job"

    def run(name, *sites, difference=False, **meta):
        context.get_identity_name = lambda: sites[0]
        torch.manual_seed(0)
        weights = {key: value.numpy().copy() for key, value in make_model(options()).state_dict().items()}
        given = FLModel(params_type=ParamsType.FULL, params=weights, current_round=0, meta=meta)
        host = SiteHost(list(sites), difference)
        host.handle_event(EventType.START_RUN, context)
        reply = host.execute(name, FLModelUtils.to_shareable(given), context, Signal())
        return reply, weights

    return run


def answer(reply) -> FLModel:
    assert reply.get_return_code() == ReturnCode.OK
    return FLModelUtils.from_shareable(reply)


def test_several_sites_are_answered_for_by_their_mean(task):
    together = answer(task(AppConstants.TASK_TRAIN, "site-1", "site-2")[0])
    alone = [answer(task(AppConstants.TASK_TRAIN, site)[0]) for site in ("site-1", "site-2")]
    images = [one.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] for one in alone]
    for name, value in together.params.items():
        np.testing.assert_allclose(value, np.average([one.params[name] for one in alone], axis=0, weights=images), 1e-5)
        assert not np.array_equal(alone[0].params[name], alone[1].params[name])
    assert together.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] == sum(images)


def test_several_sites_are_evaluated_as_one(task):
    together = answer(task(AppConstants.TASK_VALIDATION, "site-1", "site-2")[0]).metrics
    alone = [answer(task(AppConstants.TASK_VALIDATION, site)[0]).metrics for site in ("site-1", "site-2")]
    for name, images in (("val_acc", "val_images"), ("test_loss", "test_images")):
        assert together[images] == sum(one[images] for one in alone)
        mean = np.average([one[name] for one in alone], weights=[one[images] for one in alone])
        assert together[name] == pytest.approx(mean)


def test_the_change_is_sent_where_it_is_asked_for(task):
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


def test_a_task_that_fails_says_where(task, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("boom at the site")

    monkeypatch.setattr("data.SiteDataModule.setup", fail)
    reply, _ = task(AppConstants.TASK_TRAIN, "site-1")
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "RuntimeError: boom at the site" in caplog.text and "client.py" in caplog.text
