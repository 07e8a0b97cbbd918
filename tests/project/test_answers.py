"""The server's checks on answers: it trusts no site."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from federation.errors import RunError
from federation.protocol import CALIBRATION, COHORT, CONFUSION, LEFT_OUT, N_CONFIDENCES, N_SCORES, SCORES, SITES
from federation.server.aggregation import ExactScaffold, WeightedMean
from federation.server.answers import AnswerCheck
from federation.sums import LOW, AnswerSum

WEIGHTS = {"w": np.ones((2, 3), dtype=np.float32), "n": np.array(3)}
CONTROLS = {"w": np.zeros((2, 3), dtype=np.float32)}
METRICS = {"val_acc": 0.5, "val_loss": 1.5}
IMAGES = {"site-1": {"train": 8, "val": 2, "test": 3}}


class Server:
    """The parts of NVFlare's server that AnswerCheck uses."""

    def __init__(self, folder, algorithm="fedavg", images=IMAGES, hosted=False):
        self.folder = folder
        self.panics: list[str] = []
        self.check = AnswerCheck(algorithm, ["cat", "dog"], 0, images, hosted)
        self.check.system_panic = lambda reason, fl_ctx: self.panics.append(reason)
        self.model = WEIGHTS
        self.fire(AppEventType.INITIAL_MODEL_LOADED)

    def context(self, site="site-1", task="train") -> FLContext:
        context, peer = FLContext(), FLContext()
        workspace = SimpleNamespace(get_run_dir=lambda _: self.folder)
        context.get_engine = lambda: SimpleNamespace(get_workspace=lambda: workspace, fire_event=lambda *_: None)
        peer.get_identity_name = lambda default="": site
        context.get_peer_context = lambda: peer
        context.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
        context.set_prop(AppConstants.CURRENT_ROUND, self.check.round, private=True, sticky=False)
        context.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(self.model, {}), private=True, sticky=False)
        return context

    def fire(self, event) -> None:
        self.check.handle_event(event, self.context())

    def receive(self, answer: Shareable, site="site-1", task="train") -> str | None:
        """The reason for rejecting an answer, or None."""
        before = self.rejected()
        context = self.context(site, task)
        context.set_prop(FLContextKey.TASK_RESULT, answer, private=True, sticky=False)
        self.check.handle_event(EventType.AFTER_TASK_RESULT_FILTER, context)
        new = self.rejected()[len(before) :]
        if not new:
            return None
        assert from_shareable(answer).data == {}  # it was emptied
        assert (new[0]["site"], new[0]["task"]) == (site, task)
        return new[0]["reason"]

    def rejected(self) -> list[dict]:
        file = self.folder / "rejected.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def server(tmp_path):
    return lambda *arguments, **more: Server(tmp_path, *arguments, **more)


def trained(weights=WEIGHTS, metrics=METRICS, round_=0, kind=DataKind.WEIGHTS, **meta) -> Shareable:
    """A site's answer after training, as client.py sends it."""
    sent = {MetaKey.NUM_STEPS_CURRENT_ROUND: 8, "val_images": 2, **meta, MetaKey.INITIAL_METRICS: metrics}
    answer = DXO(kind, data=weights, meta=sent).to_shareable()
    answer.set_header(AppConstants.CURRENT_ROUND, round_)
    return answer


def evaluated(**metrics) -> Shareable:
    """A site's answer after an evaluation."""
    sent = {"val_images": 2, "test_images": 3, "val_acc": 0.5, "test_acc": 0.5, **metrics}
    return DXO(DataKind.METRICS, data=sent).to_shareable()


def counts(**changes) -> dict:
    """The arrays in such an answer, of three test images and two classes."""
    scores = np.zeros((2, 2, N_SCORES), np.uint8)
    scores[0, :, 30] = scores[1, ::-1, 30] = (1, 2)
    calibration = np.zeros((3, N_CONFIDENCES))
    calibration[:, 9] = (3, 2, 1.9)
    return {CONFUSION: np.array([[2, 0], [1, 0]], np.uint8), SCORES: scores, CALIBRATION: calibration, **changes}


