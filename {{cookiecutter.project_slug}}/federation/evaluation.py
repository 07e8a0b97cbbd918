"""The last step of a federation: what the sites say about the final global model, and about the best one.

The best model is the aggregate with the highest validation accuracy, the last one included; of equals the latest.
Every aggregate but the last is validated by the sites at the beginning of the round that follows, so the best of them
is known before the end, and it is tested only where the last one turns out to validate worse.
"""

import json
from pathlib import Path

from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants, DefaultCheckpointFileName
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController

from federation.aggregator import VAL_IMAGES, mean_metrics

METRIC = "val_acc"
FILE = "evaluation.json"  # in the server's run folder; federation/environments.py brings it home


class FinalEvaluation(ModelController):
    """Runs after the training workflow, whichever algorithm that is, and follows it by its events.

    Leaves `evaluation.json`: `final` and `best`, each with its `round` (how many aggregations made it) and, for each
    site, the metrics that client.py sends. The models are where NVFlare's persistor puts them.
    """

    def __init__(self):
        super().__init__()
        self.n_aggregations = 0
        self.best_round, self.best_accuracy = 0, float("-inf")

    def handle_event(self, event_type: str, fl_ctx) -> None:
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
            self.fire_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)  # NVFlare's persistor saves it

    def run(self) -> None:
        final = self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        self.persistor.save(final, self.fl_ctx)  # with early stopping NVFlare has saved some of the rounds only
        report = {"final": self.evaluate(final, self.n_aggregations)}
        report["best"] = report["final"]
        if (report["final"]["accuracy"] or 0) < self.best_accuracy:
            best = self.persistor.get(DefaultCheckpointFileName.BEST_GLOBAL_MODEL, self.fl_ctx)
            report["best"] = self.evaluate(best, self.best_round)
        Path(self.get_run_dir(), FILE).write_text(json.dumps(report), encoding="utf-8")

    def evaluate(self, model: ModelLearnable, n_aggregations: int) -> dict:
        """Let all sites validate and test a model."""
        data = FLModel(params_type=ParamsType.FULL, params=model[ModelLearnableKey.WEIGHTS])
        results = self.send_model_and_wait(task_name=AppConstants.TASK_VALIDATION, data=data)
        sites = {result.meta["client_name"]: result.metrics for result in results}
        accuracy = mean_metrics([(sites[name], sites[name][VAL_IMAGES]) for name in sorted(sites)]).get(METRIC)
        return {"round": n_aggregations, "accuracy": accuracy, "sites": sites}
