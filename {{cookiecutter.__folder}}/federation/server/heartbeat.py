"""Heartbeat monitor on the server: which sites still run the job, and which take too long for a task.

NVFlare's server notices a site that is gone, but not one that was killed and restarted: that site registers again,
knows nothing of the job, and the round would wait for its result forever. A site that is silent for less than the
timeout is not lost: its network may have been down. A site whose training hangs answers heartbeats forever, so tasks
have a timeout, too.
"""

import threading
import time
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable

from federation.protocol import BACK, LATE

POLL_INTERVAL_S = 5.0
REPLY_TIMEOUT_S = 5.0
LOST_AFTER_S = 60.0  # a site that is silent for longer is lost
STARTUP_GRACE_S = 60.0  # on top of that at the start, when sites import PyTorch
DEAD_CLIENT_TIMING = {  # seconds; NVFlare waits this long after a report, again in each round: keep it short
    "dead_client_grace_period": 1.0,
    "dead_client_check_lead_time": 5.0,
}


class HeartbeatMonitor(FLComponent):
    """Reports a silent or late site to the workflow, which continues without it if `min_clients` are left.

    A late site takes part again once it fetches another task.

    Args:
        site_timeout: seconds that a site may take for a task, such as training for one round.
    """

    def __init__(self, site_timeout: float) -> None:
        super().__init__()
        self.site_timeout = site_timeout
        self.heard: dict[str, float] = {}  # time of each site's last answer
        self.tasks: dict[str, tuple[str, float]] = {}  # each site's task: ID, time it was sent
        self.late: set[str] = set()
        self.over = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            threading.Thread(target=self._monitor, args=(fl_ctx.get_engine(),), daemon=True).start()
        elif event_type in (EventType.ABOUT_TO_END_RUN, EventType.END_RUN):
            self.over.set()
        elif event_type == EventType.AFTER_TASK_DATA_FILTER:  # a task is being sent, perhaps again
            site, task = fl_ctx.get_peer_context().get_identity_name(), fl_ctx.get_prop(FLContextKey.TASK_ID)
            if self.tasks.get(site, ("", 0.0))[0] != task:
                self.tasks[site] = (task, time.monotonic())
                if site in self.late:  # done with its old task, whose result NVFlare discards
                    self.late.remove(site)
                    self.log_info(fl_ctx, BACK.format(site))
        elif event_type == EventType.BEFORE_TASK_RESULT_FILTER:  # an answer has arrived
            self.tasks.pop(fl_ctx.get_peer_context().get_identity_name(), None)

    def _monitor(self, engine: Any) -> None:
        self.heard = dict.fromkeys((client.name for client in engine.get_clients()), time.monotonic() + STARTUP_GRACE_S)
        while not self.over.wait(POLL_INTERVAL_S):
            with engine.new_context() as fl_ctx:
                try:
                    self.check(fl_ctx)
                except Exception:  # the next attempt may succeed, and a job must not lose its monitor
                    self.log_exception(fl_ctx, "cannot check the sites; will retry")

    def check(self, fl_ctx: FLContext) -> None:
        """Send a heartbeat to all sites, and report those that are silent or late."""
        answers = fl_ctx.get_engine().send_aux_request(
            targets=list(self.heard),
            topic=ReservedTopic.JOB_HEART_BEAT,  # NVFlare's client answers it even while training
            request=Shareable(),
            timeout=REPLY_TIMEOUT_S,
            fl_ctx=fl_ctx,
            optional=True,
        )
        now = time.monotonic()
        for site, answer in (answers or {}).items():
            if answer.get_return_code() == ReturnCode.OK:
                self.heard[site] = now
        for site, (_, since) in list(self.tasks.items()):
            if site not in self.late and now - since > self.site_timeout:
                self.late.add(site)
                self.log_warning(fl_ctx, LATE.format(site, self.site_timeout))
        silent = {site for site, when in self.heard.items() if now - when > LOST_AFTER_S}
        for site in sorted(silent):
            self.log_warning(fl_ctx, f"no answer from {site} for {now - self.heard[site]:.0f} s")
        for site in sorted(silent | self.late):
            fl_ctx.get_prop(FLContextKey.RUNNER).handle_dead_job(site, fl_ctx)
