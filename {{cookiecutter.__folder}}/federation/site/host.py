"""NVFlare's executor at every site, in simulator, POC and production: a task is a call of `client.main`.

Nothing outlives a task by accident. What has to, SCAFFOLD's control variate of each site, is a file.
"""

import contextlib
import io
import logging
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.client import api as client_api
from nvflare.client.utils import numerical_params_diff

import client
from federation.exchange import add_up
from federation.protocol import PROGRESS, STARTING, WAITING, save_tensors
from federation.site.progress import announce
from settings import Options

GLOBAL_VARIATE, CHANGE = AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL, AlgorithmConstants.SCAFFOLD_CTRL_DIFF


class SiteHost(Executor):
    """Does each task for a list of sites, one after the other, and answers for all of them.

    Args:
        sites: their names; None: the one site that this process stands for.
        send_difference: whether the answer is the change of the weights, not the weights.
    """

    def __init__(self, sites: list[str] | None = None, send_difference: bool = False) -> None:
        super().__init__()
        self.sites, self.send_difference = sites, send_difference
        self.folder = Path()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            self.folder = Path(fl_ctx.get_engine().get_workspace().get_log_root(fl_ctx.get_job_id()))
            announce(self.folder / PROGRESS, STARTING)
            if threads := Options.of_job().threads:
                torch.set_num_threads(threads)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        try:
            model = FLModelUtils.from_shareable(shareable)
            with contextlib.redirect_stdout(_Log()):
                sites = self.sites or [fl_ctx.get_identity_name()]
                answers = {site: self._answer(site, task_name, model, fl_ctx) for site in sites}
            answer = FLModelUtils.to_shareable(add_up(answers) if len(answers) > 1 else answers[sites[0]])
        except Exception:  # whatever a user's files raise
            self.log_error(fl_ctx, traceback.format_exc(), fire_event=False)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        finally:
            announce(self.folder / PROGRESS, WAITING)
        answer.set_header(AppConstants.CURRENT_ROUND, shareable.get_header(AppConstants.CURRENT_ROUND))
        return answer

    def _answer(self, site: str, task: str, received: FLModel, fl_ctx: FLContext) -> FLModel:
        """Call `client.main` for one site, with a Client API that hands out one task, takes one answer, and is over."""
        variates = _Variates(self.folder / f"{site}.variate.pt")
        params = {name: torch.as_tensor(value) for name, value in received.params.items()}
        meta = variates.given_to_the_helper(received.meta)
        model = FLModel(
            params_type=received.params_type, params=params, current_round=received.current_round, meta=meta
        )
        answers: list[FLModel] = []

        def log(key: str, value: Any, data_type: Any, **details: Any) -> None:
            send_analytic_dxo(self, create_analytic_dxo(key, value, data_type, **details), fl_ctx)

        api = SimpleNamespace(
            receive=lambda timeout: model,
            send=lambda answer, clear_cache: answers.append(answer),
            is_running=lambda: not answers,
            is_train=lambda: task == AppConstants.TASK_TRAIN,
            is_evaluate=lambda: task == AppConstants.TASK_VALIDATION,
            is_submit_model=lambda: False,
            get_site_name=lambda: site,
            get_task_name=lambda: task,
            get_config=lambda: {PROGRESS: self.folder / PROGRESS},
            system_info=lambda: {"site_name": site},
            log=log,
            clear=lambda: None,
        )
        client_api.default_context = client_api.context_dict["0", None] = SimpleNamespace(api=api)
        client.main()
        if not answers:
            raise RuntimeError("client.py sent no answer")
        answer = answers[0]
        if answer.params is not None:
            if self.send_difference:
                answer.params = numerical_params_diff(params, answer.params)
                answer.params_type = ParamsType.DIFF
            answer.params = {name: value.detach().cpu().numpy() for name, value in answer.params.items()}
        return variates.changed_by_the_helper(answer)


class _Variates:
    """A site's control variate in SCAFFOLD (Karimireddy et al. 2020), kept in a file from task to task.

    NVFlare's helper lives for one task and begins with a variate of zero. Given c - c_i for the global variate c, its
    correction is right all the same, and what it returns as the change is the new c_i. Other algorithms have none.
    """

    def __init__(self, file: Path):
        self.file = file
        self.old: dict[str, torch.Tensor] = torch.load(file, weights_only=True) if file.exists() else {}

    def given_to_the_helper(self, meta: dict[str, Any]) -> dict[str, Any]:
        if GLOBAL_VARIATE not in meta:
            return dict(meta)
        shifted = {name: torch.as_tensor(c) - self.old.get(name, 0) for name, c in meta[GLOBAL_VARIATE].items()}
        return {**meta, GLOBAL_VARIATE: shifted}

    def changed_by_the_helper(self, answer: FLModel) -> FLModel:
        if CHANGE in answer.meta:
            new = {name: torch.as_tensor(value) for name, value in answer.meta[CHANGE].items()}
            answer.meta[CHANGE] = {name: (value - self.old.get(name, 0)).numpy() for name, value in new.items()}
            save_tensors(self.file, new)
        return answer


class _Log(io.TextIOBase):
    """What client.py prints, line by line in the site's log, with the time."""

    rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            logging.getLogger("client").info(line)
        return len(text)
