"""Announce what a site is doing, how fast it trains, and its metrics for a tracker."""

import time
from pathlib import Path
from typing import Any

from nvflare.client.tracking import SummaryWriter
from pytorch_lightning import Callback, LightningModule

from federation.protocol import EVALUATING, PREDICTING, TESTING, TRAINING, VALIDATING, append_json

FIRST_SPEED_S, SPEED_EVERY_S = 1.0, 2.0  # seconds of training


def announce(file: Path | None, phase: str) -> None:
    """Append the phase that a site enters (see protocol.py) to its progress file, if it has one."""
    if file:
        append_json(file, {"time": time.time(), "phase": phase})


class Progress(Callback):
    """A Lightning callback that announces phases and speed, and sends metrics to the server's tracker.

    The progress file has one JSON object per line: `time` (seconds since 1970) and either `phase`, or `step`, `steps`
    (training steps of this round: completed, in total) and `speed` (steps per second), or for a host (site/host.py)
    `site`, `number` and `sites`: which of how many sites of its task it turns to.

    The tracker gets what the model logs as:

    - `train/...` every 50 training steps (the trainer's `log_every_n_steps`): the model in training;
    - `val/...` per round: the received global model on the site's validation images;
    - `test/...` per round: the site's new model on its test images.

    Args:
        tracker: job.py's `--tracking`. With `none`, no metrics are sent.
        file: the site's progress file; None means that nothing is announced.
        evaluating: whether the task is an evaluation: a single phase, without metrics for the tracker.
    """

    def __init__(self, tracker: str, file: Path | None, evaluating: bool = False) -> None:
        self.tracker, self.file, self.evaluating = tracker, file, evaluating
        self.writer: Any = None if tracker == "none" or evaluating else SummaryWriter()
        self.steps = 0  # training steps in a round

    # A trainer is `Any`: Lightning declares neither its datamodule nor its log_every_n_steps.
    def on_validation_start(self, trainer: Any, module: LightningModule) -> None:
        if trainer.state.fn == "validate":  # not during `fit`
            self._announce(VALIDATING)

    def on_train_start(self, trainer: Any, module: LightningModule) -> None:
        self._announce(TRAINING)
        self.step, self.steps = 0, trainer.num_training_batches * (trainer.max_epochs - trainer.current_epoch)
        self.start = time.monotonic()
        self.next_speed = self.start + FIRST_SPEED_S

    def on_test_start(self, trainer: Any, module: LightningModule) -> None:
        self._announce(TESTING)

    def on_predict_start(self, trainer: Any, module: LightningModule) -> None:
        self._announce(PREDICTING)

    def on_train_batch_end(
        self, trainer: Any, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step += 1
        if time.monotonic() >= self.next_speed:
            self._announce_speed()
        if self.writer and batch_idx % trainer.log_every_n_steps == 0:
            # Computed from the round, because each round starts fresh.
            self._send(trainer, "train", trainer.datamodule.round * self.steps + self.step)

    def on_train_end(self, trainer: Any, module: LightningModule) -> None:
        self._announce_speed()

    def on_validation_end(self, trainer: Any, module: LightningModule) -> None:
        if self.writer:
            self._send(trainer, "val", trainer.datamodule.round)

    def on_test_end(self, trainer: Any, module: LightningModule) -> None:
        if self.writer:
            self._send(trainer, "test", trainer.datamodule.round + 1)

    def _announce(self, phase: str) -> None:
        announce(self.file, EVALUATING if self.evaluating else phase)

    def _announce_speed(self) -> None:
        now = time.monotonic()
        self.next_speed = now + SPEED_EVERY_S
        if self.file:
            speed = self.step / (now - self.start)
            append_json(self.file, {"time": time.time(), "step": self.step, "steps": self.steps, "speed": speed})

    def _send(self, trainer: Any, stage: str, step: int) -> None:
        metrics = {
            f"{stage}/{name.removeprefix(f'{stage}_')}": float(v) for name, v in trainer.callback_metrics.items()
        }
        if (
            self.tracker == "wandb" and stage != "train"
        ):  # it drops decreasing steps, so count everything in training steps
            metrics["round"], step = step, step * self.steps
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step=step)