def changed(**tensors) -> dict:
    return {**WEIGHTS, **tensors}


def test_a_valid_answer_is_accepted_unchanged(server):
    server = server()
    answer = trained(own_meta="text")
    assert server.receive(answer) is None
    assert from_shareable(answer).data == WEIGHTS and from_shareable(answer).meta["own_meta"] == "text"
    assert server.receive(evaluated(**{"holds cat": 4, "holds dog": 0}), task="validate") is None
    assert server.receive(evaluated(**counts()), task="validate") is None
    assert server.receive(trained(metrics={"f1": float("nan"), **METRICS})) is None  # the user's own metric may be NaN


NAN = np.array([[1, 2, np.nan], [4, 5, 6]], dtype=np.float32)
COUNT = MetaKey.NUM_STEPS_CURRENT_ROUND
INVALID = {
    "a weight that is not a number": (trained(changed(w=NAN)), "tensor w is not finite"),
    "an infinite weight": (trained(changed(w=NAN * np.inf)), "tensor w is not finite"),
    "a shape that would be broadcast": (trained(changed(w=WEIGHTS["w"][:1])), "tensor w has shape (1, 3), not (2, 3)"),
    "a larger shape": (trained(changed(w=np.ones((4, 3), np.float32))), "tensor w has shape (4, 3), not (2, 3)"),
    "another dtype": (trained(changed(w=WEIGHTS["w"].astype(np.float64))), "tensor w is float64, not float32"),
    "a tensor that the model lacks": (trained(changed(extra=np.ones(2))), "tensor extra is not part of the model"),
    "a missing tensor": (trained({"w": WEIGHTS["w"]}), "tensor n is missing"),
    "text instead of a tensor": (trained(changed(w="weights")), "w is not a tensor"),
    "no weights": (trained({}), "tensor n is missing"),
    "differences instead of weights": (trained(kind=DataKind.WEIGHT_DIFF), "its data kind is not WEIGHTS"),
    "an answer to another round": (trained(round_=3), "it is for round 3, not 0"),
    "more images than announced": (
        trained(**{COUNT: 10**12}),
        "its number of train images is 1000000000000, which is not within 1 to 1000000000",
    ),
    "one more image than announced": (
        trained(**{COUNT: 9}),
        "its number of train images is 9, which is more than the 8 announced at the start",
    ),
    "no training images": (
        trained(**{COUNT: 0}),
        "its number of train images is 0, which is not within 1 to 1000000000",
    ),
    "a negative count": (trained(val_images=-10), "its number of val images is -10, which is not within 0"),
    "text instead of a count": (trained(val_images="many"), "its number of val images is str, not a whole number"),
    "no count": (trained(val_images=None), "its number of val images is NoneType, not a whole number"),
    "an accuracy above one": (trained(metrics={"val_acc": 1e9}), "val_acc is 1e+09, which is not within 0 to 1"),
    "an accuracy that is NaN": (trained(metrics={"val_acc": float("nan")}), "val_acc is not finite"),
    "an infinite loss": (trained(metrics={"val_loss": float("inf")}), "val_loss is not finite"),
    "text instead of a metric": (trained(metrics={"val_acc": "[/x]"}), "val_acc is str, not a number"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_training_answer_is_rejected(server, fault):
    answer, reason = INVALID[fault]
    assert server().receive(answer).startswith(reason)


INVALID_EVALUATIONS = {
    "weights instead of metrics": (trained(), "its metrics are missing"),
    "a negative count": (evaluated(val_images=-10), "its number of val images is -10"),
    "more test images than announced": (evaluated(test_images=4), "its number of test images is 4, which is more than"),
    "a test accuracy above one": (evaluated(test_acc=2.0), "test_acc is 2, which is not within 0 to 1"),
    "text instead of a class's count": (evaluated(**{"holds cat": "many"}), "holds cat is str, not a number"),
    "counts of other classes": (
        evaluated(**counts(test_confusion=np.ones((3, 3), np.uint8))),
        "test_confusion is not an array of counts of shape (2, 2)",
    ),
    "counts in a list": (
        evaluated(**counts(test_scores=[1])),
        "test_scores is not an array of counts of shape (2, 2, 128)",
    ),
    "a negative count in an array": (
        evaluated(**counts(test_confusion=np.array([[4, 0], [-1, 0]], np.float32))),
        "test_confusion has a count that is negative or not finite",
    ),
    "counts of more images": (
        evaluated(**counts(test_confusion=np.array([[9, 0], [0, 0]], np.uint8))),
        "test_confusion does not count the 3 test images",
    ),
    "more correct predictions than images": (
        evaluated(**counts(test_calibration=counts()["test_calibration"][[1, 0, 2]])),
        "test_calibration does not count the 3 test images",
    ),
    "a fraction of an image": (evaluated(**{"holds cat": 0.5}), "holds cat is float, not a whole number"),
    "half a skipped file": (evaluated(skipped_images=0.5), "skipped_images is float, not a whole number"),
    "an unknown class": (evaluated(**{"holds [/x]": 1}), "it counts images of an unknown class '[/x]'"),
}


@pytest.mark.parametrize("fault", INVALID_EVALUATIONS)
def test_an_invalid_evaluation_answer_is_rejected(server, fault):
    answer, reason = INVALID_EVALUATIONS[fault]
    assert server().receive(answer, task="validate").startswith(reason)


def test_with_fedopt_sites_must_send_differences(server):
    server = server("fedopt")
    assert server.receive(trained(kind=DataKind.WEIGHT_DIFF)) is None
    assert server.receive(trained()) == "its data kind is not WEIGHT_DIFF"


def test_an_answer_in_another_format_is_rejected(server):
    assert server().receive(Shareable()).startswith("it cannot be checked (")


def test_a_failed_task_is_recorded_and_left_to_nvflare(server):
    server, answer = server(), make_reply(ReturnCode.EXECUTION_EXCEPTION)
    context = server.context()
    context.set_prop(FLContextKey.TASK_RESULT, answer, private=True, sticky=False)
    server.check.handle_event(EventType.AFTER_TASK_RESULT_FILTER, context)
    assert server.rejected()[0]["reason"] == "its task failed, and its own log says why"
    assert answer.get_return_code() == ReturnCode.EXECUTION_EXCEPTION and "DXO" not in answer


@pytest.mark.parametrize(
    ("controls", "reason"),
    [
        (CONTROLS, None),
        (None, "its weights are missing"),
        ({"w": NAN}, "tensor w is not finite"),
        ({"x": CONTROLS["w"]}, "tensor x is not part of the model"),
    ],
)
def test_control_variates_of_scaffold_are_checked(server, controls, reason):
    answer = trained(**{AlgorithmConstants.SCAFFOLD_CTRL_DIFF: controls})
    assert server("scaffold").receive(answer) == reason


def test_a_new_site_reports_its_image_counts_with_its_first_answer(server):
    server = server(images=None)
    assert server.receive(trained(**{COUNT: 500}), site="north") is None
    server.fire(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE)
    assert server.receive(trained(round_=1, **{COUNT: 499}), site="north") is None
    reason = server.receive(trained(round_=1, **{COUNT: 501}), site="north")
    assert reason == "its number of train images is 501, which is more than the 500 announced at the start"
    assert server.rejected()[0]["round"] == 1


def test_a_global_model_that_is_not_finite_ends_the_run_and_keeps_the_one_before(server, tmp_path):
    server = server()
    server.fire(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE)
    server.model = changed(w=NAN)
    server.fire(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE)
    (reason,) = server.panics
    assert reason.startswith("the global model is not finite after round 2: lower --learning_rate")
    assert json.loads((tmp_path / "failure.json").read_text()) == {"reason": reason}
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert kept["round"] == 1 and torch.equal(kept["model"]["w"], torch.ones(2, 3))


def from_host(**changes) -> Shareable:
    """The answer of a host for two sites, one of whose answers it has left out."""
    total = AnswerSum()
    total.add_site(
        "site-1",
        FLModel(params_type=ParamsType.FULL, params=WEIGHTS, metrics=METRICS, meta={COUNT: 8, "val_images": 2}),
    )
    answer = total.as_answer()
    answer.meta |= {LEFT_OUT: {"site-2": "tensor w is not finite"}, **changes}
    return FLModelUtils.to_shareable(answer)


def site_1(**changes) -> dict:
    return {SITES: {"site-1": {"metrics": METRICS, "train": 8, "val": 2, **changes}}}


def test_a_site_that_a_host_has_left_out_is_recorded_under_its_own_name(server):
    server = server(hosted=True)
    context, answer = server.context("host-1"), from_host()
    context.set_prop(FLContextKey.TASK_RESULT, answer, private=True, sticky=False)
    server.check.handle_event(EventType.AFTER_TASK_RESULT_FILTER, context)
    rejected = {"round": 0, "site": "site-2", "task": "train", "reason": "tensor w is not finite"}
    assert server.rejected() == [rejected]
    assert from_shareable(answer).data.keys() == WEIGHTS.keys()  # the others count


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (site_1(train=9), "site-1: its number of train images is 9, which is more than the 8 announced at the start"),
        (site_1(metrics={"val_acc": 7.0}), "site-1: val_acc is 7, which is not within 0 to 1"),
        ({LOW: {"w": NAN.astype(np.float64), "n": np.array(0.0)}}, "tensor w is not finite"),
    ],
)
def test_what_a_host_reports_of_its_sites_is_checked(server, changes, reason):
    server = server(hosted=True)
    assert server.receive(from_host(**{LEFT_OUT: {}, **changes}), site="host-1") == reason


