"""Run one task of one simulated site in this process, without NVFlare's server: `--debug SITE`.

`breakpoint()` and a debugger work in client.py, model.py and data.py, and what they print goes to the screen.
"""

import bdb
import contextlib
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.utils.fedprox_utils import set_fedprox_metadata

from federation.launch import machine
from federation.launch.resume import Start
from federation.run.metrics import as_text
from federation.site.host import call_client
from settings import Options
from trainer import make_model


def run_task(options: Options, start: Start) -> None:
    """Train the initial model, or that of `--resume`, at `options.debug` for a round. Leaves nothing behind."""
    assert options.debug
    options.threads = machine.n_threads(options.n_clients)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.manual_seed(options.seed)
    weights = torch.load(start.model, weights_only=True) if start.model else make_model(options).state_dict()
    received = FLModel(params_type=ParamsType.FULL, params=weights, current_round=start.first_round)
    if options.algorithm == "fedprox":
        set_fedprox_metadata(received, options.fedprox_mu)
    elif options.algorithm == "scaffold":
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        received.meta[AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL] = zeros
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(Options, "of_job", return_value=options),  # there is no job with an options.json
        contextlib.suppress(bdb.BdbQuit),
    ):
        answer = call_client(options.debug, AppConstants.TASK_TRAIN, received, Path(folder))
        metrics = ", ".join(f"{name} {as_text(value)}" for name, value in sorted((answer.metrics or {}).items()))
        print(f"\n{options.debug} would send {len(answer.params)} tensors, and of the model it received: {metrics}")
