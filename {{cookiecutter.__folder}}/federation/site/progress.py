"""What a site announces while it works: what it is doing, how fast it trains, and its metrics for a tracker."""

import time
from pathlib import Path
from typing import Any

from nvflare.client.tracking import SummaryWriter
from pytorch_lightning import Callback, LightningModule

from federation.protocol import EVALUATING, PREDICTING, TESTING, TRAINING, VALIDATING, append_json

FIRST_SPEED_S, SPEED_EVERY_S = 1.0, 2.0  # seconds of training


def announce(file: Path | None, phase: str) -> None:
    """Append what the site does from now on, one of protocol.py's phases, to its progress file; None: to nowhere."""
    if file:
        append_json(file, {"time": time.time(), "phase": phase})


class Progress(Callback):
    """A Lightning callback that announces phases and speed, and sends metrics to the server's tracker.

    The progress file has one JSON object per line: `time` (seconds since 1970) and either `phase`, or `step`, `steps`
    (training steps of this round, done and in all) and `speed` (steps per second).

    What the model logs becomes, in the tracker:

    - `train/...`, at every 50th training step (the trainer's `log_every_n_steps`): the model in training;
    - `val/...`, by round: the global model that the site received, on the site's validation images;
    - `test/...`, by round: the model that the site made of it, on the site's test images.

    Args:
        tracker: job.py's `--tracking`. With `none`, no metrics are sent.
        file: the site's progress file; None: nothing is announced.
        evaluating: whether the task is an evaluation; then everything is one phase, and no metrics are sent.
    """

    def __init__(self, tracker: str, file: Path | None, evaluating: bool = False) -> None:
        self.tracker, self.file, self.evaluating = tracker, file, evaluating
        self.writer: Any = None if tracker == "none" or evaluating else SummaryWriter()
        self.steps = 0  # of training in a round

    # A trainer is `Any`: Lightning declares neither its datamodule nor its log_every_n_steps.
    def on_validation_start(self, trainer: Any, module: LightningModule) -> None:
        if trainer.state.fn == "validate":  # and not in the middle of `fit`
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
            # Counted from the round: nothing is left of the rounds before.
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
        if self.tracker == "wandb" and stage != "train":  # it drops what steps back, so all is counted in one way
            metrics["round"], step = step, step * self.steps
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step=step)
