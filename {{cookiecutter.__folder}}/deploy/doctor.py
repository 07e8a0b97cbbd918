"""Is this site ready to connect? `python deploy/doctor.py --data_root DIR [--classes FILE] [--startup_kit KIT]`

Each check is a line: ok, warning or failed, and what to do. Exit code 0: nothing failed; 1: something did; 2: usage.

Nothing leaves the site: the only connection is a TLS handshake with the kit's server (doctor_kit.py). The only thing
written is the converted copy of the images, which every job needs.
"""

import argparse
import difflib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from federation.errors import UserError, exit_code  # noqa: E402
from settings import Options  # noqa: E402

OK, WARNING, FAILED = "ok", "warning", "failed"
MEASURED_STEPS = 20


class Line(NamedTuple):
    """The result of a check: its status, what was found, what to do, and details such as a list of files."""

    status: str
    check: str
    found: str
    todo: str = ""
    details: tuple[str, ...] = ()


def main() -> int:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; --help lists the flags")

    parser = Parser("doctor.py", description="Check whether this site is ready. Nothing leaves it.", allow_abbrev=False)
    variable = os.environ.get("FL_DATA_ROOT")
    parser.add_argument("--data_root", metavar="DIR", default=variable, help="folder of images  [FL_DATA_ROOT]")
    parser.add_argument("--classes", metavar="FILE", help="the federation's classes, one per line")
    parser.add_argument("--image_white", metavar="N", type=int, help="job.py's, for images of more than 8 bits")
    parser.add_argument("--startup_kit", metavar="KIT", help="this site's startup kit, the folder with startup/ in it")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    given = parser.parse_args()
    if not given.data_root:
        raise UserError("--data_root DIR is missing: the folder with train/<class>/<image>")
    if given.classes and not Path(given.classes).is_file():
        raise UserError(f"--classes: {given.classes} does not exist")
    try:
        share = float(os.environ.get("FL_SKIP_UNREADABLE") or 0)
        if not 0 <= share < 1:
            raise ValueError
    except ValueError:
        raise UserError("FL_SKIP_UNREADABLE must be a share below 1, such as 0.02 for 2 %") from None
    options = Options(dataset="image_folder", partition="none", env="prod", skip_unreadable=share)
    options.image_white = given.image_white or options.image_white
    options.data_root, options.classes_file, options.startup_kit = given.data_root, given.classes, given.startup_kit
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need not be UTF-8
    lines = []
    for line in (line for check in (packages, images, kit) for line in results(check, options)):
        lines.append(line)
        if not given.json:
            todo = f" -> {line.todo}" if line.todo else ""
            print(f"{line.status:8} {line.check:12} {line.found}{todo}", *line.details, sep=f"\n{'':22}", flush=True)
    if given.json:
        print(json.dumps([line._asdict() for line in lines], indent=1))
    return int(any(line.status == FAILED for line in lines))


def results(check: Callable[[Options], Iterator[Line]], options: Options) -> Iterator[Line]:
    """The lines of a check, of which the last one says so if it had to end early."""
    try:
        yield from check(options)
    except UserError as error:
        yield Line(FAILED, check.__name__, str(error))
    except ModuleNotFoundError as error:
        yield Line(FAILED, check.__name__, f"not checked, because {error.name} is missing", "python3 install.py")


def packages(options: Options) -> Iterator[Line]:
    from packaging.requirements import Requirement

    wrong, python = [], ".".join(map(str, sys.version_info[:3]))
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needs = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    for need in needs:
        try:
            version = importlib.metadata.version(need.name)
            if not need.specifier.contains(version, prereleases=True):
                wrong.append(f"{need.name} is {version} instead of {need.specifier}")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
    if wrong:
        yield Line(FAILED, "packages", f"Python {python}: {', '.join(wrong)}", "python3 install.py")
    else:
        yield Line(OK, "packages", f"Python {python}; all {len(needs)} of requirements.txt")


def images(options: Options) -> Iterator[Line]:
    from federation.launch.distribution import known_classes
    from federation.launch.machine import free_memory
    from federation.site.catalog import cache_folder, header, list_images, open_split, prepare

    root, cache = Path(options.data_root or ""), cache_folder()
    files = list_images(root)
    train, test = (Counter(file.label for file in files[split]) for split in ("train", "test"))
    own, n_files = sorted(train | test), train.total() + test.total()
    note = "" if (root / "test").is_dir() else " (a tenth, because there is no folder 'test')"
    each = ", ".join(f"{name} {train[name]:,} + {test[name]:,}" for name in own)
    found = f"{train.total():,} to train and validate, {test.total():,} to test{note}. Shown only here: {each}"
    yield Line(OK, "images", found)
    if options.classes_file:
        yield compare_classes(own, known_classes(options))
    else:
        yield Line(WARNING, "classes", "not compared with the federation's", "add --classes FILE")
    yield compare_groups(files, len(own))
    size, disk = n_files * 3 * options.image_size**2 / 1e9, shutil.disk_usage(cache).free / 1e9
    found = f"the converted copy has {size:.2g} GB; free: {disk:.1f} GB of disk in {cache}"
    if size > disk:
        yield Line(FAILED, "space", found, "free some, or set XDG_CACHE_HOME to a folder on another disk")
        return
    slow = size > (memory := free_memory() / 1e9)
    todo = "expect slow training, with images read from the disk" if slow else ""
    yield Line(WARNING if slow else OK, "space", f"{found}, {memory:.1f} GB of memory", todo)

    how = (options.image_size, options.image_fit, options.image_white)
    store = prepare("image_folder", root, *how, skip_unreadable=1.0)
    faults = {path: fault for split in files for path, fault in open_split(store, split).unreadable.items()}
    share, allowed = len(faults) / n_files, options.skip_unreadable
    found = f"{len(faults):,} of {n_files:,} files are not" if faults else f"all {n_files:,} files"
    if share > allowed:
        todo = f"repair or remove them, or skip them: FL_SKIP_UNREADABLE={math.ceil(100 * share) / 100}"
        yield Line(FAILED, "readable", found, todo, (*faults.values(),))
    else:
        note = f", of which up to {allowed:.0%} are skipped" if faults else ""
        yield Line(WARNING if faults else OK, "readable", found + note, "", (*faults.values(),))
    headers = [header(file.path) for listed in files.values() for file in listed if str(file.path) not in faults]
    modes = ", ".join(f"{mode} {n:,}" for mode, n in Counter(mode for mode, _ in headers).most_common())
    turned = sum(is_turned for _, is_turned in headers)
    yield Line(OK, "pixels", f"{modes}; {turned:,} are turned, as their EXIF orientation says")
    open_to_all = [str(path) for path in (root, store) if path.stat().st_mode & 0o007]
    found = (
        f"other users can enter {', '.join(open_to_all)}" if open_to_all else "closed to other users, as is the copy"
    )
    todo = f"chmod o= {' '.join(open_to_all)}" if open_to_all else ""
    yield Line(WARNING if open_to_all else OK, "folder", found, todo)
    yield from training(replace(options, classes=own))


