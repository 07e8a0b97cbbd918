"""The weighted mean, in any order of arrival, and the choice of the best model."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from federation.errors import RunError
from federation.exchange import mean_metrics
from federation.protocol import SITES
from federation.server.aggregation import WeightedMean
from federation.server.answers import AnswerCheck
from federation.server.evaluation import FinalEvaluation, is_at_least_as_good
from federation.sums import AnswerSum

IMAGES = {"site-1": 288, "site-2": 575, "site-10": 31, "site-3": 7, "site-4": 1}


def results(images=IMAGES) -> list[FLModel]:
    """What each site sends: random weights, the last bits of whose sum depend on the order."""
    random = np.random.RandomState(0)
    return [
        FLModel(
            params={"w": random.randn(40, 30).astype(np.float32), "b": random.randn(30).astype(np.float32)},
            metrics={"val_acc": random.rand(), "val_loss": random.rand()},
            meta={"client_name": site, MetaKey.NUM_STEPS_CURRENT_ROUND: n, "val_images": n // 4},
        )
        for site, n in images.items()
    ]


def mean_of(arriving: list[FLModel]) -> FLModel:
    aggregator = WeightedMean(len(IMAGES))
    for result in arriving:
        aggregator.accept_model(result)
    return aggregator.aggregate_model()


def test_weights_are_averaged_by_training_images():
    sites = results()
    mean = mean_of(sites)
    for name in ("w", "b"):
        expected = np.average(
            [site.params[name].astype(np.float64) for site in sites], axis=0, weights=[*IMAGES.values()]
        )
        np.testing.assert_allclose(mean.params[name], expected, rtol=1e-5, atol=1e-6)
    unweighted = np.mean([site.params["w"] for site in sites], axis=0)
    assert not np.allclose(mean.params["w"], unweighted, atol=1e-2)


def test_the_mean_does_not_depend_on_the_order_of_arrival():
    orders = [[*order] for order in itertools.permutations(results())]
    means = {mean_of(order).params["w"].tobytes() for order in orders}
    assert len(means) == 1
    summed_on_arrival = {sum(site.params["w"] for site in order).tobytes() for order in orders}
    assert len(summed_on_arrival) > 1  # with these numbers, the order matters


def test_a_new_round_starts_from_zero():
    first, second = results(), results({"site-1": 5, "site-2": 6, "site-3": 7})
    aggregator = WeightedMean(len(IMAGES))
    for result in first:
        aggregator.accept_model(result)
    aggregator.reset_stats()
    for result in second:
        aggregator.accept_model(result)
    np.testing.assert_array_equal(aggregator.aggregate_model().params["w"], mean_of(second).params["w"])


def test_metrics_are_averaged_by_validation_images():
    sites = results()
    weights = [n // 4 for n in IMAGES.values()]
    expected = np.average([site.metrics["val_acc"] for site in sites], weights=weights)
    assert mean_of(sites).metrics["val_acc"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sites", "mean"),
    [
        ([({"val_acc": 0.5}, 10), ({"val_acc": 1.0}, 30)], {"val_acc": 0.875}),
        ([({"val_acc": 0.5}, 10), ({}, 0), (None, 0)], {"val_acc": 0.5}),
        ([({"val_acc": 0.5, "other": 1.0}, 10), ({"val_acc": 0.5}, 10)], {"val_acc": 0.5}),
        ([({"val_acc": 0.5}, 0)], {}),
        ([(None, 10)], {}),
        ([], {}),
    ],
    ids=["weighted", "a site without images", "a metric of one site", "no images", "no metrics", "no sites"],
)
def test_mean_metrics(sites, mean):
    assert mean_metrics(sites) == mean


def test_a_mean_lists_its_sites():
    sites = mean_of(results()).meta[SITES]
    assert list(sites) == sorted(IMAGES)
    assert {name: (own["train"], own["val"]) for name, own in sites.items()} == {
        n: (i, i // 4) for n, i in IMAGES.items()
    }
    assert sites["site-3"]["metrics"] == results()[3].metrics


def test_a_mean_does_not_send_image_counts_to_the_sites():
    """With two sites, each could compute the other's count from the total."""
    meta = mean_of(results()).meta
    del meta[SITES]  # FinalEvaluation takes it out
    assert not {MetaKey.NUM_STEPS_CURRENT_ROUND, "val_images"} & meta.keys()


def test_a_hosts_sum_counts_like_its_sites():
    """Bit for bit, whether the server adds up the sites or the sums of hosts."""
    sites = {result.meta["client_name"]: result for result in results()}
    sent = []
    for names in (["site-1", "site-10", "site-4"], ["site-2", "site-3"]):
        host = AnswerSum()
        for name in names:
            host.add_site(name, sites[name])
        sent.append(host.as_answer())
        sent[-1].meta["client_name"] = f"host-{len(sent)}"
    by_host, by_site = mean_of(sent), mean_of(results())
    assert by_host.metrics == by_site.metrics
    assert by_host.meta[SITES] == by_site.meta[SITES]
    for name, value in by_site.params.items():
        np.testing.assert_array_equal(by_host.params[name], value)


