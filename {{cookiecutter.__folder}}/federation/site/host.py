"""NVFlare's executor at every site, in simulator, POC and production: a task is a call of `client.main`.

A real site runs in a process of its own. In a simulation, a process can be a host: it runs its share of the sites, one
after the other, and answers for all of them. Nothing outlives a task by accident; what must is a file: SCAFFOLD's
control variate of each site, and its ledger.
"""

import contextlib
import io
import json
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.client import api as client_api
from nvflare.client.utils import numerical_params_diff

import client
from federation.errors import Declined
from federation.exchange import SiteCheck, describe, specs_of
from federation.protocol import (
    COHORT,
    DECLINED,
    DESCRIBED,
    DP,
    LEDGER,
    LEFT_OUT,
    PROGRESS,
    STARTING,
    WAITING,
    append_json,
    save_tensors,
)
from federation.site.ledger import append, code_hash, place
from federation.site.partition import hosts
from federation.site.progress import announce
from federation.sums import CHANGE, AnswerSum
from settings import Options

LOGGED_SITES = 8  # of a host: what client.py prints for others is dropped, or logs would grow with the number of sites
GLOBAL_VARIATE = AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL

# Not in every task: Lightning's lines about devices, and NVFlare's warning that `flare.init` was called before.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
logging.getLogger().addFilter(lambda record: "called init() more than once" not in str(record.msg))


