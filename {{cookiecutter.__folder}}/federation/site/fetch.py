"""Fetch one file from the first mirror that has it, whole and in time. What arrives is verified before it is used."""

import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from federation.errors import UserError

MIRROR_VARIABLE = "FL_DATA_MIRROR"
LIMIT_VARIABLE = "FL_DATA_TIMEOUT"  # seconds that fetching a data set may take
LIMIT_S = 600.0
CONNECT_S, READ_S = 5.0, 15.0
JUDGE_AFTER_S = 10.0  # a mirror's speed is known by then


def new_deadline() -> float:
    """When fetching has to be done, by `time.monotonic()`."""
    limit = os.environ.get(LIMIT_VARIABLE) or LIMIT_S
    try:
        return time.monotonic() + float(limit)
    except ValueError:
        raise UserError(f"{LIMIT_VARIABLE} is a number of seconds, not {limit!r}") from None


def fetch(
    dataset: str, name: str, md5: str, mirrors: tuple[str, ...], folder: Path, root: Path | None, deadline: float
) -> None:
    """Make sure that a file lies in `folder` with the right checksum: use it, or try mirror after mirror.

    Args:
        dataset: whose file it is.
        name: of the file.
        md5: its checksum.
        mirrors: addresses of folders that have it, in the order of trial; a private one goes first.
        folder: where it is to lie.
        root: the data root that the user gave, if any: for the command that tries again.
        deadline: by `time.monotonic()`, in seconds.

    Raises:
        UserError: no mirror has it, in time and whole, or it cannot be written.
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
    pooch.get_logger().setLevel("WARNING")  # it would repeat what is printed here, with the address's password
    for mirror in (*_private_mirror(), *mirrors):
        host = urlsplit(mirror).netloc.rpartition("@")[2]  # a password is not for the screen
        if time.monotonic() > deadline:
            failures.append(f"{host}: not tried, the time is up")
            continue
        print(f"Fetching {name} from {host} ...", file=sys.stderr, flush=True)
        downloader = pooch.HTTPDownloader(progressbar=_Progress(name, deadline), timeout=(CONNECT_S, READ_S))
        try:
            pooch.retrieve(mirror + name, f"md5:{md5}", fname=name, path=folder, downloader=downloader)
            return
        except OSError as error:  # requests' exceptions are OSErrors
            if isinstance(error, requests.RequestException):
                failures.append(f"{host}: {_reason(error)}")
            else:
                reason = error.strerror or error  # pooch's own PermissionError has only a text
                raise UserError(f"cannot write {path}: {reason}; choose another --data_root") from None
        except _TooSlow as error:
            failures.append(f"{host}: {error}")
        except ValueError as error:  # pooch's word for a wrong checksum
            failures.append(f"{host}: {'wrong checksum' if 'hash' in str(error) else _reason(error)}")
        print(f"  {failures[-1]}", file=sys.stderr, flush=True)
    again = f"./prepare_data.sh --dataset {dataset}" + (f" --data_root {shlex.quote(str(root))}" if root else "")
    raise UserError(
        f"{dataset} is not there and cannot be fetched ({'; '.join(failures)}): try again with {again}, "
        f"or set {MIRROR_VARIABLE} to a mirror that you can reach, or put {name} (MD5 {md5}) into {folder} by hand, "
        "or take --dataset digits, which needs no network"
    )


def _private_mirror() -> list[str]:
    """The user's own mirror, if there is one. An unusable address is not repeated: it may hold a password."""
    address = os.environ.get(MIRROR_VARIABLE)
    if not address:
        return []
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number
        usable = False
    if not usable:
        raise UserError(f"{MIRROR_VARIABLE} must be an address like https://mirror.example/files: http or https")
    return [address.rstrip("/") + "/"]


def _reason(error: Exception) -> str:
    """The innermost cause of a failed request, in few words."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.ConnectTimeout):
        return f"no answer within {CONNECT_S:.0f} s"
    if isinstance(error, requests.ReadTimeout) or "Read timed out" in str(error):
        return f"nothing came for {READ_S:.0f} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    text = re.sub("//.*@", "//", str(error))  # a password is not for the screen
    for symptom, reason in (
        ("resol", "its name cannot be resolved"),
        ("refused", "connection refused"),
        ("unreachable", "network unreachable"),
        ("proxy", "the proxy cannot be reached"),
        ("CERTIFICATE", "its certificate is not trusted"),
    ):
        if symptom in text:
            return reason
    return f"{type(error).__name__}: {text.splitlines()[0][:80] if text else 'no details'}"


class _TooSlow(Exception):
    pass


class _Progress:
    """Progress of one download, for pooch: a bar on a terminal, else a line every ten seconds.

    Gives a mirror up that would not be done by the deadline.
    """

    def __init__(self, name: str, deadline: float):
        self.total = 0  # bytes; pooch sets it once the server has told
        self._name, self._deadline, self._started = name, deadline, time.monotonic()
        self._done, self._next_line = 0, 10.0
        self._bar: Any = None  # tqdm's, once the total is known

    def update(self, n_bytes: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=self.total or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self._bar.update(n_bytes)
        self._done += n_bytes
        now = time.monotonic()
        elapsed = now - self._started
        if elapsed > self._next_line and self._bar.disable:
            self._next_line += 10.0
            print(f"  {self._name}: {self._done >> 20} of {self.total >> 20} MiB", file=sys.stderr, flush=True)
        remaining = max(self.total - self._done, 0) * elapsed / self._done if self._done else 0.0
        if elapsed > JUDGE_AFTER_S and now + remaining > self._deadline:
            self.close()
            raise _TooSlow(f"too slow, {self._done / elapsed / 1000:.0f} kB/s")

    def reset(self) -> None:
        self._done, self._started = 0, time.monotonic()
        if self._bar is not None:
            self._bar.reset()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
