"""Experiment tracking: TensorBoard, MLflow or Weights & Biases, through NVFlare's receivers on the server.

The sites send the metrics of federation/site/progress.py. The global model's curves are added here at the end of a
run: they are means over the sites, which no site knows.
"""

import logging
import os
import shutil
from typing import Any

from federation.run.folder import PROJECT, RUNS, RunFolder


def environment(tracker: str, run: RunFolder) -> dict[str, str]:
    """The environment variables that the tracker's library reads; those already set take precedence."""
    values = {}
    if tracker == "mlflow":  # one database for all runs
        values = {"MLFLOW_TRACKING_URI": f"sqlite:///{PROJECT / RUNS}/mlflow.db"}
    elif tracker == "wandb":
        import wandb

        # Do not prompt for a login in the middle of a run.
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        values = {"WANDB_DIR": str(run.path.resolve()), "WANDB_MODE": mode}
    return {name: os.environ.get(name, value) for name, value in values.items()}


def add_tracking(recipe: Any, tracker: str, run: RunFolder, environment: dict[str, str]) -> None:
    """Make the server of this NVFlare recipe receive what the sites send."""
    from nvflare.recipe.utils import add_experiment_tracking

    config = {}
    if tracker == "none":
        return
    if tracker == "mlflow":
        names = {"experiment_name": PROJECT.name, "run_name": run.name, "experiment_tags": {}, "run_tags": {}}
        # NVFlare's server fills in its own variable, so that no URI, perhaps with a password, reaches the sites.
        config = {"tracking_uri": "{$MLFLOW_TRACKING_URI}", "kw_args": names}
    elif tracker == "wandb":
        arguments = {"project": PROJECT.name, "name": run.name, "group": run.name, "job_type": "site"}
        config = {"mode": environment["WANDB_MODE"], "wandb_args": arguments}
    add_experiment_tracking(recipe, tracker, config)


def collect(tracker: str, run: RunFolder) -> None:
    """Move the sites' event files from where NVFlare's server left them to the run's `tensorboard/<site>/`."""
    events = run.server / "tb_events"
    if tracker == "tensorboard" and events.exists():
        shutil.move(events, run.tensorboard)


def add_global_curves(tracker: str, run: RunFolder, result: dict[str, Any], environment: dict[str, str]) -> None:
    """Write the global model's curves next to those of the sites: `val/...` per round and the final `test/...`.

    `result` is the content of the run's results.json.
    """
    rounds, test = result["rounds"], result["test"]
    curves = {entry["round"]: {"val/acc": entry["accuracy"], "val/loss": entry.get("loss")} for entry in rounds}
    curves[rounds[-1]["round"]] |= {"test/acc": test["accuracy"], "test/loss": test["loss"]}
    points = [(step, {tag: v for tag, v in values.items() if v is not None}) for step, values in curves.items()]
    if tracker == "tensorboard":
        from nvflare.app_opt.tracking.tb.tb_event_writer import TensorBoardEventWriter

        writer = TensorBoardEventWriter(str(run.tensorboard / "global"))
        for step, values in points:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        writer.close()
    elif tracker == "mlflow":
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # keep it off job.py's screen
        mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
        mlflow.set_experiment(PROJECT.name)
        with mlflow.start_run(run_name=f"global-{run.name}", tags={"run_name": run.name}):
            for step, values in points:
                mlflow.log_metrics(values, step=step)
    elif tracker == "wandb":
        import wandb

        names = {"project": PROJECT.name, "name": f"global-{run.name}", "group": run.name}
        place: Any = {"dir": environment["WANDB_DIR"], "mode": environment["WANDB_MODE"]}
        with wandb.init(**names, **place, settings=wandb.Settings(silent=True)) as tracked:
            for step, values in points:
                tracked.log({**values, "round": step}, step=step)
