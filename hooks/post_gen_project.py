"""Set up the new project with its own commands: environment, data, and one round as a check.

Cookiecutter renders this file with the answers, runs it in the new folder, and removes that folder if it exits with an
error. So a failed step is an error only with FL_TEMPLATE_STRICT=1; otherwise the project is kept.
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

VENV_PYTHON = ".venv/bin/python"  # created by install.py unless its own Python has all requirements
MANUAL_STEPS = ["python3 install.py", "sh prepare_data.sh", f"{VENV_PYTHON} job.py --check  # python3 if no .venv"]
DOWNLOADS = {"cifar10": "170 MB", "fashion_mnist": "30 MB", "bloodmnist": "35 MB"}
UNSUPPORTED_PATH = r"[\s'\"\\#]"  # the same as in federation/launch/options.py
received: list[bool] = []  # signals: the first one stops the running command and skips all later steps


def say(*lines: str, end: str = "\n") -> None:
    try:
        print(*lines, sep="\n", end=end, flush=True)
    except OSError:  # the reader is gone, which is no reason to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(*command: str, limit: float = float("inf"), **variables: str) -> str:
    """Run a command in the project; return "" on success, else a short reason. Never raises."""
    environment = {**os.environ, **variables}
    try:  # in a new session, so that Ctrl-C reaches it and its children only through this process
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    except OSError as error:
        return f"cannot run {command[0]}: {error.strerror}"
    deadline = time.monotonic() + limit
    while process.poll() is None and not received and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.returncode is None:
        for number in (signal.SIGINT, signal.SIGKILL):  # first, a chance to clean up
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=15)
        return "interrupted" if received else f"timed out after {limit:.0f} s"
    return f"exit code {process.returncode}" if process.returncode else ""


def step(title: str, *command: str, **options: Any) -> str:
    """Run the command of one step and print how long it took. Return "" on success, else the reason."""
    if received:
        return "interrupted"
    say(f"\n== {title}: {shlex.join(command)}")
    start = time.monotonic()
    reason = run(*command, **options)
    say(f"== {title}: {reason or 'done'} ({time.monotonic() - start:.0f} s)")
    return reason


def set_up(dataset: str) -> tuple[list[str], list[str]]:
    """Run as many steps as possible; return what failed and the commands to type next."""
    limit, data_limit = os.environ.get("FL_CHECK_TIMEOUT") or "300", os.environ.get("FL_DATA_TIMEOUT") or "600"
    if re.search(UNSUPPORTED_PATH, os.getcwd()):
        reason = "NVFlare does not run in paths with spaces, quotes, \\ or #"
        return [f"NOT VERIFIED: {reason}", "Move the project first."], MANUAL_STEPS
    if not limit.isdecimal():
        return [f"NOT VERIFIED: FL_CHECK_TIMEOUT must be a whole number of seconds, not {limit!r}"], MANUAL_STEPS
    size = f"{DOWNLOADS.get(dataset)} unless cached, at most {data_limit} s (FL_DATA_TIMEOUT)"
    say("\nSetting up the project. Press Ctrl-C to stop at any time; the project is kept.")
    say("  1. environment: ", end="")
    run(sys.executable, "install.py", "--plan")
    say(f"  2. data: {dataset}, {size if dataset in DOWNLOADS else 'no download'}")
    say(f"  3. check: one short round, about 30 s, at most {limit} s (FL_CHECK_TIMEOUT)")

    if reason := step("1/3 environment", sys.executable, "install.py"):
        return [f"NOT VERIFIED: the environment was not set up: {reason}, see above"], MANUAL_STEPS
    python = VENV_PYTHON if os.path.exists(VENV_PYTHON) else sys.executable
    job, check, wrong, todo = f"{shlex.quote(python)} job.py", [python, "job.py", "--check"], [], []
    on_digits, flags, variables = ["--dataset", "digits"], [], {}
    if dataset == "digits":
        say("\n== 2/3 data: nothing to fetch, digits ships with scikit-learn")
    elif dataset == "image_folder" and not os.environ.get("FL_DATA_ROOT"):
        say("\n== 2/3 data: skipped, FL_DATA_ROOT is not set; the check uses digits")
        job += " --data_root FOLDER  # FOLDER/train/<class>/<image>"
        flags = on_digits
    elif reason := step("2/3 data", "sh", "prepare_data.sh", PYTHON=python):
        wrong = [f"{dataset} could not be fetched: {reason}, see above"]
        todo = ["sh prepare_data.sh" if python == VENV_PYTHON else f"PYTHON={shlex.quote(python)} sh prepare_data.sh"]
        flags, variables = on_digits, {"FL_DATA_ROOT": ""}  # or the check would try every mirror again
    if reason := step("3/3 check", *check, *flags, limit=int(limit), **variables):
        wrong.append(f"NOT VERIFIED: {reason}, see above")
        todo.append(shlex.join(check))
    return wrong, todo or [job]


@contextlib.contextmanager
def terminal_for_us() -> Iterator[None]:
    """Become the terminal's foreground process group: on Ctrl-C, cookiecutter and cruft would abort too early."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no terminal
            terminal = os.open("/dev/tty", os.O_RDWR)
            stack.callback(os.close, terminal)
            caller = os.getpgrp()
            if os.tcgetpgrp(terminal) == caller:  # otherwise this runs in the background
                os.setpgid(0, 0)
                for number in (signal.SIGTTOU, signal.SIGTSTP):  # the shell would not notice that Ctrl-Z stopped us
                    signal.signal(number, signal.SIG_IGN)
                stack.enter_context(contextlib.suppress(OSError))
                stack.callback(os.tcsetpgrp, terminal, caller)
                os.tcsetpgrp(terminal, os.getpgrp())
        yield


def is_comparison(answers: dict[str, Any]) -> bool:
    """Whether `cruft update` or `cruft diff` renders the project only to compare it and throw it away."""
    folder = Path.cwd().parent
    named = "_commit" in answers and bool(re.fullmatch("tmp[a-z0-9_]{8}", folder.name))
    return named and folder.parent == Path(tempfile.gettempdir()).resolve()


def main(answers: dict[str, Any]) -> int:
    """Return the exit code: 0 even if a step fails, to keep the project, unless FL_TEMPLATE_STRICT=1."""
    if is_comparison(answers):
        return 0
    if sys.stdout:  # a path may have characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    wrong: list[str] = []
    todo, title = MANUAL_STEPS, "Setup skipped. To set up manually (on Windows, in WSL2):"
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
    # The answers as JSON in a Python literal, safe for any characters. This is the only template code here.
    sys.exit(main(json.loads({{cookiecutter | tojson | tojson}})))  # type: ignore[arg-type, name-defined]  # noqa: F821
