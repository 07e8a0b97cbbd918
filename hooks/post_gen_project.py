"""Set up the new project: its environment, its data, one round as a check. Whatever fails, the project stays whole.

Cookiecutter renders this file with the answers, runs it in the new folder, and removes that folder where it exits with
an error. So it does that only if FL_TEMPLATE_STRICT=1 asks for it. It needs nothing but the standard library.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

CPU_WHEELS = "https://download.pytorch.org/whl/cpu/"
DOWNLOADS = {"cifar10": "170 MB", "fashion_mnist": "30 MB", "bloodmnist": "35 MB"}
OWN = ".venv/bin/python"  # the project's interpreter, where it has one of its own
BOUNDED = {"PIP_RETRIES": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # what the user has set goes before
INTERRUPTED = "interrupted"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # nobody reads any more: not the project's fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def signals_held_back():
    """Let Ctrl-C and its like wait until a process that is being started is known, so that it can be ended."""
    received = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda *_: received.append(True))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


def run(command: list[str], quiet: bool = False, **variables: str) -> str:
    """Run a command in the project; return "" if it succeeded, else in a few words why not. It never raises."""
    child, output = None, subprocess.DEVNULL if quiet else None
    try:
        # In a session of its own, so that Ctrl-C reaches it from here alone, and everything it has started with it.
        with signals_held_back():
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**BOUNDED, **os.environ, **variables},
                start_new_session=True,
            )
        code = child.wait()
        return f"{shlex.join(command)} ended with exit code {code}" if code else ""
    except OSError as error:
        return f"cannot run {command[0]}: {error.strerror}"
    except KeyboardInterrupt:
        if child:
            end(child)
        return INTERRUPTED


def end(child: subprocess.Popen) -> None:
    """End a process and its group: with the chance to tidy up, and by force after 10 seconds or a second Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(child.pid, number)
            child.wait(timeout=10)


@contextlib.contextmanager
def terminal_for_us():
    """Have Ctrl-C to ourselves, as a shell's job has: cookiecutter would abort at once, and cruft before it is done."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no terminal
            terminal = os.open("/dev/tty", os.O_RDWR)
            stack.callback(os.close, terminal)
            caller = os.getpgrp()
            if os.tcgetpgrp(terminal) == caller:  # else this runs in the background
                os.setpgid(0, 0)
                for number in (signal.SIGTTOU, signal.SIGTSTP):  # the shell would not see that Ctrl-Z has stopped us
                    signal.signal(number, signal.SIG_IGN)
                stack.enter_context(contextlib.suppress(OSError))
                stack.callback(os.tcsetpgrp, terminal, caller)
                os.tcsetpgrp(terminal, os.getpgrp())
        yield


def is_comparison(answers: dict, project: Path) -> bool:
    """Tell whether `cruft update` or `cruft diff` renders the project, only to compare it and throw it away."""
    temporary = project.parent.parent == Path(tempfile.gettempdir()).resolve()
    return "_commit" in answers and temporary and bool(re.fullmatch("tmp[a-z0-9_]{8}", project.parent.name))


def requirements() -> list[str]:
    lines = Path("requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition("#")[0].strip() for line in lines if re.match(r"\w", line)]


def lacking() -> list[str]:
    """Return the project's requirements that this interpreter does not meet. It imports none: PyTorch takes seconds."""

    def release(version: str) -> list[int]:
        return ([int(part) for part in re.findall(r"\d+", version.partition("+")[0])] + [0] * 9)[:9]

    found = []
    for requirement in requirements():
        try:
            version = importlib.metadata.version(re.match(r"[\w.-]+", requirement)[0]) or "0"
        except (importlib.metadata.PackageNotFoundError, KeyError):
            version = "0"
        bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
        if version == "0" or any((release(version) >= release(bound)) != (sign == ">=") for sign, bound in bounds):
            found.append(requirement)
    return found


def has_answer(address: str, seconds: float = 5) -> bool:
    """Tell whether an address answers in time, which a socket's own time-out, one for each try, does not ensure."""
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception), urllib.request.urlopen(address, timeout=seconds):
            answers.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(answers)


def wants_cpu_wheels(answers: dict) -> bool:
    return sys.platform == "linux" and not answers["use_gpu"]


def choose() -> str:
    """Return the interpreter that has all the project needs, or "" where there is none; remove a broken .venv."""
    own = Path(".venv")
    if os.path.lexists(own) and (reason := run([OWN, "-c", ""], quiet=True)):
        if reason == INTERRUPTED:
            raise KeyboardInterrupt
        say("The .venv that is here is broken: it is removed")
        shutil.rmtree(own) if own.is_dir() and not own.is_symlink() else own.unlink()
    if os.path.lexists(own):  # the project's own programs prefer it
        return "" if run([OWN, __file__, "lacking"], quiet=True) else OWN
    return "" if lacking() else sys.executable


def install(answers: dict) -> str:
    """Make .venv, or complete the one that is there. Return why it could not be done, else ""."""
    uv = shutil.which("uv")
    if not os.path.lexists(".venv"):
        make = [uv, "venv", "--python", sys.executable, ".venv"] if uv else [sys.executable, "-m", "venv", ".venv"]
        if reason := run(make):
            shutil.rmtree(".venv", ignore_errors=True)  # the half of one would stand in the way
            return reason
    add = [uv, "pip", "install", "--python", OWN] if uv else [OWN, "-m", "pip", "install"]
    if wants_cpu_wheels(answers):
        say(f"Asking {CPU_WHEELS} for wheels without CUDA, for at most 5 seconds")
        torch = [requirement for requirement in requirements() if re.match(r"torch(vision)?\b", requirement)]
        if not has_answer(CPU_WHEELS):
            say("No answer: taking the default ones")
        elif reason := run([*add, "--index-url", CPU_WHEELS, *torch]):
            if reason == INTERRUPTED:
                return reason
            say(f"{reason}: taking the default ones")
    return run([*add, "-r", "requirements.txt"])