def compare_classes(own: list[str], known: list[str]) -> Line:
    folded = {name.strip().casefold(): name for name in known}
    unknown = []
    for name in (name for name in own if name not in known):
        near = difflib.get_close_matches(name.strip().casefold(), folded, 1, cutoff=0.75)
        unknown.append(f"{name!r} is not one of them" + (f" (should it be {folded[near[0]]!r}?)" if near else ""))
    if unknown:
        todo = f"rename or remove these folders; the classes are {', '.join(known)}"
        return Line(FAILED, "classes", "; ".join(unknown), todo)
    lacking = [name for name in known if name not in own]
    lacks = f"; no {', no '.join(lacking)} here, which is allowed" if lacking else ""
    return Line(OK, "classes", f"{len(own)} of the federation's {len(known)}{lacks}")


def compare_groups(files: dict[str, list[Any]], n_classes: int) -> Line:
    """Whether a group is in both splits, or seems to be missing: files whose names differ in the last number only."""
    train, test = ({file.group for file in files[split] if file.group} for split in ("train", "test"))
    if both := sorted(train & test):
        more = f" and {len(both) - 1:,} more" if both[1:] else ""
        return Line(WARNING, "groups", f"{both[0]!r}{more} in train and in test", "move each to one of them")
    if train or test:
        alone = sum(not file.group for own in files.values() for file in own)
        return Line(OK, "groups", f"{len(train | test):,}, each in train or in test; {alone:,} images have none")
    series = Counter(re.sub(r"[-_. ]*\d+$", "", file.path.stem) for own in files.values() for file in own)
    repeated = {name: n for name, n in series.items() if name and n > 1}
    if len(repeated) > 2 * n_classes and sum(repeated.values()) > series.total() / 2:
        found = f"none, but {len(repeated):,} series of files, such as {next(iter(repeated))!r}"
        return Line(WARNING, "groups", found, "if each is of one patient, say so: train/<class>/<group>/<image>")
    return Line(OK, "groups", "none: each image counts as independent of the others")


def training(options: Options) -> Iterator[Line]:
    """The GPU, and the speed of some real steps with the project's data.py and model.py."""
    import torch
    from pytorch_lightning import Callback

    from data import SiteDataModule
    from trainer import make_model, make_trainer, n_images

    class Clock(Callback):
        ends: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            if options.gpu:
                torch.cuda.synchronize()
            self.ends.append(time.monotonic())

    if torch.cuda.is_available():
        free, use = torch.cuda.mem_get_info()[0] / 1e9, "used" if options.gpu else "used by jobs with --gpu"
        yield Line(OK, "GPU", f"{torch.cuda.get_device_name()}, {free:.0f} GB free, {use}")
    elif options.gpu:
        yield Line(WARNING, "GPU", "PyTorch finds none, so training will use the CPU", "check the driver: nvidia-smi")
        options = replace(options, gpu=False)
    else:
        yield Line(OK, "GPU", "none, and the project does not ask for one")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    data, clock = SiteDataModule("this site", replace(options, skip_unreadable=1.0)), Clock()
    data.prepare_data()
    data.setup("fit")
    n_steps = math.ceil(n_images(data, "train") / options.batch_size)
    options = replace(options, max_batches=min(n_steps, MEASURED_STEPS + 1))  # the first one is slower: not measured
    epochs = math.ceil((MEASURED_STEPS + 1) / n_steps)
    make_trainer(options, epochs, [clock]).fit(make_model(options), datamodule=data)
    measured = len(clock.ends) - 1
    seconds = (clock.ends[-1] - clock.ends[0]) / measured * n_steps
    found = f"{seconds:.2g} s per epoch of {n_images(data, 'train'):,} images, from {measured} steps"
    yield Line(OK, "speed", f"{found} of {options.model_class} with {torch.get_num_threads()} threads")


def kit(options: Options) -> Iterator[Line]:
    from deploy.doctor_kit import check_kit

    if options.startup_kit:
        yield from (Line(*result) for result in check_kit(Path(options.startup_kit)))
    else:
        yield Line(WARNING, "kit", "not checked, nor its server and rights", "add --startup_kit KIT")


if __name__ == "__main__":
    sys.exit(exit_code("doctor.py", main))
