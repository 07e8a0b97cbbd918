"""FedAvg's weighted mean on the server. The same answers give the same bits, whatever their order and grouping.

The server keeps all answers of a round until the last one has arrived.
"""

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scaffold import Scaffold
from nvflare.widgets.widget import Widget

from federation.protocol import SITES
from federation.server.answers import global_model, require_majority
from federation.sums import CHANGE, AnswerSum


class WeightedMean(ModelAggregator):
    """The mean of the sites' weights, each site weighted by its number of training images; see sums.py.

    Args:
        n_sites: number of sites that take part in a round.
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
        return mean_of(self.results, self.n_sites, self.fl_ctx)


class ExactScaffold(Scaffold):
    """SCAFFOLD's controller, with the same arithmetic as `WeightedMean`.

    The global control variate changes by |S|/N times the mean change of the sites, where S of N sites took part
    (Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1).

    Args:
        n_sites: number of sites that take part in a round.
        n_all: number of all sites, N.
        num_clients: number of NVFlare's clients: of sites, or of hosts.
        num_rounds: number of rounds.
        start_round: number of the first round.
    """

    # NVFlare's export writes what it finds in this signature, and nothing of **arguments.
    def __init__(self, n_sites: int, n_all: int, num_clients: int, num_rounds: int, start_round: int = 0) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, start_round=start_round)
        self.n_sites, self.n_all = n_sites, n_all

    def aggregate(self, results: list[FLModel], aggregate_fn: Any = None) -> FLModel:
        usable = {result.meta["client_name"]: result for result in results if result.params}
        mean = mean_of(usable, self.n_sites, self.fl_ctx)
        share = len(mean.meta[SITES]) / self.n_all
        mean.meta[CHANGE] = {name: change * change.dtype.type(share) for name, change in mean.meta[CHANGE].items()}
        return super().aggregate(list(usable.values()), lambda _: mean)


class StartFromCheckpoint(Widget):
    """Workaround for a FedOpt bug in NVFlare 2.9: the server must optimize the model that the sites receive.

    NVFlare's server-side optimizer starts from the random weights of the model component, but the sites receive the
    checkpoint: the first aggregate would be random weights plus changes made to other weights. This copies the global
    model into the component as soon as it is loaded.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.INITIAL_MODEL_LOADED:
            fl_ctx.get_engine().get_component("model").load_state_dict(global_model(fl_ctx))


def mean_of(results: dict[str, FLModel], n_sites: int, fl_ctx: FLContext) -> FLModel:
    """The mean of what sites and hosts sent.

    Args:
        results: client -> its answer, checked and not empty.
        n_sites: number of sites that take part in the round.
        fl_ctx: NVFlare's context.

    Raises:
        RunError: no more than half of the sites sent a usable answer.
    """
    total = AnswerSum()
    for client, answer in results.items():
        if SITES in answer.meta:
            total.add_host(answer)
        else:
            total.add_site(client, answer)
    require_majority(len(total.sites), n_sites, fl_ctx)
    return total.mean()
