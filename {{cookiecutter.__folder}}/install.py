"""Make this project's environment: `python3 install.py`. What that would do: `python3 install.py --plan`.

The Python that runs this is used as it is if it has all of requirements.txt. Otherwise .venv is made or completed, or
replaced if its Python does not run: by uv if it is on the PATH, else by venv and pip. On Linux without GPUs, PyTorch
comes without CUDA. Needs nothing but the standard library.
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

if sys.version_info < (3, 10):  # noqa: UP036 (what follows would end in a traceback)
    sys.exit(f"install.py: Python 3.10 or newer is needed, and {sys.executable} is older: try python3.12 install.py")

PROJECT = Path(__file__).resolve().parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 5  # how long that index may take to answer
PROBE_INDEX = f"import urllib.request; urllib.request.urlopen('{CPU_WHEELS}/torch/')"
CHECK_REQUIREMENTS = """
import importlib.metadata, sys
from packaging.requirements import Requirement  # several of the requirements bring it along
for need in map(Requirement, sys.argv[1:]):
    version = importlib.metadata.version(need.name)  # None where an installation broke off
    if not version or need.extras or need.marker or need.url or not need.specifier.contains(version, prereleases=True):
        sys.exit(1)  # not met, or for pip to judge
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="PyTorch with CUDA [settings.py]")
    parser.add_argument("--venv", metavar="FOLDER", help="use this folder, whatever this Python has [.venv]")
    parser.add_argument("-r", metavar="FILE", dest="files", action="append", help="what is needed [requirements.txt]")
    options = parser.parse_args()
    files = options.files or [str(PROJECT / "requirements.txt")]
    lines = [line.partition("#")[0].strip() for file in files for line in Path(file).read_text("utf-8").splitlines()]
    venv = Path(options.venv or PROJECT / ".venv").absolute()
    python = str(venv / "bin" / "python")
    is_new = not runs(python, "import sys; sys.exit(sys.version_info < (3, 10))")
    if is_new and venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        sys.exit(f"install.py: {venv} is no virtual environment: remove it or move it away, and try again")
    if is_new and not options.plan:  # a broken one must go: prepare_data.sh would take it
        shutil.rmtree(venv, ignore_errors=True)
        venv.unlink(missing_ok=True)  # a file, or a link
    used = sys.executable if is_new and not options.venv else python
    if runs(used, CHECK_REQUIREMENTS, *filter(None, lines)):
        print(f"{used} has all that is needed")
        return
    uv, linux = shutil.which("uv"), sys.platform == "linux"
    gpu = importlib.import_module("settings").Options.gpu if options.gpu is None else options.gpu
    if options.plan:
        size = "about 1.5 GB, or about 6 GB where PyTorch without CUDA cannot be had" if linux else "about 1.5 GB"
        size = "about 6 GB" if linux and gpu else size
        print(f"{'make' if is_new else 'complete'} {options.venv or '.venv'} with {'uv' if uv else 'pip'}, {size}")
        return
    make = [uv, "venv", "--quiet", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    fill = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    fill += ([] if sys.stdout.isatty() else ["--quiet"]) + [word for file in files for word in ("-r", file)]
    if linux and not gpu:
        print(f"Asking {CPU_WHEELS}/torch/ for PyTorch without CUDA, for at most {INDEX_TIMEOUT_S} s", flush=True)
        if runs(
            sys.executable, PROBE_INDEX, limit=INDEX_TIMEOUT_S
        ):  # in a process, as looking up a name knows no time-out
            fill = ["env", "UV_TORCH_BACKEND=cpu", *fill] if uv else [*fill, "--extra-index-url", CPU_WHEELS]
        else:
            print("No answer: taking the default one", flush=True)
    variables = {"PIP_RETRIES": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    with contextlib.ExitStack() as undo:
        if is_new:
            undo.callback(shutil.rmtree, venv, ignore_errors=True)
        for command in [[*make, str(venv)], fill] if is_new else [fill]:
            print(f"+ {shlex.join(command)}", flush=True)
            process = subprocess.Popen(command, env=variables)
            undo.callback(process.wait)  # Ctrl-C has reached it as well, and it removes its temporary files
            if process.wait() != 0:
                sys.exit(f"install.py: {shlex.join(command)} failed with exit code {process.returncode}")
        undo.pop_all()
    print(f"{python} has all that is needed")


def runs(python: str, code: str, *arguments: str, limit: float | None = None) -> bool:
    """Tell whether a Python runs some code to its end without an error, within `limit` seconds."""
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
