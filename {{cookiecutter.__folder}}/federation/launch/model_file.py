"""Find and check the classes of model.py, without importing PyTorch if possible."""

import ast
import builtins
import re
import sys
from pathlib import Path

from federation.errors import UserError

NOT_MODELS = {*sys.stdlib_module_names, "torch", "torchmetrics", "torchvision", "pytorch_lightning", "lightning"}


def model_names(file: Path) -> list[str]:
    """The classes that may derive from LightningModule. The file is parsed, as importing it takes seconds.

    A base class imported from elsewhere could be anything: `check_model` decides after importing model.py.

    Raises:
        UserError: the file has a syntax error.
    """
    try:
        code = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"model.py, line {error.lineno}: {error.msg}") from None
    found = []
    others = set(dir(builtins))  # names that are not LightningModules
    for node in code.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = getattr(node, "module", None) or alias.name
                if module.split(".")[0] in NOT_MODELS and alias.name != "LightningModule":
                    others.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ClassDef):
            bases = [re.split(r"[^\w.]", ast.unparse(base))[0] for base in node.bases]
            if all(base.split(".")[0] in others and not base.endswith(".LightningModule") for base in bases):
                others.add(node.name)
            else:
                found.append(node.name)
    return found


def check_model(name: str) -> None:
    """Import model.py, which takes seconds, and check that this class is a LightningModule.

    Raises:
        UserError: model.py cannot be imported, or the class does not derive from LightningModule.
    """
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    from pytorch_lightning import LightningModule

    try:
        import model
    except Exception as error:  # whatever a user's file raises
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot import model.py ({fault}): for the traceback, run  python -c 'import model'") from None
    if not issubclass(getattr(model, name), LightningModule):
        raise UserError(f"--model is {name!r}: that class in model.py does not derive from LightningModule")
