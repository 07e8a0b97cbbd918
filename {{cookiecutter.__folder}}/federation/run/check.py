"""Judge a run by its outcome: did every site report, and is there a new global model?"""

from pathlib import Path
from typing import Any

import torch

import model as models


def find_fault(folder: Path, result: dict[str, Any], sites: list[str], n_classes: int) -> str | None:
    """Say what is wrong with a finished run, or None.

    Args:
        folder: the run's folder.
        result: its results.json.
        sites: those that took part.
        n_classes: what the model was made for.
    """
    silent = [site for site in sites if site not in result["test"]["sites"]]
    if silent:
        return f"no word from {', '.join(silent)}"
    initial = torch.load(folder / "bundle" / "initial.pt", weights_only=True)
    final = torch.load(folder / result["model"], weights_only=True)
    name = result["model_class"]
    model = getattr(models, name)(num_classes=n_classes, learning_rate=result["learning_rate"])
    try:
        model.load_state_dict(final)
    except RuntimeError as error:
        return f"the new global model does not load into {name}: {str(error).splitlines()[-1].strip()}"
    if all(torch.allclose(initial[name], final[name]) for name in initial):  # averaging alone rounds the last bits
        return "the new global model is the same as the initial one"
    if not all(torch.isfinite(tensor).all() for tensor in final.values()):
        return "the new global model is not finite"
    return None
