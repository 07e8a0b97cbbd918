"""Set up the new project: its environment, its data, one round as a check. The project's own commands do it.

Cookiecutter renders this file with the answers, runs it in the new folder, and removes that folder where it exits with
an error. So it does that only if FL_TEMPLATE_STRICT=1 asks for it: whatever fails, the project stays whole.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VENV_PYTHON = ".venv/bin/python"  # what install.py makes, unless the Python that runs it has all that is needed
MANUAL_STEPS = [
    "python3 install.py",
    "sh prepare_data.sh",
    f"{VENV_PYTHON} job.py --check  # python3, where no .venv was needed",
]
DOWNLOADS = {"cifar10": "170 MB", "fashion_mnist": "30 MB", "bloodmnist": "35 MB"}
UNSUPPORTED_PATH = r"[\s'\"\\#]"  # in a project's path, as in its federation/launch/options.py
received: list[bool] = []  # signals: the first one ends the command that runs, and no step is begun after it


def say(*lines: str, end: str = "\n") -> None:
    try:
        print(*lines, sep="\n", end=end, flush=True)
    except OSError:  # nobody reads any more: not the project's fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(*command: str, limit: float = float("inf"), **variables: str) -> str:
    """Run a command in the project; return "" if it succeeded, else in a few words why not. It never raises."""
    environment = {**os.environ, **variables}
    try:  # in a session of its own, so that Ctrl-C reaches it from here alone, and all that it has started with it
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    except OSError as error:
        return f"cannot run {command[0]}: {error.strerror}"
    deadline = time.monotonic() + limit
    while process.poll() is None and not received and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.returncode is None:
        for number in (signal.SIGINT, signal.SIGKILL):  # first with the chance to tidy up
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=15)
        return "interrupted" if received else f"not done after {limit:.0f} s"
    return f"exit code {process.returncode}" if process.returncode else ""


def step(title: str, *command: str, **options: Any) -> str:
    """Run the command of one step and show how long it took. Return "" if it succeeded, else why not."""
    if received:
        return "interrupted"
    say(f"\n== {title}: {shlex.join(command)}")
    start = time.monotonic()
    reason = run(*command, **options)
    say(f"== {title}: {reason or 'done'} ({time.monotonic() - start:.0f} s)")
    return reason


def set_up(dataset: str) -> tuple[list[str], list[str]]:
    """Do all steps that can be done; return what went wrong, and the commands to type next."""
    limit, data_limit = os.environ.get("FL_CHECK_TIMEOUT") or "300", os.environ.get("FL_DATA_TIMEOUT") or "600"
    if re.search(UNSUPPORTED_PATH, os.getcwd()):
        where = "a folder whose path has spaces, quotes, \\ or #"
        return [f"NOT VERIFIED: NVFlare cannot run in {where}: move the project first"], MANUAL_STEPS
    if not limit.isdecimal():
        return [f"NOT VERIFIED: FL_CHECK_TIMEOUT is a whole number of seconds, not {limit!r}"], MANUAL_STEPS
    size = f"{DOWNLOADS.get(dataset)} unless they are in the cache, at most {data_limit} s (FL_DATA_TIMEOUT)"
    say("\nSetting up the project. Ctrl-C stops it at any time and leaves the project whole.")
    say("  1. environment: ", end="")
    run(sys.executable, "install.py", "--plan")
    say(f"  2. data: {dataset}, {size if dataset in DOWNLOADS else 'no download'}")
    say(f"  3. check: one short round, about half a minute, at most {limit} s (FL_CHECK_TIMEOUT)")

    if reason := step("1/3 environment", sys.executable, "install.py"):
        return [f"NOT VERIFIED: there is no environment: {reason}, see above"], MANUAL_STEPS
    python = VENV_PYTHON if os.path.exists(VENV_PYTHON) else sys.executable
    job, check, wrong, todo = f"{shlex.quote(python)} job.py", [python, "job.py", "--check"], [], []
    on_digits, flags, variables = ["--dataset", "digits"], [], {}
    if dataset == "digits":
        say("\n== 2/3 data: nothing to fetch, scikit-learn brings the digits along")
    elif dataset == "image_folder" and not os.environ.get("FL_DATA_ROOT"):
        say("\n== 2/3 data: skipped, as FL_DATA_ROOT does not say where your images are; the check takes digits")
        job += " --data_root FOLDER  # with your images: FOLDER/train/<class>/<image>"
        flags = on_digits
    elif reason := step("2/3 data", "sh", "prepare_data.sh", PYTHON=python):
        wrong = [f"{dataset} could not be fetched: {reason}, see above"]
        todo = ["sh prepare_data.sh" if python == VENV_PYTHON else f"PYTHON={shlex.quote(python)} sh prepare_data.sh"]
        flags, variables = on_digits, {"FL_DATA_ROOT": ""}  # else the check would ask every mirror once more
    if reason := step("3/3 check", *check, *flags, limit=int(limit), **variables):
        wrong.append(f"NOT VERIFIED: {reason}, see above")
        todo.append(shlex.join(check))
    return wrong, todo or [job]


@contextlib.contextmanager
def terminal_for_us() -> Iterator[None]:
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


def is_comparison(answers: dict[str, Any]) -> bool:
    """Tell whether `cruft update` or `cruft diff` renders the project, only to compare it and throw it away."""
    folder = Path.cwd().parent
    named = "_commit" in answers and bool(re.fullmatch("tmp[a-z0-9_]{8}", folder.name))
    return named and folder.parent == Path(tempfile.gettempdir()).resolve()


def main(answers: dict[str, Any]) -> int:
    """Return the exit code: 0 whatever fails, so that the project stays, unless FL_TEMPLATE_STRICT=1."""
    if is_comparison(answers):
        return 0
    if sys.stdout:  # it may have to show a path that the terminal cannot
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    wrong: list[str] = []
    todo, title = MANUAL_STEPS, "Nothing is set up, as you wished. By hand (on Windows: in WSL2):"
    if answers["setup"] == "full" and os.name == "posix":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: received.append(True))
        with terminal_for_us():
            wrong, todo = set_up(answers["dataset"])
        title = "To try again:" if wrong else "Next:"
    say("", *wrong, title, *(f"  {command}" for command in [f"cd {shlex.quote(os.getcwd())}", *todo]))
    return int(bool(wrong) and os.environ.get("FL_TEMPLATE_STRICT") == "1")


if __name__ == "__main__":
    # The answers as JSON in a Python literal, whatever characters they hold. There is no other template code here.
    sys.exit(main(json.loads({{cookiecutter | tojson | tojson}})))  # type: ignore[arg-type, name-defined]  # noqa: F821
