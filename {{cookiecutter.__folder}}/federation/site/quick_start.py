"""Import Lightning in two thirds of the time, and create Trainers faster. Must be imported before Lightning.

If torchvision and scipy are installed, torchmetrics imports them for image and audio metrics that this project does not
use, which takes 2 s of 7 in every process. This module makes it believe that they are not installed. If your model uses
such metrics (LPIPS, mean average precision, ...), remove all imports of this module.

For each new Trainer, Lightning reads the entry points of every installed package, in search of callbacks, and the
Trainer's own signature. A simulation creates a Trainer for each task of each site: here, both are read once.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

from lightning_utilities.core import imports

UNUSED = ("torchvision", "scipy")


def _version(name: str, real: Callable[[str], str] = imports._version) -> str:
    if name in UNUSED:
        raise PackageNotFoundError(name)
    return real(name)


def _package_available(name: str, real: Callable[[str], bool] = imports.package_available) -> bool:
    return name not in UNUSED and real(name)


with patch.multiple(imports, _version=_version, package_available=_package_available):
    from lightning_fabric.utilities import registry
    from pytorch_lightning import Trainer

registry.entry_points = cache(registry.entry_points)  # type: ignore[assignment,attr-defined]
Trainer.__signature__ = inspect.signature(Trainer)  # type: ignore[attr-defined]
