"""The last step of a federation: what the sites say about the final global model, and about the best one.

The best model is the aggregate with the highest validation accuracy, the last one included; of equals the latest.
Every aggregate but the last is validated by the sites at the beginning of the round that follows, so the best of them
is known before the end, and it is tested only where the last one turns out to validate worse.
"""

import json
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController

from federation.aggregator import VAL_IMAGES, mean_metrics

METRIC = "val_acc"
FINAL, BEST, REPORT = "final.pt", "best.pt", "evaluation.json"  # in the server's run folder


class FinalEvaluation(ModelController):
    """Runs after the training workflow, whichever algorithm that is, and follows it by its events.

    Leaves plain state dicts, `final.pt` and, where another one validated better, `best.pt`: NVFlare's own files are
    not all that (with early stopping it does not save the last aggregate, and SCAFFOLD's are no plain tensors). And
    `evaluation.json`: `final` and `best`, each with its `round` (how many aggregations made it), its validation
    `accuracy`, and for each site the metrics that client.py sends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_aggregations = 0
        self.best_round, self.best_accuracy = 0, float("-inf")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type != AppEventType.AFTER_AGGREGATION:
            return
        # The sites validated what the round began with, which GLOBAL_MODEL still is: `began` aggregations made it.
        began = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        self.n_aggregations = began + 1
        result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
        if isinstance(result, Shareable):  # what FedOpt's controller hands on
            result = FLModelUtils.from_shareable(result)
        accuracy = (result.metrics or {}).get(METRIC)
        if began > 0 and accuracy is not None and accuracy >= self.best_accuracy:  # 0: it is not trained yet
            self.best_round, self.best_accuracy = began, accuracy
            torch.save(_global_model(fl_ctx), _folder(fl_ctx) / BEST)

    def run(self) -> None:
        folder, final = _folder(self.fl_ctx), _global_model(self.fl_ctx)
        torch.save(final, folder / FINAL)
        report = {"final": self.evaluate(final, self.n_aggregations)}
        report["best"] = report["final"]
        if (report["final"]["accuracy"] or 0) < self.best_accuracy:
            report["best"] = self.evaluate(torch.load(folder / BEST, weights_only=True), self.best_round)
        (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")

    def evaluate(self, model: dict[str, torch.Tensor], n_aggregations: int) -> dict[str, Any]:
        """Let all sites validate and test a model."""
        weights = {name: weight.numpy() for name, weight in model.items()}
        data = FLModel(params_type=ParamsType.FULL, params=weights)
        results = self.send_model_and_wait(task_name=AppConstants.TASK_VALIDATION, data=data)
        sites = {result.meta["client_name"]: result.metrics for result in results}
        accuracy = mean_metrics([(sites[name], sites[name][VAL_IMAGES]) for name in sorted(sites)]).get(METRIC)
        return {"round": n_aggregations, "accuracy": accuracy, "sites": sites}


def _global_model(fl_ctx: FLContext) -> dict[str, torch.Tensor]:
    weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    return {name: torch.as_tensor(weight) for name, weight in weights.items()}


def _folder(fl_ctx: FLContext) -> Path:
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
