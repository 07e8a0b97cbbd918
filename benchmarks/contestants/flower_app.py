"""Flower's simulation engine: FedAvg on Ray, with one actor per core and one PyTorch thread each.

Trains the project's LitNet with Lightning, as Flower's Lightning quickstart does: a train message validates and fits,
an evaluate message tests; FedAvg evaluates after each round, at as many sites as it trains. With "lean" in the work, it
is the least that Flower can do: Net in a plain loop without Lightning, no validation, and one evaluation after the last
round.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

import common
from common import COHORT, EVALUATORS, N_SITES, OPTIONS, WORK, Batches

LEAN = WORK.get("lean", False)

client, server = ClientApp(), ServerApp()


def load(message: Message) -> Any:
    """The received model, and nothing else: a ClientApp keeps no state."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model


def make_model() -> Any:
    if LEAN:
        return common.make_net()
    from model import LitNet

    torch.manual_seed(OPTIONS.seed)
    return LitNet(len(OPTIONS.classes), OPTIONS)


def reply(message: Message, n_images: int, model: Any = None, **metrics: float) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": n_images, **metrics})})
    if model is not None:
        content["arrays"] = ArrayRecord(model.state_dict())
    return Message(content=content, reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    model, site = load(message), int(context.node_config["partition-id"])
    batches = Batches(site, "train", int(message.content["config"]["server-round"]))
    if LEAN:
        common.train(model, batches)
    else:
        from trainer import make_trainer

        make_trainer(OPTIONS, 1).validate(model, Batches(site, "val"), verbose=False)
        make_trainer(OPTIONS, 1).fit(model, batches)
    return reply(message, batches.n_images, model)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model, batches = load(message), Batches(int(context.node_config["partition-id"]), "test")
    if not batches.n_images:  # with Dirichlet, a small site may have no test image
        return reply(message, 0, accuracy=0.0)
    if LEAN:
        accuracy = common.evaluate(model, batches) / batches.n_images
    else:
        from trainer import make_trainer

        accuracy = make_trainer(OPTIONS, 1).test(model, batches, verbose=False)[0]["test_acc"]
    return reply(message, batches.n_images, accuracy=accuracy)


class Strategy(FedAvg):
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        is_last = server_round == OPTIONS.num_rounds
        if LEAN and not is_last:
            return []
        self.min_evaluate_nodes = EVALUATORS if is_last else COHORT
        return super().configure_evaluate(server_round, arrays, config, grid)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    strategy = Strategy(
        fraction_train=COHORT / N_SITES,
        fraction_evaluate=min(COHORT, EVALUATORS) / N_SITES,
        min_train_nodes=COHORT,
        min_available_nodes=N_SITES,
    )
    initial = ArrayRecord(make_model().state_dict())
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=OPTIONS.num_rounds)
    common.report(float(result.evaluate_metrics_clientapp[OPTIONS.num_rounds]["accuracy"]))


if __name__ == "__main__":
    import flower_app as apps  # Ray's actors import it, too: __main__ could not be copied there

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(apps.server, apps.client, num_supernodes=N_SITES, backend_config=resources)
