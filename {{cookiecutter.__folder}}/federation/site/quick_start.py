"""Import torchmetrics, and with it Lightning, in two thirds of the time. Imported before Lightning, for its effect.

torchmetrics imports torchvision and scipy.signal wherever they are installed, for metrics on images and sound that
this project does not use: 2 s of 7, in every process. Here it is told that they are not installed. A model that uses
such metrics (LPIPS, mean average precision, ...) needs them: then remove the import of this module from client.py
and job.py.
"""

from collections.abc import Callable
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
    import torchmetrics  # noqa: F401