def by_hand(answers: dict, python: str = OWN) -> list[list[str]]:
    """Return the commands that do each step by hand: environment, data, check."""
    make = ["python3 -m venv .venv"]
    if wants_cpu_wheels(answers):
        make += [f".venv/bin/pip install --index-url {CPU_WHEELS} torch torchvision  # saves about 4 GB"]
    make += [".venv/bin/pip install -r requirements.txt"]
    fetch = "sh prepare_data.sh" if python == OWN else f"PYTHON={shlex.quote(python)} sh prepare_data.sh"
    if answers["dataset"] == "image_folder":
        fetch = f"FL_DATA_ROOT=FOLDER {fetch}  # FOLDER has a folder of images for each class"
    return [make, [fetch], [f"{shlex.quote(python)} job.py --check"]]


def show_commands(title: str, commands: list[str]) -> None:
    say("\n".join(["", title, *(f"  {command}" for command in commands)]))


def plan(answers: dict, python: str) -> str:
    size = ", about 6 GB" if sys.platform == "linux" else ""
    if wants_cpu_wheels(answers):
        size += ", about 4 GB less where PyTorch's CPU wheels can be had"
    tool = "uv" if shutil.which("uv") else "venv and pip"
    data = DOWNLOADS.get(answers["dataset"])
    return "\n".join(
        [
            "Setting up the project. Ctrl-C stops it at any time and leaves the project whole.",
            f"  1. environment: {f'{python} has all it needs' if python else f'into .venv with {tool}{size}'}",
            f"  2. data: {answers['dataset']}, " + (f"{data} unless they are in the cache" if data else "no download"),
            "  3. check: one short round, about half a minute",
        ]
    )


def step(title: str, work, *arguments, **variables) -> str:
    """Do one step, show how long it took, and return why it failed, else ""."""
    say(f"\n== {title}")
    start = time.monotonic()
    reason = work(*arguments, **variables)
    say(f"== {title}: {'failed' if reason else 'done'} ({time.monotonic() - start:.0f} s)")
    return reason


def set_up(answers: dict, project: Path) -> bool:
    """Do all steps that can be done, and tell whether all went well."""
    enter, steps = f"cd {shlex.quote(str(project))}", by_hand(answers)

    def not_verified(reason: str, first: int) -> bool:
        say(f"\nNOT VERIFIED: {reason}")
        show_commands("To try again:", [enter, *sum(steps[first:], [])])
        return False

    if re.search(r"\s", str(project)):
        return not_verified("NVFlare cannot run in a folder whose path has spaces: move the project first", 0)
    first = 0
    try:
        python = choose()
        say(plan(answers, python))
        if not python:
            if reason := step("1/3 environment", install, answers):
                return not_verified(f"there is no environment: {reason}", 0)
            python = OWN
        steps, first, data_missing, check = by_hand(answers, python), 1, "", [python, "job.py", "--check"]
        if answers["dataset"] == "image_folder" and not os.environ.get("FL_DATA_ROOT"):
            say("\n== 2/3 data: skipped, as FL_DATA_ROOT does not say where your images are")
        else:
            data_missing = step("2/3 data", run, ["sh", "prepare_data.sh"], PYTHON=python)
        if data_missing == INTERRUPTED:
            return not_verified(INTERRUPTED, 1)
        if data_missing:  # else the check would wait for every mirror once more
            reason = step("3/3 check, with digits", run, [*check, "--dataset", "digits"], FL_DATA_ROOT="")
        else:
            reason = step("3/3 check", run, check)
        if reason:
            return not_verified(f"{reason}; what it says is above", 1 if data_missing else 2)
    except KeyboardInterrupt:
        return not_verified(INTERRUPTED, first)
    except Exception as error:  # a full disk, a folder that cannot be read: no reason to lose the project
        return not_verified(f"{type(error).__name__}: {error}", first)
    if data_missing:
        show_commands(f"The data could not be fetched: {data_missing}. To try again, there:", steps[1])
    show_commands("Next:", [enter, f"{shlex.quote(python)} job.py"])
    return not data_missing


def main(answers: dict) -> int:
    """Return the exit code: 0 whatever fails, so that the project stays, unless FL_TEMPLATE_STRICT=1."""
    project = Path.cwd()
    if is_comparison(answers, project):
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show
    if answers["setup"] == "skip" or os.name != "posix":
        commands = [f"cd {shlex.quote(str(project))}", *sum(by_hand(answers), [])]
        show_commands("Nothing is set up, as you wished. By hand (on Windows: in WSL2):", commands)
        return 0
    for number in SIGNALS:  # each ends what is started here
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    with terminal_for_us():
        done = set_up(answers, project)
    return 0 if done or os.environ.get("FL_TEMPLATE_STRICT") != "1" else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["lacking"]:  # asked of .venv's interpreter by choose()
        sys.exit("\n".join(lacking()) or 0)
    if sys.argv[1:] == ["wants-cpu-wheels"]:  # asked by the template's Makefile
        sys.exit(not (wants_cpu_wheels({"use_gpu": False}) and has_answer(CPU_WHEELS)))
    # The answers as JSON in a Python literal, whatever characters they hold. There is no other template code here.
    sys.exit(main(json.loads({{cookiecutter | tojson | tojson}})))  # noqa: F821
