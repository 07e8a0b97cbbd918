"""Records the rounds, and ends a federation with the evaluation of the final and the best global model.

The best model is the aggregate with the highest validation accuracy, including the last one; ties go to the latest.
The sites validate every aggregate except the last at the beginning of the next round, so the best of those is known
before the end. It is tested only if the last one validates worse. Two models are compared on the sites that validated
both: once a site is lost, a mean over the others cannot be compared with a mean over all. With a random cohort in each
round, hardly any site validates both, and the means over the cohorts are compared.
"""

import time
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.model_controller import ModelController

from federation.exchange import mean_metrics
from federation.protocol import (
    BEST,
    DONE,
    EVALUATION,
    LAST,
    METRIC,
    PROGRESS,
    REJECTED,
    ROUNDS,
    SITES,
    STARTING,
    TEST_COUNTS,
    VAL_IMAGES,
    append_json,
    read_json_lines,
    save_tensors,
    write_json,
)
from federation.server.answers import global_model, require_majority, run_folder

Validation = dict[str, tuple[dict[str, Any], int]]  # site -> a model's metrics, number of validation images


class FinalEvaluation(ModelController):
    """Runs after the training workflow of any algorithm, which it follows through events.

    Writes into the server's run folder:

    - `rounds.jsonl`, one line per finished round: `round` (from 0); `metrics`: mean over the sites; `sites`: site ->
      `metrics` of the model that the round started with, the numbers of `train` and `val` images, and `dp` with
      differential privacy (site/budget.py); `rejected`: answers that were left out;
    - `best.pt`, a state dict, if a model before the last one validated best;
    - `evaluation.json`: `final` and `best`, each with its `round` (number of aggregations), validation `accuracy`,
      for each site the metrics that client.py sends, and `counts`: those that are arrays (site/scores.py);
    - `progress.jsonl`: when the run started and when it was done, in the sites' format (site/progress.py).

    Args:
        n_sites: number of sites that evaluate a model.
        hosted: whether each client is a host, which answers for several sites (site/host.py).
        sampled: whether a random cohort takes part in each round.
    """

    def __init__(self, n_sites: int, hosted: bool = False, sampled: bool = False) -> None:
        super().__init__()
        self.n_sites, self.hosted, self.sampled = n_sites, hosted, sampled
        self.n_aggregations = 0
        self.best_round = 0
        self.best: Validation = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            self._announce(STARTING, fl_ctx)
        elif event_type == AppEventType.AFTER_AGGREGATION:
            self._record(fl_ctx)

    def _record(self, fl_ctx: FLContext) -> None:
        """Record a round, and keep the model that it started with if that is the best so far."""
        # The sites validated the model that the round started with, still GLOBAL_MODEL, made by `began` aggregations.
        began = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        self.n_aggregations = began + 1
        result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
        meta = result["DXO"]["meta"] if isinstance(result, Shareable) else result.meta  # FedOpt's is a Shareable
        sites = meta.pop(SITES)
        validation = {site: (own["metrics"], own["val"]) for site, own in sites.items()}
        folder = run_folder(fl_ctx)
        rejected = [record for record in read_json_lines(folder / REJECTED) if record["round"] == began]
        metrics = mean_metrics([*validation.values()])
        append_json(folder / ROUNDS, {"round": began, "metrics": metrics, "sites": sites, "rejected": rejected})
        if began > 0 and is_at_least_as_good(validation, self.best, self.sampled):  # 0: untrained
            self.best_round, self.best = began, validation
            save_tensors(folder / BEST, global_model(fl_ctx))

    def run(self) -> None:
        folder = run_folder(self.fl_ctx)
        final = self.evaluate(torch.load(folder / LAST, weights_only=True)["model"], self.n_aggregations)
        report = {"final": final, "best": final}
        validation = {site: (metrics, metrics[VAL_IMAGES]) for site, metrics in final["sites"].items()}
        if self.best and not is_at_least_as_good(validation, self.best, self.sampled):
            report["best"] = self.evaluate(torch.load(folder / BEST, weights_only=True), self.best_round)
            del report["best"]["counts"]  # megabytes that nothing reads
        write_json(folder / EVALUATION, report)
        self._announce(DONE, self.fl_ctx)

    def _announce(self, phase: str, fl_ctx: FLContext) -> None:
        append_json(run_folder(fl_ctx) / PROGRESS, {"time": time.time(), "phase": phase})

    def evaluate(self, model: dict[str, torch.Tensor], n_aggregations: int) -> dict[str, Any]:
        """Have all sites validate and test a model.

        Raises:
            RunError: no more than half of the sites did.
        """
        weights = {name: weight.numpy() for name, weight in model.items()}
        data = FLModel(params_type=ParamsType.FULL, params=weights)
        results = self.send_model_and_wait(task_name=AppConstants.TASK_VALIDATION, data=data)
        sites: dict[str, Any] = {}
        for result in results:
            if result.metrics:
                sites |= result.metrics if self.hosted else {result.meta["client_name"]: result.metrics}
        counts = {
            site: {name: own.pop(name).tolist() for name in TEST_COUNTS if name in own} for site, own in sites.items()
        }
        require_majority(len(sites), self.n_sites, self.fl_ctx, evaluation=True)
        accuracy = mean_metrics([(sites[name], sites[name][VAL_IMAGES]) for name in sorted(sites)]).get(METRIC)
        shared = {site: own for site, own in counts.items() if own}
        return {"round": n_aggregations, "accuracy": accuracy, "sites": sites, "counts": shared}


def is_at_least_as_good(new: Validation, old: Validation, sampled: bool = False) -> bool:
    """Whether a model validates at least as well as another, on the sites that validated both.

    True if there is nothing to compare with; False if the new model was not validated.

    Args:
        new: its validation.
        old: that of the other model.
        sampled: compare the means over all sites of each, because they are random samples.
    """
    new, old = ({site: own for site, own in model.items() if METRIC in own[0] and own[1]} for model in (new, old))
    common = [*(new.keys() & old.keys())]
    if not new or not (old if sampled else common):
        return bool(new)
    rivals = ([model[site] for site in sorted(model if sampled else common)] for model in (new, old))
    accuracy, other = (mean_metrics(rival)[METRIC] for rival in rivals)
    return accuracy >= other
