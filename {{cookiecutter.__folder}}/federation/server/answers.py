"""The server trusts no site: it checks every answer on arrival and leaves out what fails.

A round needs usable answers from more than half of the sites that the job was sent to. With fewer, or if the global
model is not finite, the run ends at once.
"""

import threading
from pathlib import Path

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from federation.errors import RunError
from federation.exchange import SiteCheck, TensorSpecs, specs_of, tensor_fault
from federation.protocol import (
    COHORT,
    FAILURE,
    LAST,
    LEFT_OUT,
    REJECTED,
    SITES,
    append_json,
    read_json_lines,
    save_tensors,
    write_json,
)
from federation.sums import LOW

DIVERGENCE_HINT = "lower --learning_rate, or with fedopt --server_learning_rate"  # if training diverged
MAX_REASONS = 3  # in a message


class AnswerCheck(FLComponent):
    """Checks each answer of a site on arrival, and the global model after each round.

    An answer that fails is emptied, so that every workflow ignores it, and recorded in `rejected.jsonl`: its `round`
    (from 0; null for an evaluation), `site`, `task` and the `reason`. So are those that a host has left out. `last.pt`
    is the global model after the last round in which it was finite, and that round's number.

    Args:
        algorithm: job.py's `--algorithm`.
        classes: names of the federation's classes.
        first_round: number of the first round.
        images: site -> its numbers of `train`, `val` and `test` images, if known in advance, as in a simulation.
            Otherwise each site reports them with its first answer.
        hosted: whether each client is a host, which answers for several sites (site/host.py).
    """

    def __init__(
        self,
        algorithm: str,
        classes: list[str],
        first_round: int = 0,
        images: dict[str, dict[str, int]] | None = None,
        hosted: bool = False,
    ):
        super().__init__()
        self.algorithm, self.classes, self.first_round, self.images = algorithm, classes, first_round, images
        self.hosted = hosted
        self.check = SiteCheck(algorithm, classes, images)
        self.round = first_round
        self.specs: TensorSpecs = {}
        self.lock = threading.Lock()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.AFTER_TASK_RESULT_FILTER:
            self._check(fl_ctx.get_prop(FLContextKey.TASK_RESULT), fl_ctx)
        elif event_type == AppEventType.INITIAL_MODEL_LOADED:
            self.specs = specs_of(global_model(fl_ctx))
        elif event_type == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE:
            self.round += 1
            model = global_model(fl_ctx)
            if all(torch.isfinite(tensor).all() for tensor in model.values()):
                save_tensors(run_folder(fl_ctx) / LAST, {"round": self.round, "model": model})
            else:
                reason = f"the global model is not finite after round {self.round}: {DIVERGENCE_HINT}"
                write_json(run_folder(fl_ctx) / FAILURE, {"reason": reason})
                self.system_panic(reason, fl_ctx)

    def _check(self, answer: Shareable, fl_ctx: FLContext) -> None:
        client = fl_ctx.get_peer_context().get_identity_name()
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        round_ = self.round if task == AppConstants.TASK_TRAIN else None
        if answer.get_header(COHORT) == []:  # none of its sites takes part
            return
        with self.lock:
            if has_failed := answer.get_return_code(ReturnCode.OK) != ReturnCode.OK:
                reason: str | None = "its task failed, and its own log says why"
            else:
                try:
                    if self.hosted:
                        reason = self._host_fault(task, answer)
                        for site, fault in from_shareable(answer).meta[LEFT_OUT].items():
                            self._reject(site, task, round_, fault, fl_ctx)
                    else:
                        reason = self.check.find_fault(client, task, answer, self.specs, round_)
                except Exception as error:  # NVFlare would use the answer all the same
                    reason = f"it cannot be checked ({type(error).__name__}: {error})"
            if reason:
                self._reject(client, task, round_, reason, fl_ctx)
                if not has_failed:  # NVFlare handles a failed task itself
                    DXO(DataKind.WEIGHTS, data={}).update_shareable(answer)

    def _host_fault(self, task: str, answer: Shareable) -> str | None:
        """What is wrong with a host's answer. The host has checked its sites' weights, of which this is the sum."""
        content = from_shareable(answer)
        if task != AppConstants.TASK_TRAIN:
            faults = (self.check.evaluation_fault(site, own) for site, own in content.data.items())
            return next(filter(None, faults), None)
        if not content.meta[SITES]:  # it has left out all of them
            return None
        sums = {name: (shape, "float64") for name, (shape, _) in self.specs.items()}
        for site, own in content.meta[SITES].items():
            counts = {part: own[part] for part in ("train", "val")}
            if fault := self.check.training_fault(site, own["metrics"], counts):
                return f"{site}: {fault}"
        return tensor_fault(content.data, sums) or tensor_fault(content.meta[LOW], sums)

    def _reject(self, site: str, task: str, round_: int | None, reason: str, fl_ctx: FLContext) -> None:
        append_json(run_folder(fl_ctx) / REJECTED, {"round": round_, "site": site, "task": task, "reason": reason})
        self.log_warning(fl_ctx, f"rejected the answer of {site}: {reason}")


def require_majority(n_answers: int, n_sites: int, fl_ctx: FLContext, evaluation: bool = False) -> None:
    """End the run unless more than half of the sites sent a usable answer.

    Args:
        n_answers: number of usable answers.
        n_sites: number of sites that the job was sent to.
        fl_ctx: NVFlare's context.
        evaluation: True for the final evaluation, False for a training round.

    Raises:
        RunError: too few. `failure.json` has the reason as well.
    """
    if 2 * n_answers > n_sites:
        return
    folder = run_folder(fl_ctx)
    round_ = None if evaluation else fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
    what = "final evaluation" if round_ is None else f"round {round_ + 1}"
    reason = f"{what}: {n_answers} of {n_sites} sites sent a usable answer, and more than half must"
    rejected = [record for record in read_json_lines(folder / REJECTED) if record["round"] == round_]
    if rejected:
        reasons = sorted(f"{record['site']}: {record['reason']}" for record in rejected)
        reason += f" ({'; '.join(reasons[:MAX_REASONS])}{'; ...' if len(reasons) > MAX_REASONS else ''})"
    if "not finite" in reason:
        reason += f": {DIVERGENCE_HINT}"
    write_json(folder / FAILURE, {"reason": reason})
    raise RunError(reason)


def global_model(fl_ctx: FLContext) -> dict[str, torch.Tensor]:
    """The global model's state dict, on the CPU."""
    weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    return {name: torch.as_tensor(weight) for name, weight in weights.items()}


def run_folder(fl_ctx: FLContext) -> Path:
    """The server's folder for this job."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
