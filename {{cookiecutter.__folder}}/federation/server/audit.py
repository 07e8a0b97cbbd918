"""The receipt: what came from each site, written down at the server's door as it arrives.

It is of what was sent, not of what should have been: every value of every answer to a task is listed, whoever put it
there. Only names, types and sizes are kept, never a value. Of a curve for a tracker the first message is listed.
NVFlare's other messages (heartbeats, what administrators ask a site for) do not come by here.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.dxo import DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.fl_model import MetaKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.widgets.convert_to_fed_event import FED_EVENT_PREFIX

from federation.protocol import AUDIT_LOG

HEADERS, DXO = "__headers__", "DXO"  # the two parts of NVFlare's message
# The server puts these into a message when it has come.
OWN_HEADERS = (ReservedHeaderKey.TASK_NAME, ReservedHeaderKey.TASK_ID, ReservedHeaderKey.PEER_PROPS)


class Receipt(FLComponent):
    """Writes a line of JSON into the run's folder on the server for each answer of a site. Its keys:

    `site`; `task`: what the site answered, `train`, `validate`, or `tracking` for a curve that it streamed (one line a
    curve); `round`: from 0, null where there is none; `tensors`: `name`, `shape`, `dtype` and `bytes` of each;
    `metrics`: names; `meta`: name -> type of all else in the message; `headers`: the same of NVFlare's own entries,
    such as the return code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.curves: set[tuple[str, str]] = set()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.BEFORE_TASK_RESULT_FILTER:
            message = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
            record = describe(message)
            task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
            self._write({"site": fl_ctx.get_peer_context().get_identity_name(), "task": task, **record}, fl_ctx)
        elif event_type == FED_EVENT_PREFIX + ANALYTIC_EVENT_TYPE:
            message = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
            site, name = message.get_peer_prop(ReservedKey.IDENTITY_NAME, None), message[DXO]["data"]["track_key"]
            with self.lock:
                known = (site, name) in self.curves
                self.curves.add((site, name))
            if not known:
                record = {**describe(message), "round": None, "metrics": [name]}
                self._write({"site": site, "task": "tracking", **record}, fl_ctx)

    def _write(self, record: dict[str, Any], fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        folder = Path(engine.get_workspace().get_run_dir(fl_ctx.get_job_id()))
        with self.lock, (folder / AUDIT_LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def describe(message: Shareable) -> dict[str, Any]:
    """List what is in a message: `round`, `tensors`, `metrics`, `meta`, `headers`, as `Receipt` says."""
    content = message.get(DXO) or {}
    measures = (DXO, "data") if content.get("kind") == DataKind.METRICS else (DXO, "meta", MetaKey.INITIAL_METRICS)
    tensors, metrics, meta, headers = [], [], {}, {}
    for path, value in _leaves(message, ()):
        name = "/".join(map(str, path))
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
            short = name.removeprefix(f"{DXO}/data/")
            tensors.append({"name": short, "shape": shape, "dtype": dtype, "bytes": int(value.nbytes)})
        elif path[: len(measures)] == measures:
            metrics.append("/".join(map(str, path[len(measures) :])))
        elif path[0] == HEADERS:
            if path[1] not in OWN_HEADERS:
                headers["/".join(map(str, path[1:]))] = _type(value)
        else:
            meta[name.removeprefix(f"{DXO}/").removeprefix("meta/")] = _type(value)
    number = message.get_header(AppConstants.CURRENT_ROUND)
    return {"round": number, "tensors": tensors, "metrics": metrics, "meta": meta, "headers": headers}


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, place))
    else:
        yield path, value


def _type(value: Any) -> str:
    """`int`, `float`, ...; text and bytes with their length."""
    kind = type(value).__name__
    return f"{kind}, length {len(value)}" if isinstance(value, str | bytes | bytearray) else kind