def evaluate(folder, rounds: list[dict], final: dict, first_round: int = 0, n_sites: int = 2) -> tuple[dict, list]:
    """Simulate a run, given each site's accuracy for the model that each round starts with, and for the final model.

    Returns evaluation.json and the models that the sites evaluated, each as its number of aggregations.
    """
    context, asked = FLContext(), []
    workspace = SimpleNamespace(get_run_dir=lambda _: folder)
    context.get_engine = lambda: SimpleNamespace(get_workspace=lambda: workspace)
    accuracies = dict(enumerate([*rounds, final], start=first_round))
    evaluation, check = FinalEvaluation(n_sites), AnswerCheck("fedavg", [], first_round)
    evaluation.fl_ctx = context

    def global_model(number):
        model = make_model_learnable({"made of": np.array([number])}, {"not": np.zeros(1), "a": "tensor"})
        context.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)

    def ask_the_sites(task_name, data):
        number = data.params["made of"].item()
        asked.append(number)
        return [
            FLModel(metrics={"val_acc": accuracy, "val_images": 5}, meta={"client_name": name})
            for name, accuracy in reversed(accuracies[number].items())
        ]

    evaluation.send_model_and_wait = ask_the_sites
    for number in range(first_round, first_round + len(rounds)):
        global_model(number)
        context.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=True)
        sites = {site: {"metrics": {"val_acc": a}, "train": 9, "val": 5} for site, a in accuracies[number].items()}
        result = FLModel(params={"w": 0}, meta={SITES: sites})
        context.set_prop(AppConstants.AGGREGATION_RESULT, result, private=True, sticky=False)
        evaluation.handle_event(AppEventType.AFTER_AGGREGATION, context)
        assert SITES not in result.meta  # it would be sent to every site
        global_model(number + 1)
        check.handle_event(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE, context)
    evaluation.handle_event(EventType.START_RUN, context)
    evaluation.run()
    phases = [json.loads(line)["phase"] for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert phases == ["starting", "done"]
    report = json.loads((folder / "evaluation.json").read_text())
    kept = {"final": torch.load(folder / "last.pt", weights_only=True)["model"]}
    if report["best"]["round"] != report["final"]["round"]:
        kept["best"] = torch.load(folder / "best.pt", weights_only=True)
    for which, model in kept.items():
        assert model == {"made of": torch.tensor([report[which]["round"]])}
    return report, asked


def both(accuracy: float) -> dict[str, float]:
    return {"site-1": accuracy, "site-2": accuracy}


BEST = {
    "the last": ([0.1, 0.5, 0.6], 0.7, 3, [3]),
    "an earlier one": ([0.1, 0.9, 0.6], 0.7, 1, [3, 1]),
    "the later of equals": ([0.1, 0.9, 0.9], 0.7, 2, [3, 2]),
    "the last of equals": ([0.1, 0.7, 0.6], 0.7, 3, [3]),
    "never the untrained one": ([0.9, 0.2, 0.3], 0.1, 2, [3, 2]),
    "the only one": ([0.9], 0.1, 1, [1]),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_model_is(tmp_path, case):
    accuracies, final, best, asked = BEST[case]
    rounds = [both(accuracy) for accuracy in accuracies]
    report, evaluated = evaluate(tmp_path, rounds, both(final))
    assert (report["final"]["round"], report["best"]["round"]) == (len(rounds), best)
    assert evaluated == asked  # the sites test the best model only where it is not the last one


def test_a_resumed_run_starts_with_a_trained_model(tmp_path):
    report, evaluated = evaluate(tmp_path, [both(0.8), both(0.4)], both(0.6), first_round=2)
    assert (report["final"]["round"], report["best"]["round"], evaluated) == (4, 2, [4, 2])


def test_two_models_are_compared_on_the_sites_that_validated_both(tmp_path):
    """Without the hardest site, the last model has the higher mean although it is worse."""
    rounds = [
        {"site-1": 0.1, "site-2": 0.1, "site-3": 0.1},
        {"site-1": 0.9, "site-2": 0.8, "site-3": 0.1},
        {"site-1": 0.8, "site-2": 0.7},
    ]
    report, _ = evaluate(tmp_path, rounds, {"site-1": 0.7, "site-2": 0.7}, n_sites=3)
    assert report["best"]["round"] == 1


def test_with_cohorts_two_models_are_compared_by_their_means():
    first = {"site-1": ({"val_acc": 0.5}, 10), "site-2": ({"val_acc": 0.6}, 10)}
    second = {"site-3": ({"val_acc": 0.5}, 10), "site-2": ({"val_acc": 0.4}, 10)}
    assert is_at_least_as_good(first, second, sampled=True)
    assert not is_at_least_as_good(second, first, sampled=True)
    assert is_at_least_as_good(second, {}, sampled=True)


def test_the_record_of_a_round_has_what_each_site_reported(tmp_path):
    evaluate(tmp_path, [{"site-1": 0.25, "site-2": 0.75}], both(0.5))
    (record,) = map(json.loads, (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert (record["round"], record["metrics"], record["rejected"]) == (0, {"val_acc": 0.5}, [])
    assert record["sites"]["site-2"] == {"metrics": {"val_acc": 0.75}, "train": 9, "val": 5}


def test_an_evaluation_by_only_half_of_the_sites_ends_the_run(tmp_path):
    with pytest.raises(RunError, match="final evaluation: 2 of 4 sites sent a usable answer"):
        evaluate(tmp_path, [both(0.1)], both(0.2), n_sites=4)
