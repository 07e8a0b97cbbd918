"""The audit log: what left the sites, as received by the server.

It records what was sent, not what was meant to be sent: every entry of every answer to a task, whichever code put it
there. It keeps names, types and sizes, never values. Of a tracker's curve it lists only the first message. It does not
see NVFlare's other messages, such as heartbeats and what administrators request from a site.
"""

import threading
from typing import Any

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.widgets.convert_to_fed_event import FED_EVENT_PREFIX

from federation.exchange import CONTENT, describe
from federation.protocol import AUDIT_LOG, DESCRIBED, append_json
from federation.server.answers import run_folder


class AuditLog(FLComponent):
    """Writes one line of JSON per answer into the server's run folder, with these keys:

    `sites`: who sent it; `task`: `train`, `validate`, or `tracking` for a streamed curve (one line per curve); `round`:
    from 0, or null; `tensors`: `name`, `shape`, `dtype` and `bytes` of each; `metrics`: names; `meta`: name -> type of
    everything else in the message; `headers`: the same for NVFlare's own entries, such as the return code.

    A host, which answers for several simulated sites, describes their answers itself, before it adds them up; those
    with the same content share a line.

    Args:
        hosted: whether each client is a host.
    """

    def __init__(self, hosted: bool = False) -> None:
        super().__init__()
        self.hosted = hosted
        self.lock = threading.Lock()
        self.curves: set[tuple[str, str]] = set()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.BEFORE_TASK_RESULT_FILTER:
            message, task = fl_ctx.get_prop(FLContextKey.TASK_RESULT), fl_ctx.get_prop(FLContextKey.TASK_NAME)
            if self.hosted:
                records = (message.get(CONTENT) or {}).get("meta", {}).get(DESCRIBED, [])
            else:
                records = [{"sites": [fl_ctx.get_peer_context().get_identity_name()], **describe(message)}]
            for record in records:
                self._write({"task": task, **record}, fl_ctx)
        elif event_type == FED_EVENT_PREFIX + ANALYTIC_EVENT_TYPE:
            message = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
            site, name = message.get_peer_prop(ReservedKey.IDENTITY_NAME, None), message[CONTENT]["data"]["track_key"]
            if self.hosted:
                site, _, name = name.partition("/")
            with self.lock:
                known = (site, name) in self.curves
                self.curves.add((site, name))
            if not known:
                curve = {**describe(message), "round": None, "metrics": [name]}
                self._write({"task": "tracking", "sites": [site], **curve}, fl_ctx)

    def _write(self, record: dict[str, Any], fl_ctx: FLContext) -> None:
        with self.lock:
            append_json(run_folder(fl_ctx) / AUDIT_LOG, record)
