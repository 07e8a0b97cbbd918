"""Download a file from the first mirror that delivers it completely and in time, and verify its checksum."""

import io
import os
import re
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from federation.errors import UserError

MIRROR_VARIABLE = "FL_DATA_MIRROR"
ADDRESS = r"(?i)https?://([^][/]*@)?([^][/:@]+|\[[0-9a-f:.]+\])(:[1-9]\d*)?(/.*)?"  # scheme, password, host, port, path
LIMIT_VARIABLE = "FL_DATA_TIMEOUT"  # seconds that downloading a data set may take
LIMIT_S = 600.0
CONNECT_S, READ_S = 5.0, 15.0
JUDGE_AFTER_S = 10.0  # seconds; after that, a mirror's speed is known
REASONS = (  # text in an error of pooch or requests -> message
    ("ConnectTimeout", f"no answer within {CONNECT_S:.0f} s"),
    ("Read timed out", f"no data for {READ_S:.0f} s"),
    ("ChunkedEncodingError", "the connection was interrupted"),
    ("ValueError: MD5 hash", "wrong checksum"),
    ("resol", "its name cannot be resolved"),
    ("refused", "connection refused"),
    ("unreachable", "network unreachable"),
    ("proxy", "the proxy cannot be reached"),
    ("CERTIFICATE", "its certificate is not trusted"),
)


def new_deadline() -> float:
    """When a download must be finished, in seconds of `time.monotonic()`."""
    limit = os.environ.get(LIMIT_VARIABLE) or LIMIT_S
    try:
        return time.monotonic() + float(limit)
    except ValueError:
        raise UserError(f"{LIMIT_VARIABLE} is {limit!r}: expected a number of seconds") from None


def fetch(
    dataset: str, name: str, md5: str, mirrors: tuple[str, ...], folder: Path, root: Path | None, deadline: float
) -> None:
    """Make sure that `folder` has a file with the right checksum; otherwise download it, trying one mirror at a time.

    Args:
        dataset: the data set that the file belongs to.
        name, md5: of the file.
        mirrors: addresses of folders with the file, in the order to try; the user's own mirror comes first.
        folder: where to put the file.
        root: the data root that the user gave, if any, for the command in the error message.
        deadline: in seconds of `time.monotonic()`.

    Raises:
        UserError: no mirror delivered the file completely and in time, or it cannot be written.
    """
    import pooch
    import requests

    path = folder / name
    try:
        if path.is_file() and pooch.file_hash(str(path), alg="md5") == md5:
            return
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the data root {folder} cannot be used: {error.strerror}; choose another --data_root"
        ) from None

    failures = [f"{path}: wrong checksum"] if path.exists() else []
    pooch.get_logger().setLevel("WARNING")  # it would print the address with its password
    for mirror in (*_private_mirror(), *mirrors):
        host = urlsplit(mirror).netloc.rpartition("@")[2]  # without a password
        if time.monotonic() > deadline:
            failures.append(f"{host}: not tried, out of time")
            continue
        print(f"Fetching {name} from {host} ...", file=sys.stderr, flush=True)
        downloader = pooch.HTTPDownloader(progressbar=_Progress(name, deadline), timeout=(CONNECT_S, READ_S))
        try:
            pooch.retrieve(mirror + name, f"md5:{md5}", fname=name, path=folder, downloader=downloader)
            return
        except TimeoutError as error:  # from _Progress
            failures.append(f"{host}: {error}")
        except (requests.RequestException, ValueError) as error:  # ValueError: a wrong checksum
            failures.append(f"{host}: {_reason(error)}")
        except OSError as error:  # pooch's own PermissionError has only a message
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --data_root") from None
        print(f"  {failures[-1]}", file=sys.stderr, flush=True)
    again = f"./prepare_data.sh --dataset {dataset}" + (f" --data_root {shlex.quote(str(root))}" if root else "")
    raise UserError(
        f"{dataset} is missing and cannot be downloaded ({'; '.join(failures)}): try again with {again}, "
        f"or set {MIRROR_VARIABLE} to a mirror that you can reach, or copy {name} (MD5 {md5}) to {folder}, "
        "or use --dataset digits, which needs no network"
    )


def _private_mirror() -> list[str]:
    """The user's own mirror, if any. An invalid address is not printed, because it may contain a password."""
    address = os.environ.get(MIRROR_VARIABLE, "")
    if address and not re.fullmatch(ADDRESS, address):
        raise UserError(f"{MIRROR_VARIABLE} must be an http or https address, such as https://mirror.example/files")
    return [address.rstrip("/") + "/"] if address else []


def _reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"answers {response.status_code} {response.reason}"
    text = f"{type(error).__name__}: {re.sub('//.*@', '//', str(error)) or 'no details'}"  # without a password
    return next((reason for symptom, reason in REASONS if symptom in text), text.splitlines()[0][:100])


class _Progress(tqdm):
    """Progress of a download, for pooch: a bar on a terminal, otherwise one line every ten seconds.

    Gives up on a mirror that is too slow for the deadline.
    """

    def __init__(self, name: str, deadline: float):
        self.name, self.deadline, self.next_line = name, deadline, 10.0
        self.has_terminal = sys.stderr.isatty()
        file = sys.stderr if self.has_terminal else io.StringIO()
        super().__init__(
            unit="B", unit_scale=True, file=file, delay=0.1
        )  # the delay: no bar if the mirror does not answer

    def __bool__(self) -> bool:
        return True  # pooch asks before the total is known

    def update(self, n: float | None = 1) -> None:
        super().update(n)
        elapsed = time.time() - self.start_t
        if elapsed > self.next_line and not self.has_terminal:
            self.next_line += 10.0
            print(f"  {self.name}: {self.n >> 20} of {self.total >> 20} MiB", file=sys.stderr, flush=True)
        remaining = max(self.total - self.n, 0) * elapsed / self.n if self.n else 0.0
        if elapsed > JUDGE_AFTER_S and time.monotonic() + remaining > self.deadline:
            self.close()
            raise TimeoutError(f"too slow, {self.n / elapsed / 1000:.0f} kB/s")
