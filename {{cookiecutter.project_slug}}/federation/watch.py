"""Watch over the sites of a job: which of them still have a process for it. The server asks them every few seconds.

NVFlare's server notices a site that is gone, but not one that was killed and started again: it registers anew, knows
nothing of the job, and the round would wait for its result for ever. A site that answers in time, however late, is
not lost: its network may have been cut for a while.
"""

import threading
import time
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable

ASK_EVERY_S = 5.0
ANSWER_S = 5.0
SILENCE_S = 60.0  # after so long without an answer a site is lost to the job
START_S = 60.0  # more at the beginning: a site imports PyTorch first
PATIENCE = {  # seconds: NVFlare's own, which begins after that and anew in each round; little is needed any more
    "dead_client_grace_period": 1.0,
    "dead_client_check_lead_time": 5.0,
}


class Watch(FLComponent):
    """Reports a silent site to the workflow, which then goes on without it, while `min_clients` are left."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            threading.Thread(target=self._watch, args=(fl_ctx.get_engine(),), daemon=True).start()
        elif event_type in (EventType.ABOUT_TO_END_RUN, EventType.END_RUN):
            self.over.set()

    def _watch(self, engine: Any) -> None:
        started = time.monotonic()
        heard = {client.name: started + START_S for client in engine.get_clients()}
        while not self.over.wait(ASK_EVERY_S):
            with engine.new_context() as fl_ctx:
                answers = engine.send_aux_request(
                    targets=list(heard),
                    topic=ReservedTopic.JOB_HEART_BEAT,  # NVFlare's client answers it, while it trains as well
                    request=Shareable(),
                    timeout=ANSWER_S,
                    fl_ctx=fl_ctx,
                    optional=True,
                )
                now = time.monotonic()
                for site, answer in (answers or {}).items():
                    if answer.get_return_code() == ReturnCode.OK:
                        heard[site] = now
                for site, when in heard.items():
                    if now - when > SILENCE_S:
                        self.log_warning(fl_ctx, f"no answer from {site} for {now - when:.0f} s")
                        fl_ctx.get_prop(FLContextKey.RUNNER).handle_dead_job(site, fl_ctx)
