"""FedAvg's weighted mean, added up in the order of the sites' names.

NVFlare adds each result as it arrives, which lets the last bits of the sum depend on timing. Here they do not: the
same results give the same model. The price is memory on the server: all results of a round are kept until the last
has come.
"""

from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg
from nvflare.app_common.workflows.scaffold import Scaffold

from federation.protocol import VAL_IMAGES
from federation.server.answers import require_majority

# In the meta of a mean: site -> `metrics` of the model that it was given, and its `train` and `val` images.
# FinalEvaluation takes it out and writes it down: what stays in the meta is sent to all sites.
SITES = "fl_sites"


class OrderedMean(ModelAggregator):
    """The mean of the sites' weights, each site weighted by its number of training images.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1.
    The weights are what client.py reports as `NUM_STEPS_CURRENT_ROUND`; the arithmetic is NVFlare's own.

    Args:
        n_sites: how many the job was sent to.
    """

    def __init__(self, n_sites: int) -> None:
        super().__init__()
        self.n_sites = n_sites
        self.results: dict[str, FLModel] = {}

    def reset_stats(self) -> None:
        self.results = {}

    def accept_model(self, model: FLModel) -> None:
        # FedOpt's controller does not write the name into the result, but it says who is speaking.
        name = model.meta.get("client_name") or self.fl_ctx.get_peer_context().get_identity_name()
        if model.params:  # else it was rejected
            self.results[name] = model

    def aggregate_model(self) -> FLModel:
        require_majority(len(self.results), self.n_sites, self.fl_ctx)
        results = [self.results[name] for name in sorted(self.results)]
        return _described(BaseFedAvg.aggregate_fn(results), sorted(self.results), results)


class OrderedScaffold(Scaffold):
    """SCAFFOLD's controller, with the sites' weights and control variates added up in the order of their names.

    Of a site that is lost on the way, the share in the global control variate stays as it was.
    """

    def aggregate(self, results: list[FLModel], aggregate_fn: Any = None) -> FLModel:
        usable = sorted((r for r in results if r.params), key=lambda result: result.meta["client_name"])
        require_majority(len(usable), self.num_clients, self.fl_ctx)

        def ordered(results: list[FLModel]) -> FLModel:
            return _described(aggregate_fn(results), [result.meta["client_name"] for result in results], results)

        return super().aggregate(usable, ordered)


def _described(mean: FLModel, names: list[str], results: list[FLModel]) -> FLModel:
    """A mean together with what it is made of."""
    mean.metrics = mean_metrics([(result.metrics, result.meta.get(VAL_IMAGES, 0)) for result in results])
    mean.meta[SITES] = {
        name: {
            "metrics": result.metrics or {},
            "train": result.meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND),
            "val": result.meta.get(VAL_IMAGES, 0),
        }
        for name, result in zip(names, results, strict=True)
    }
    return mean


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
