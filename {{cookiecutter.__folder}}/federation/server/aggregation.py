"""FedAvg's weighted mean, summed in the order of the sites' names.

NVFlare adds each result as it arrives, so the last bits of the sum depend on timing. Here the same results always give
the same model, at the price of memory: the server keeps all results of a round until the last one has arrived.
"""

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scaffold import Scaffold
from nvflare.widgets.widget import Widget

from federation.exchange import mean_answer
from federation.protocol import VAL_IMAGES
from federation.server.answers import global_model, require_majority

# In the meta of a mean: site -> `metrics` of the model that it received, and its numbers of `train` and `val` images.
# FinalEvaluation removes and records it, because whatever stays in the meta is sent to all sites.
SITES = "fl_sites"


class OrderedMean(ModelAggregator):
    """The mean of the sites' weights, each site weighted by its number of training images.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1.

    Args:
        n_sites: number of sites that the job was sent to.
    """

    def __init__(self, n_sites: int) -> None:
        super().__init__()
        self.n_sites = n_sites
        self.results: dict[str, FLModel] = {}

    def reset_stats(self) -> None:
        self.results = {}

    def accept_model(self, model: FLModel) -> None:
        # FedOpt's controller does not add the client's name to the result, but the context has it.
        name = model.meta.get("client_name") or self.fl_ctx.get_peer_context().get_identity_name()
        if model.params:  # empty if rejected
            self.results[name] = model

    def aggregate_model(self) -> FLModel:
        require_majority(len(self.results), self.n_sites, self.fl_ctx)
        return _add_sites(mean_answer(self.results), self.results)


class OrderedScaffold(Scaffold):
    """SCAFFOLD's controller, with weights and control variates summed in the order of the sites' names.

    A lost site's share of the global control variate stays as it was.
    """

    def aggregate(self, results: list[FLModel], aggregate_fn: Any = None) -> FLModel:
        usable = {result.meta["client_name"]: result for result in results if result.params}
        require_majority(len(usable), self.num_clients, self.fl_ctx)
        return super().aggregate(list(usable.values()), lambda _: _add_sites(mean_answer(usable, aggregate_fn), usable))


class StartFromCheckpoint(Widget):
    """Workaround for a FedOpt bug in NVFlare 2.9: the server must optimize the model that the sites receive.

    NVFlare's server-side optimizer starts from the random weights of the model component, but the sites receive the
    checkpoint: the first aggregate would be random weights plus changes made to other weights. This copies the global
    model into the component as soon as it is loaded.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.INITIAL_MODEL_LOADED:
            fl_ctx.get_engine().get_component("model").load_state_dict(global_model(fl_ctx))


def _add_sites(mean: FLModel, results: dict[str, FLModel]) -> FLModel:
    """Note in a mean's meta what it was computed from."""
    mean.meta[SITES] = {
        name: {
            "metrics": result.metrics or {},
            "train": result.meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND),
            "val": result.meta.get(VAL_IMAGES, 0),
        }
        for name, result in sorted(results.items())
    }
    return mean
