"""Draws the sites that take part in a round, or in the final evaluation."""

import threading
import zlib

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants

from federation.protocol import COHORT, COHORTS, append_json
from federation.server.answers import run_folder


class Cohort(FLComponent):
    """Adds to each task the names of the sites that take part; the others answer at once, without training.

    A cohort follows from the seed and the round, so it is the same on every machine. Appends each one to
    `cohorts.jsonl`: the `task`, the `round` (from 0; null for an evaluation) and the `sites`.

    Args:
        seed: job.py's `--seed`.
        sizes: task -> number of sites that take part in it. Other tasks go to all sites.
        sites: names of the simulated sites; None: those that are connected when a task is first sent.
    """

    def __init__(self, seed: int, sizes: dict[str, int], sites: list[str] | None = None):
        super().__init__()
        self.seed, self.sizes, self.sites = seed, sizes, sites
        self.drawn: dict[tuple[str, int | None], list[str]] = {}
        self.lock = threading.Lock()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        if event_type != EventType.AFTER_TASK_DATA_FILTER or task not in self.sizes:
            return
        message = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        round_ = message.get_header(AppConstants.CURRENT_ROUND)
        with self.lock:
            if (task, round_) not in self.drawn:
                sites = self.sites or [client.name for client in fl_ctx.get_engine().get_clients()]
                cohort = self.drawn[task, round_] = draw(sites, self.sizes[task], self.seed, round_)
                append_json(run_folder(fl_ctx) / COHORTS, {"task": task, "round": round_, "sites": cohort})
        members = self.drawn[task, round_]
        if self.sites is None:  # a real site need not know the others
            members = [name for name in members if name == fl_ctx.get_peer_context().get_identity_name()]
        message.set_header(COHORT, members)


def draw(sites: list[str], n: int, seed: int, round_: int | None) -> list[str]:
    """Draw `n` of these sites, or all if there are fewer; the order of `sites` does not matter.

    Args:
        sites: names.
        n: number of sites to draw.
        seed: from 0 to 2**32 - 1.
        round_: from 0; None: the final evaluation.
    """
    random = np.random.RandomState(zlib.crc32(f"{seed} {round_}".encode()))  # its streams never change
    return [str(name) for name in random.permutation(sorted(sites))[:n]]
