"""Make this project's environment: `python3 install.py`. What that would do: `python3 install.py --plan`.

The Python that runs this is used as it is where it has all of requirements.txt. Else .venv is made, with uv where that
is on the PATH, else with venv and pip. One that is there is completed; one that does not run is replaced.
On Linux without GPUs, PyTorch comes without CUDA. Needs nothing but the standard library.
"""

import argparse
import contextlib
import importlib.metadata
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 (what follows would end in a traceback)
    sys.exit(f"install.py: Python 3.10 or newer is needed, and {sys.executable} is older: try python3.12 install.py")

PROJECT = Path(__file__).resolve().parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
ANSWER_S = 5  # that index has so many seconds to answer
BOUNDS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}


class InstallError(Exception):
    """The environment cannot be had. One line for the user."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plan", action="store_true", help="say what would be done, and do nothing")
    add("--gpu", action=argparse.BooleanOptionalAction, help="PyTorch with CUDA [settings.py]")
    add("--venv", metavar="FOLDER", type=Path, help="use this folder, whatever this Python has [.venv]")
    add("-r", metavar="FILE", dest="files", type=Path, action="append", help="what is needed [requirements.txt]")
    add("--lacking", action="store_true", help="list what this Python lacks, and do nothing")
    options = parser.parse_args(arguments)
    options.files = options.files or [PROJECT / "requirements.txt"]
    try:
        if options.lacking:
            print(*lacking(options.files), sep="\n", end="")
        else:
            install(options)
        return 0
    except (InstallError, OSError) as error:
        print(f"install.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install.py: stopped", file=sys.stderr)
        return 130


def install(options: argparse.Namespace) -> None:
    """Find or make a Python that has all that is needed. What was made is removed again where that fails.

    Raises:
        InstallError: a command failed; what it said is on the screen.
    """
    venv = (options.venv or PROJECT / ".venv").absolute()
    python = venv / "bin" / "python"
    lacks = ask(python, options.files)
    is_new = lacks is None
    if is_new and venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise InstallError(f"{venv} is no virtual environment: remove it or move it away, and try again")
    if is_new and not options.venv and not lacking(options.files):
        if not options.plan:
            remove(venv)  # a broken one: prepare_data.sh would take it
        python, lacks = sys.executable, []
    if lacks == []:
        print(f"{python} has all that is needed", flush=True)
        return
    uv = shutil.which("uv")
    without_cuda = sys.platform == "linux" and not wants_gpu(options)
    if options.plan:
        size = "about 6 GB" if sys.platform == "linux" else "about 1.5 GB"
        if without_cuda:
            size = f"about 1.5 GB, or {size} where PyTorch without CUDA cannot be had"
        verb, tool = "make" if is_new else "complete", "uv" if uv else "pip"
        print(f"{verb} {options.venv or '.venv'} with {tool}, {size}", flush=True)
        return
    try:
        if is_new:
            remove(venv)
            call(*([uv, "venv", "--quiet", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]), venv)
        fill(python, uv, lacks or read(options.files), options.files, without_cuda)
    except BaseException:
        if is_new:
            remove(venv)
        raise
    print(f"{python} has all that is needed", flush=True)


def wants_gpu(options: argparse.Namespace) -> bool:
    if options.gpu is None:
        import settings  # not there in the template, whose make says --no-gpu

        return settings.USE_GPU
    return options.gpu


def fill(python: Path, uv: str | None, lacks: list[str], files: list[Path], without_cuda: bool) -> None:
    """Install what is needed, PyTorch first where it comes from an index of its own."""
    add: list[str | Path] = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    if not sys.stdout.isatty():
        add.append("--quiet")
    torch = [line for line in lacks if name_of(line) in ("torch", "torchvision")]
    if torch and without_cuda and has_answer(f"{CPU_WHEELS}/torch/"):
        try:
            call(*add, "--index-url", CPU_WHEELS, *torch)
        except InstallError as error:
            print(f"{error}: taking the default one", flush=True)
    call(*add, *(word for file in files for word in ("-r", file)))


def read(files: list[Path]) -> list[str]:
    """All requirements in some files, without comments."""
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def lacking(files: list[Path]) -> list[str]:
    """The requirements that this Python does not meet, or that only pip can judge. It imports none: PyTorch is slow."""
    return [line for line in read(files) if not is_met(line)]


def is_met(requirement: str) -> bool:
    name = name_of(requirement)
    bounds = [re.fullmatch(r"(>=|<|==)([\d.]+)", part) for part in requirement[len(name) :].split(",") if part]
    try:
        version = numbers(importlib.metadata.version(name))
    except (ImportError, KeyError, TypeError, ValueError):  # not there, or only what a broken installation left
        return False
    return all(bound and BOUNDS[bound[1]](version, numbers(bound[2])) for bound in bounds)


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def numbers(version: str) -> list[int]:
    """2.9.1+cpu -> [2, 9, 1, 0]"""
    found = re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])
    return ([int(number) for number in found] + [0] * 4)[:4]


def remove(venv: Path) -> None:
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)


def has_answer(address: str) -> bool:
    """Tell whether an address answers in time. In a thread, since the look-up of a name knows no time-out."""
    answers = []

    def ask_for_it() -> None:
        with contextlib.suppress(Exception), urllib.request.urlopen(address, timeout=ANSWER_S):
            answers.append(True)

    print(f"Asking {address} for PyTorch without CUDA, for at most {ANSWER_S} s", flush=True)
    thread = threading.Thread(target=ask_for_it, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not answers:
        print("No answer: taking the default one", flush=True)
    return bool(answers)


def ask(python: Path, files: list[Path]) -> list[str] | None:
    """What another Python lacks. None where it does not run."""
    command = [python, __file__, "--lacking", *(word for file in files for word in ("-r", file))]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def call(*command: str | Path) -> None:
    words = [str(word) for word in command]
    print(f"+ {shlex.join(words)}", flush=True)
    try:
        process = subprocess.Popen(words, env={"PIP_RETRIES": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ})
    except OSError as error:
        raise InstallError(f"{words[0]} cannot be run: {error.strerror}") from None
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C has reached it as well, and it removes its temporary files
        raise
    if code != 0:
        raise InstallError(f"{shlex.join(words)} failed with exit code {code}")


if __name__ == "__main__":
    sys.exit(main())
