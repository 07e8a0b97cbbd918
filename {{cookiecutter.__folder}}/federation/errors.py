"""The kinds of error, and how every program turns them into a message and an exit code.

Imports only the standard library.
"""

import shutil
import signal
import sys
import textwrap
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can fix, in one line: what is wrong, what was expected, what to type. Exit code 2."""


class Declined(Exception):
    """A site refuses a task, in one line, which the submitter is told. The job continues with the other sites."""


class RunError(Exception):
    """A failed run: which site, which exception, which line; the root cause comes first. Exit code 1."""


def show(error: str) -> None:
    """Print an error. Only a terminal gets its long lines in several, broken between words."""
    lines = error.splitlines()
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        lines = [textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines]
    print("\n".join(lines), file=sys.stderr)


def exit_code(program: str, main: Callable[[], int | None]) -> int:
    """Run a program's `main` and return the exit code; None from `main` means 0.

    SIGTERM and SIGHUP act like Ctrl-C, so the program also cleans up after `kill` or a closed terminal.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        return main() or 0
    except UserError as error:
        show(f"{program}: {error}")
        return 2
    except RunError as error:
        show(f"{program}: {error}")
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; no process is left", file=sys.stderr)
        return 130
