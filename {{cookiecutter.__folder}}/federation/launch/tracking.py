"""Experiment tracking: TensorBoard, MLflow or Weights & Biases, by NVFlare's receivers on the server.

The sites send what federation/site/progress.py says. The global model's curves are added here, at the end of a run:
they are means over the sites, which no site knows.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from federation.launch.options import PROJECT

TENSORBOARD = "tensorboard"  # folder of event files within the run's
MLFLOW_STORE = f"sqlite:///{PROJECT}/runs/mlflow.db"  # one for all runs


def add_tracking(recipe: Any, tracker: str, run: Path) -> None:
    """Let the server receive what the sites send.

    Args:
        recipe: an NVFlare recipe.
        tracker: none, tensorboard, mlflow or wandb.
        run: the run's folder.
    """
    from nvflare.recipe.utils import add_experiment_tracking

    config = {}
    if tracker == "none":
        return
    if tracker == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", MLFLOW_STORE)  # simulator and POC inherit it
        names = {"experiment_name": PROJECT.name, "run_name": run.name, "experiment_tags": {}, "run_tags": {}}
        # NVFlare's server puts its own variable in there: an address, perhaps with a password, is not for the sites.
        config = {"tracking_uri": "{$MLFLOW_TRACKING_URI}", "kw_args": names}
    elif tracker == "wandb":
        import wandb

        os.environ.setdefault("WANDB_DIR", str(run.resolve()))
        if "WANDB_MODE" not in os.environ:  # whoever is not logged in is not asked in the middle of a run
            os.environ["WANDB_MODE"] = "online" if wandb.login(prompt=False) else "offline"
        arguments = {"project": PROJECT.name, "name": run.name, "group": run.name, "job_type": "site"}
        config = {"mode": os.environ["WANDB_MODE"], "wandb_args": arguments}
    add_experiment_tracking(recipe, tracker, config)


def gather(tracker: str, run: Path) -> None:
    """Bring the sites' event files from NVFlare's workspace to `run/tensorboard/<site>/`."""
    events = run / "workspace" / "server" / "simulate_job" / "tb_events"
    if tracker == "tensorboard" and events.exists():
        shutil.move(events, run / TENSORBOARD)


def add_global_curves(tracker: str, run: Path, result: dict[str, Any]) -> None:
    """Write the global model's curves beside the sites': its `val/...` by round and its final `test/...`.

    Args:
        tracker: none, tensorboard, mlflow or wandb.
        run: the run's folder.
        result: its results.json.
    """
    if tracker != "none":
        {"tensorboard": _to_tensorboard, "mlflow": _to_mlflow, "wandb": _to_wandb}[tracker](run, _curves(result))


def _curves(result: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """(rounds done, tag -> value)"""
    points = []
    for entry in result["rounds"]:
        values = {"val/acc": entry["accuracy"], "val/loss": entry.get("loss")}
        if entry is result["rounds"][-1]:
            values |= {"test/acc": result["test"]["accuracy"], "test/loss": result["test"]["loss"]}
        points.append((entry["round"], {tag: value for tag, value in values.items() if value is not None}))
    return points


def _to_tensorboard(run: Path, points: list[tuple[int, dict[str, float]]]) -> None:
    from nvflare.app_opt.tracking.tb.tb_event_writer import TensorBoardEventWriter

    writer = TensorBoardEventWriter(str(run / TENSORBOARD / "global"))
    for step, values in points:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
    writer.close()


def _to_mlflow(run: Path, points: list[tuple[int, dict[str, float]]]) -> None:
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # the screen is job.py's
    mlflow.set_experiment(PROJECT.name)
    with mlflow.start_run(run_name=f"global-{run.name}", tags={"run_name": run.name}):
        for step, values in points:
            mlflow.log_metrics(values, step=step)


def _to_wandb(run: Path, points: list[tuple[int, dict[str, float]]]) -> None:
    import wandb

    settings = wandb.Settings(silent=True)
    with wandb.init(project=PROJECT.name, name=f"global-{run.name}", group=run.name, settings=settings) as tracked:
        for step, values in points:
            tracked.log({**values, "round": step}, step=step)
