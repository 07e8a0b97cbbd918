"""FedAvg's weighted mean, added up in the order of the sites' names.

NVFlare adds each result as it arrives, which lets the last bits of the sum depend on timing. Here they do not: the
same results give the same model. The price is memory on the server: all results of a round are kept until the last
has come.
"""

from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg


class OrderedMean(ModelAggregator):
    """The mean of the sites' weights and metrics, each site weighted by its number of training images.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1.
    The weights are what client.py reports as `NUM_STEPS_CURRENT_ROUND`; the arithmetic is NVFlare's own.
    """

    def __init__(self):
        super().__init__()
        self.results: dict[str, FLModel] = {}

    def reset_stats(self) -> None:
        self.results = {}

    def accept_model(self, model: FLModel) -> None:
        self.results[model.meta["client_name"]] = model

    def aggregate_model(self) -> FLModel:
        names = sorted(self.results)
        mean = BaseFedAvg.aggregate_fn([self.results[name] for name in names])
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
