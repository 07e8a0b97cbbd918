"""Set up this project's environment: `python3 install.py` (dry run: `--plan`).

If the Python that runs this has everything in requirements.txt, it is used as
is. Otherwise .venv is created, updated, or replaced if its Python does not run:
with uv if it is on the PATH, else with venv and pip. On Linux, PyTorch comes
without CUDA unless --gpu is set. Needs only the standard library.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 (older versions fail below with a traceback)
    sys.exit(f"install.py: needs Python 3.10 or newer, but {sys.executable} is older: try python3.12 install.py")

PROJECT = Path(__file__).resolve().parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 5  # for CPU_WHEELS
PROBE_INDEX = f"import urllib.request; urllib.request.urlopen('{CPU_WHEELS}/torch/')"
CHECK_REQUIREMENTS = """
import importlib.metadata, sys
from packaging.requirements import Requirement  # a dependency of several requirements
for need in map(Requirement, sys.argv[1:]):
    version = importlib.metadata.version(need.name)  # None after an interrupted installation
    if not version or need.extras or need.marker or need.url or not need.specifier.contains(version, prereleases=True):
        sys.exit(1)  # not met, or only pip can tell
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print what would be done and exit")
    parser.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="install PyTorch with CUDA [settings.py]")
    parser.add_argument("--venv", metavar="FOLDER", help="always use this folder [.venv]")
    parser.add_argument("-r", metavar="FILE", dest="files", action="append", help="requirements [requirements.txt]")
    options = parser.parse_args()
    files = options.files or [str(PROJECT / "requirements.txt")]
    lines = [line.partition("#")[0].strip() for file in files for line in Path(file).read_text("utf-8").splitlines()]
    venv = Path(options.venv or PROJECT / ".venv").absolute()
    python = str(venv / "bin" / "python")
    is_new = not runs(python, "import sys; sys.exit(sys.version_info < (3, 10))")
    if is_new and venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        sys.exit(f"install.py: {venv} is not a virtual environment: move or remove it, then try again")
    if is_new and not options.plan:  # remove a broken one, which prepare_data.sh would use
        shutil.rmtree(venv, ignore_errors=True)
        venv.unlink(missing_ok=True)  # a file or a link
    used = sys.executable if is_new and not options.venv else python
    if runs(used, CHECK_REQUIREMENTS, *filter(None, lines)):
        print(f"{used} has all required packages")
        return
    uv, linux = shutil.which("uv"), sys.platform == "linux"
    gpu = importlib.import_module("settings").Options.gpu if options.gpu is None else options.gpu
    if options.plan:
        size = "about 1.5 GB (6 GB without CPU wheels)" if linux else "about 1.5 GB"
        size = "about 6 GB" if linux and gpu else size
        print(f"{'create' if is_new else 'update'} {options.venv or '.venv'} with {'uv' if uv else 'pip'}, {size}")
        return
    make = [uv, "venv", "--quiet", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    fill = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    fill += ([] if sys.stdout.isatty() else ["--quiet"]) + [word for file in files for word in ("-r", file)]
    if linux and not gpu:
        print(f"CPU-only PyTorch: trying {CPU_WHEELS}/torch/ (max {INDEX_TIMEOUT_S} s)", flush=True)
        if runs(sys.executable, PROBE_INDEX, limit=INDEX_TIMEOUT_S):  # a process, as DNS lookups have no timeout
            fill = ["env", "UV_TORCH_BACKEND=cpu", *fill] if uv else [*fill, "--extra-index-url", CPU_WHEELS]
        else:
            print("No answer: using the default build", flush=True)
    variables = {"PIP_RETRIES": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    with contextlib.ExitStack() as undo:
        if is_new:
            undo.callback(shutil.rmtree, venv, ignore_errors=True)
        for command in [[*make, str(venv)], fill] if is_new else [fill]:
            print(f"+ {shlex.join(command)}", flush=True)
            process = subprocess.Popen(command, env=variables)
            undo.callback(process.wait)  # on Ctrl-C, it removes its temporary files
            if process.wait() != 0:
                sys.exit(f"install.py: {shlex.join(command)} failed with exit code {process.returncode}")
        undo.pop_all()
    print(f"{python} has all required packages")


def runs(python: str, code: str, *arguments: str, limit: float | None = None) -> bool:
    """Whether a Python runs some code without an error within `limit` seconds."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([python, "-c", code, *arguments], capture_output=True, timeout=limit).returncode == 0
    return False


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"install.py: {error}")
    except KeyboardInterrupt:
        print("install.py: stopped", file=sys.stderr)
        sys.exit(130)
