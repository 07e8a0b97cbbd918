"""The classes of model.py, without waiting for PyTorch where that can be avoided."""

import ast
import builtins
import re
import sys
from pathlib import Path

from federation.errors import UserError

NON_MODEL_PACKAGES = {
    *sys.stdlib_module_names,
    "torch",
    "torchmetrics",
    "torchvision",
    "pytorch_lightning",
    "lightning",
}


def model_names(file: Path) -> list[str]:
    """The classes that may derive from LightningModule. The file is read, not imported, which takes seconds.

    A base class that comes from elsewhere can be anything: `check_model` decides once model.py is imported.

    Raises:
        UserError: it is not Python.
    """
    try:
        code = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"model.py, line {error.lineno}: {error.msg}") from None
    found = []
    others = set(dir(builtins))  # names that do not lead to a LightningModule
    for node in code.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = getattr(node, "module", None) or alias.name
                if module.split(".")[0] in NON_MODEL_PACKAGES and alias.name != "LightningModule":
                    others.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ClassDef):
            bases = [re.split(r"[^\w.]", ast.unparse(base))[0] for base in node.bases]
            if all(base.split(".")[0] in others and not base.endswith(".LightningModule") for base in bases):
                others.add(node.name)
            else:
                found.append(node.name)
    return found


def check_model(name: str) -> None:
    """Import model.py, which takes seconds, and see that it has this LightningModule.

    Raises:
        UserError: it cannot be imported, or the class derives from something else.
    """
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    from pytorch_lightning import LightningModule

    try:
        import model
    except Exception as error:  # whatever a user's file raises
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"model.py cannot be imported ({fault}): see where with  python -c 'import model'") from None
    if not issubclass(getattr(model, name), LightningModule):
        raise UserError(f"--model is {name!r}: that class of model.py does not derive from LightningModule")
