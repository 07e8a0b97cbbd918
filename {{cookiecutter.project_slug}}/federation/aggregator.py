"""FedAvg's weighted mean, added up in the order of the sites' names.

NVFlare adds each result as it arrives, which lets the last bits of the sum depend on timing. Here they do not: the
same results give the same model. The price is memory on the server: all results of a round are kept until the last
has come.
"""

from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg
from nvflare.app_common.workflows.scaffold import Scaffold

VAL_IMAGES = "val_images"  # how client.py names a site's number of validation images


class OrderedMean(ModelAggregator):
    """The mean of the sites' weights, each site weighted by its number of training images.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1.
    The weights are what client.py reports as `NUM_STEPS_CURRENT_ROUND`; the arithmetic is NVFlare's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, FLModel] = {}

    def reset_stats(self) -> None:
        self.results = {}

    def accept_model(self, model: FLModel) -> None:
        # FedOpt's controller does not write the name into the result, but it says who is speaking.
        name = model.meta.get("client_name") or self.fl_ctx.get_peer_context().get_identity_name()
        self.results[name] = model

    def aggregate_model(self) -> FLModel:
        names = sorted(self.results)
        results = [self.results[name] for name in names]
        mean = BaseFedAvg.aggregate_fn(results)
        mean.metrics = _metrics_of(results)
        # NVFlare records each site's own metrics only where an aggregator hands them on.
        mean.meta[AppConstants.METRICS_AGGREGATION_INFO]["sites"] = [
            {
                "name": name,
                "metrics": self.results[name].metrics,
                "weight": self.results[name].meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND),
            }
            for name in names
        ]
        return mean


class OrderedScaffold(Scaffold):
    """SCAFFOLD's controller, with the sites' weights and control variates added up in the order of their names."""

    def aggregate(self, results: list[FLModel], aggregate_fn: Any = None) -> FLModel:
        def ordered(results: list[FLModel]) -> FLModel:
            mean = aggregate_fn(results)
            mean.metrics = _metrics_of(results)
            return mean

        return super().aggregate(sorted(results, key=lambda result: result.meta["client_name"]), ordered)


def _metrics_of(results: list[FLModel]) -> dict[str, float]:
    return mean_metrics([(result.metrics, result.meta.get(VAL_IMAGES, 0)) for result in results])


def mean_metrics(sites: list[tuple[dict[str, Any] | None, int]]) -> dict[str, float]:
    """The mean of the sites' metrics of the model that they were given, as if their validation images were one set.

    Args:
        sites: for each site its metrics, and its number of validation images.

    Returns:
        Those metrics that all sites with validation images have; empty if no site has any.
    """
    heard = [(metrics or {}, images) for metrics, images in sites if images]
    total = sum(images for _, images in heard)
    common = set.intersection(*(set(metrics) for metrics, _ in heard)) if heard else set()
    return {name: sum(metrics[name] * images for metrics, images in heard) / total for name in sorted(common)}