def test_a_host_that_has_left_out_all_of_its_sites_is_not_at_fault(server):
    answer = FLModel(params_type=ParamsType.FULL, params={}, meta={SITES: {}, LOW: {}, LEFT_OUT: {}})
    assert server(hosted=True).receive(FLModelUtils.to_shareable(answer), site="host-1") is None


def test_a_real_site_cannot_answer_for_others(server):
    assert server().receive(trained(**site_1())) == "it answers for other sites"


def test_a_site_outside_the_cohort_is_not_rejected(server):
    answer = DXO(DataKind.WEIGHTS, data={}).to_shareable()
    answer.set_header(COHORT, [])
    assert server().receive(answer) is None


def result(site: str, weights=WEIGHTS) -> FLModel:
    return FLModel(params=weights, meta={"client_name": site, COUNT: 8, "val_images": 2})


@pytest.mark.parametrize(("n_left", "is_enough"), [(3, True), (2, False), (0, False)])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_round_needs_usable_answers_from_more_than_half_of_the_sites(server, tmp_path, algorithm, n_left, is_enough):
    server = server(images=None)
    results = [result(f"site-{k + 1}", WEIGHTS if k < n_left else {}) for k in range(4)]
    for k in range(n_left, 4):
        server.receive(trained(changed(w=NAN)), site=f"site-{k + 1}")

    def aggregate():
        if algorithm == "scaffold":
            controller = ExactScaffold(n_sites=4, n_all=4, num_clients=4, num_rounds=1)
            controller.fl_ctx = server.context()
            return controller.aggregate(results)
        mean = WeightedMean(4)
        mean.fl_ctx = server.context()
        for answer in results:
            mean.accept_model(answer)
        return mean.aggregate_model()

    if is_enough and algorithm == "fedavg":
        np.testing.assert_array_equal(aggregate().params["w"], WEIGHTS["w"])
    elif not is_enough:
        with pytest.raises(RunError):
            aggregate()
        reason = json.loads((tmp_path / "failure.json").read_text())["reason"]
        assert reason.startswith(f"round 1: {n_left} of 4 sites sent a usable answer, and more than half must (site-")
        assert f"(site-{n_left + 1}: tensor w is not finite; " in reason
        assert reason.endswith("lower --learning_rate, or with fedopt --server_learning_rate")
