"""The two kinds of error, and how every program turns them into a message and an exit code.

Imports only the standard library.
"""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can fix, in one line: what is wrong, what was expected, what to type. Exit code 2."""


class RunError(Exception):
    """A failed run: which site, which exception, which line; the root cause comes first. Exit code 1."""


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
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; no process is left", file=sys.stderr)
        return 130
