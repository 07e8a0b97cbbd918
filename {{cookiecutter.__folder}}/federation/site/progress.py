"""What a site tells while it works: how fast it trains, and its metrics where an experiment tracker was chosen."""

import time
from typing import Any

from nvflare.client.tracking import SummaryWriter
from pytorch_lightning import Callback, LightningModule

FIRST_LINE_S, LINE_EVERY_S = 1.0, 2.0  # seconds of training


class Telemetry(Callback):
    """A Lightning callback that prints the speed of training, and sends metrics to the server's tracker.

    What the model logs becomes, at the site:

    - `train/...`, at every 50th training step (the trainer's `log_every_n_steps`): the model in training;
    - `val/...`, by round: the global model that the site received, on the site's validation images;
    - `test/...`, by round: the model that the site made of it, on the site's test images.

    Args:
        tracker: job.py's `--tracking`. With `none`, nothing is sent.
    """

    def __init__(self, tracker: str):
        self.tracker = tracker
        self.writer = None if tracker == "none" else SummaryWriter()
        self.total = 0  # training steps in a round

    # A trainer is `Any`: Lightning declares neither its datamodule nor its log_every_n_steps.
    def on_train_start(self, trainer: Any, module: LightningModule) -> None:
        self.done, self.total = 0, trainer.num_training_batches * (trainer.max_epochs - trainer.current_epoch)
        self.start = time.monotonic()
        self.next_line = self.start + FIRST_LINE_S

    def on_train_batch_end(
        self, trainer: Any, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done += 1
        if time.monotonic() >= self.next_line:
            self._print_speed()
        if self.writer and batch_idx % trainer.log_every_n_steps == 0:
            # Counted from the round: a site's process may have been started anew.
            self._send(trainer, "train", trainer.datamodule.round * self.total + self.done)

    def on_train_end(self, trainer: Any, module: LightningModule) -> None:
        self._print_speed()

    def on_validation_end(self, trainer: Any, module: LightningModule) -> None:
        self._send(trainer, "val", trainer.datamodule.round)

    def on_test_end(self, trainer: Any, module: LightningModule) -> None:
        self._send(trainer, "test", trainer.datamodule.round + 1)

    def _print_speed(self) -> None:
        now = time.monotonic()
        print(f"step {self.done} of {self.total}, {self.done / (now - self.start):.1f} steps/s")
        self.next_line = now + LINE_EVERY_S

    def _send(self, trainer: Any, stage: str, step: int) -> None:
        if not self.writer:
            return
        metrics = {
            f"{stage}/{name.removeprefix(f'{stage}_')}": float(v) for name, v in trainer.callback_metrics.items()
        }
        if self.tracker == "wandb" and stage != "train":  # it drops what steps back, so all is counted in one way
            metrics["round"], step = step, step * self.total
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step=step)
