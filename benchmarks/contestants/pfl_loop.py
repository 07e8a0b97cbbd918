"""pfl-research: simulated users as plain loops over one model; with torchrun, each worker has a share of the cohort.

No Lightning, no server, no messages, and no evaluation in the rounds; the final model is evaluated user by user.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel

import common
from common import COHORT, EVALUATORS, N_SITES, OPTIONS, WORK, Batches


class Net(common.net_class()):  # type: ignore[misc]
    """The project's network, with the two methods that pfl calls."""

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(x), y)

    @torch.inference_mode()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Weighted]:
        outputs = self(x)
        loss = torch.nn.functional.cross_entropy(outputs, y, reduction="sum")
        right = (outputs.argmax(1) == y).sum()
        return {"loss": Weighted(float(loss), len(y)), "accuracy": Weighted(int(right), len(y))}


class User(Dataset):
    """A site's images, sliced a batch at a time instead of copied into one tensor."""

    def __init__(self, site: int, part: str):
        super().__init__(raw_data=(), user_id=str(site))
        self.site, self.part, self.passes = site, part, 0

    def __len__(self) -> int:
        return len(common.rows_of(self.site)[self.part])

    def iter(self, batch_size: int | None) -> Iterable[Any]:
        self.passes += 1
        return Batches(self.site, self.part, self.passes)


def users(part: str) -> FederatedDataset:
    made = {site: User(site, part) for site in range(N_SITES)}  # kept, so that each pass is shuffled differently
    sizes = {site: len(made[site]) for site in np.random.permutation(N_SITES).tolist() if len(made[site])}
    # With the sizes, pfl gives each worker the same number of images, for which it starts processes.
    balance = sizes if part == "train" and OPTIONS.partition == "dirichlet" else None
    return FederatedDataset(made.__getitem__, get_user_sampler("minimize_reuse", [*sizes]), balance)


def main() -> None:
    torch.set_num_threads(WORK["threads"])
    np.random.seed(OPTIONS.seed)  # the same on all workers, as pfl requires
    torch.manual_seed(OPTIONS.seed)
    net = Net(len(OPTIONS.classes))
    model = PyTorchModel(net, common.make_optimizer, torch.optim.SGD(net.parameters(), lr=1.0))
    backend = SimulatedBackend(users("train"), users("test"), postprocessors=[WeightByDatapoints()])
    rounds = OPTIONS.num_rounds
    params = NNAlgorithmParams(
        central_num_iterations=rounds + 1,
        evaluation_frequency=rounds + 1,
        train_cohort_size=COHORT,
        val_cohort_size=EVALUATORS,
    )
    train_params = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=OPTIONS.learning_rate, local_batch_size=OPTIONS.batch_size
    )
    evaluate_params = NNEvalHyperParams(local_batch_size=common.EVALUATION_BATCH)
    algorithm = FederatedAveraging()
    algorithm._current_central_iteration = 1  # iteration 0 would evaluate all training images, twice
    model = algorithm.run(params, backend, model, train_params, evaluate_params, send_metrics_to_platform=False)
    last = CentralContext(
        current_central_iteration=rounds,
        do_evaluation=True,
        cohort_size=min(EVALUATORS, sum(1 for site in range(N_SITES) if len(common.rows_of(site)["test"]))),
        population=Population.VAL,
        model_train_params=train_params,
        model_eval_params=evaluate_params,
        algorithm_params=params,
        seed=OPTIONS.seed,
    )
    _, metrics = backend.gather_results(model, algorithm, central_context=last)
    (accuracy,) = (value.overall_value for name, value in metrics if "accuracy" in str(name))
    common.report(accuracy)


if __name__ == "__main__":
    main()