class SiteHost(Executor):
    """Does each task for a site, or for the sites of a host, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path()
        self.sites: list[str] = []
        self.is_host = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            workspace, job = fl_ctx.get_engine().get_workspace(), fl_ctx.get_job_id()
            self.folder = Path(workspace.get_log_root(job))
            announce(self.folder / PROGRESS, STARTING)
            options, name = Options.of_job(), fl_ctx.get_identity_name()
            self.sites = hosts(options).get(name, [name]) if options.simulated else [name]
            root = Path(workspace.get_root_dir())
            apart = f"simulated-{job}/" if options.simulate else ""  # or a real site's own ledger would count it
            self.ledgers = {site: place(root, f"{apart}{site}", options.data_root) for site in self.sites}
            submitter = (fl_ctx.get_prop(FLContextKey.JOB_META) or {}).get(JobMetaKey.SUBMITTER_NAME)
            code = code_hash(Path(client.__file__).parents[1])
            self.job = {"job": job, "submitter": submitter, "code": code}
            self.durable = options.env == "prod"
            self.is_host = self.sites != [name]
            self.check = SiteCheck(options.algorithm, options.classes)
            self.send_difference = options.algorithm == "fedopt"
            if options.threads:
                torch.set_num_threads(options.threads)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        cohort = shareable.get_header(COHORT)
        sites = [site for site in self.sites if cohort is None or site in cohort]
        if not sites:
            answer = DXO(DataKind.WEIGHTS, data={}).to_shareable()
            answer.set_header(COHORT, [])
            return answer
        received, site = FLModelUtils.from_shareable(shareable), ""
        try:
            answers = _HostAnswer(task_name, received, self.check)
            for number, site in enumerate(sites, start=1):
                if abort_signal.triggered:
                    return make_reply(ReturnCode.TASK_ABORTED)
                place = {"site": site, "number": number, "sites": len(sites)}
                append_json(self.folder / PROGRESS, {"time": time.time(), **place})
                with contextlib.redirect_stdout(_Log() if number <= LOGGED_SITES else io.StringIO()):
                    answer = self._answer(site, task_name, received, fl_ctx)
                if self.is_host:
                    answers.add(site, answer)
        except Exception:  # whatever a user's files raise
            self.log_error(fl_ctx, f"{site}: {traceback.format_exc()}", fire_event=False)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        finally:
            announce(self.folder / PROGRESS, WAITING)
        message = FLModelUtils.to_shareable(answers.as_answer() if self.is_host else answer)
        message.set_header(AppConstants.CURRENT_ROUND, shareable.get_header(AppConstants.CURRENT_ROUND))
        return message

    def _answer(self, site: str, task: str, received: FLModel, fl_ctx: FLContext) -> FLModel:
        curves = set()

        def log(key: str, value: Any, data_type: Any, **details: Any) -> None:
            curves.add(key)
            tag = f"{site}/{key}" if self.is_host else key
            send_analytic_dxo(self, create_analytic_dxo(tag, value, data_type, **details), fl_ctx)

        # If the task fails, only the fact that it did leaves the site.
        left: dict[str, Any] = {"tensors": [], "metrics": [], "meta": {}, DP: None}
        try:
            try:
                ledger = (self.ledgers[site], self.job)
                answer = call_client(site, task, received, self.folder, self.send_difference, log, ledger)
            except Declined as refusal:
                answer = FLModel(ParamsType.FULL, params={}, meta={DECLINED: str(refusal)})
                answer.current_round = received.current_round
            left = {**describe(FLModelUtils.to_shareable(answer)), DP: (answer.meta or {}).get(DP)}
            del left["round"], left["headers"]  # NVFlare's own, which it adds later
            return answer
        finally:
            record = {"site": site, **self.job, "task": task, "round": received.current_round, **left}
            append(self.ledgers[site], {**record, "curves": sorted(curves)}, self.durable)


def call_client(
    site: str,
    task: str,
    received: FLModel,
    folder: Path,
    send_difference: bool = False,
    log: Callable[..., None] = lambda *_, **__: None,
    ledger: tuple[Path, dict[str, Any]] | None = None,
) -> FLModel:
    """Call `client.main` for a site, with a Client API that hands out one task, takes one answer, and is over.

    Args:
        site: its name.
        task: NVFlare's name of the task.
        received: the global model, as arrays or tensors.
        folder: for what must outlive the task, and for the progress file.
        send_difference: whether the answer is the change of the weights, not the weights.
        log: called with a metric for the tracker: key, value, data type, details.
        ledger: the site's ledger, and what the job's records in it have in common.

    Raises:
        Declined: the site refuses the task.
        RuntimeError: it sent no answer.
    """
    variates = _Variates(folder / f"{site}.variate.pt")
    params = {name: torch.as_tensor(value) for name, value in received.params.items()}
    meta = variates.given_to_the_helper(received.meta)
    model = FLModel(params_type=received.params_type, params=params, current_round=received.current_round, meta=meta)
    answers: list[FLModel] = []
    api = SimpleNamespace(
        receive=lambda timeout: model,
        send=lambda answer, clear_cache: answers.append(answer),
        is_running=lambda: not answers,
        is_train=lambda: task == AppConstants.TASK_TRAIN,
        is_evaluate=lambda: task == AppConstants.TASK_VALIDATION,
        is_submit_model=lambda: False,
        get_site_name=lambda: site,
        get_task_name=lambda: task,
        get_config=lambda: {PROGRESS: folder / PROGRESS, LEDGER: ledger},
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
        if send_difference:
            answer.params = numerical_params_diff(params, answer.params)
            answer.params_type = ParamsType.DIFF
        answer.params = {name: value.detach().cpu().numpy() for name, value in answer.params.items()}
    answer.current_round = received.current_round
    return variates.changed_by_the_helper(answer)


class _HostAnswer:
    """The answers of a host's sites to a task: checked, described and added up one by one, so that none is kept."""

    def __init__(self, task: str, received: FLModel, check: SiteCheck) -> None:
        self.task, self.round, self.check = task, received.current_round, check
        self.specs = specs_of(received.params)
        self.trained = AnswerSum()
        self.evaluated: dict[str, Any] = {}  # site -> its metrics
        self.left_out: dict[str, str] = {}  # site -> what is wrong with its answer
        self.described: dict[str, dict[str, Any]] = {}  # description -> its record in the audit log

    def add(self, site: str, answer: FLModel) -> None:
        message = FLModelUtils.to_shareable(answer)
        description = describe(message)
        record = self.described.setdefault(json.dumps(description), {"sites": [], **description})
        record["sites"].append(site)
        if fault := self.check.find_fault(site, self.task, message, self.specs, self.round):
            self.left_out[site] = fault
        elif self.task == AppConstants.TASK_TRAIN:
            self.trained.add_site(site, answer)
        else:
            self.evaluated[site] = answer.metrics

    def as_answer(self) -> FLModel:
        answer = self.trained.as_answer() if self.task == AppConstants.TASK_TRAIN else FLModel(metrics=self.evaluated)
        answer.meta |= {LEFT_OUT: self.left_out, DESCRIBED: [*self.described.values()]}
        return answer


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
    """What client.py prints, line by line in the log, with the time."""

    rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            logging.getLogger("client").info(line)
        return len(text)
