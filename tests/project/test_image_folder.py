"""The user's own images: what a folder can contain, errors if it cannot be used, and when it is converted again."""

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from PIL import Image

import data
import settings
from federation.errors import UserError
from federation.launch import distribution
from federation.site import catalog
from federation.site.catalog import open_split, prepare
from federation.site.host import call_client
from programs import PROJECT, data_error, names_in
from settings import Options
from trainer import make_model


def save(path: Path, color=(200, 100, 50), size=(5, 3), mode: str = "RGB") -> Path:
    """An image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of two classes, with test images."""
    for split, n_images in (("train", 3), ("test", 2)):
        for class_name, red in (("cat", 10), ("dog", 20)):
            for i in range(n_images):
                save(tmp_path / "images" / split / class_name / f"{i}.png", (red + i, 0, 0))
    return tmp_path / "images"


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """The folders that were converted, one entry for each time."""
    converted, convert = [], catalog._convert_folder

    def count(root, *arguments):
        converted.append(root)
        return convert(root, *arguments)

    monkeypatch.setattr(catalog, "_convert_folder", count)
    return converted


def images_of(root: Path, split: str = "train", image_size: int = 4, **how) -> np.ndarray:
    return open_split(prepare("image_folder", root, image_size, **how), split).images


def reds(root: Path, split: str = "train") -> list[int]:
    """The red of each image: which images they are."""
    return images_of(root, split)[:, 0, 0, 0].tolist()


def failure(root: Path | None) -> str:
    return data_error(prepare, "image_folder", root, 4)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


# ---- what becomes of the images


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_indices_into_the_sorted_folders(root, split):
    opened = open_split(prepare("image_folder", root, 4), split)
    assert opened.classes == ["cat", "dog"]
    assert [opened.classes[label] for label in opened.labels] == sorted(["cat", "dog"] * (len(opened.labels) // 2))
    assert opened.labels.dtype == np.int64


def test_images_are_sorted_by_name(root):
    assert reds(root, "train") == [10, 11, 12, 20, 21, 22]
    assert reds(root, "test") == [10, 11, 20, 21]


@pytest.mark.parametrize(
    ("name", "mode", "color", "expected"),
    [
        ("black and white.png", "1", 1, (255, 255, 255)),
        ("black and white.tif", "1", 0, (0, 0, 0)),
        ("gray.png", "L", 77, (77, 77, 77)),
        ("gray.tif", "L", 77, (77, 77, 77)),
        ("see-through gray.png", "LA", (77, 128), (166, 166, 166)),
        ("see-through gray.tif", "LA", (77, 128), (166, 166, 166)),
        ("color.png", "RGB", (200, 100, 50), (200, 100, 50)),
        ("four channels.tif", "RGBX", (200, 100, 50, 0), (200, 100, 50)),
        ("see-through.png", "RGBA", (200, 100, 50, 128), (227, 177, 152)),
        ("see-through.tif", "RGBA", (200, 100, 50, 128), (227, 177, 152)),
        ("nothing to see.png", "RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("all to see.png", "RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("print.tif", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("video.tif", "YCbCr", (180, 128, 128), (180, 180, 180)),
        ("bitmap.BMP", "RGB", (1, 2, 3), (1, 2, 3)),
        ("web.webp", "RGB", (255, 255, 255), (255, 255, 255)),
        ("photograph.JPG", "RGB", (128, 128, 128), (128, 128, 128)),
        ("gray photograph.jpeg", "L", 128, (128, 128, 128)),
        ("print.jpg", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("map.pgm", "L", 77, (77, 77, 77)),
    ],
)
def test_every_kind_of_image_is_converted_to_rgb(root, name, mode, color, expected):
    save(root / "train" / "aardvark" / name, color, mode=mode)
    image = images_of(root)[0]
    assert image.dtype == np.uint8
    assert image.reshape(3, -1).T.tolist() == [list(expected)] * 16


def test_palettes_are_resolved(root):
    colors = Image.new("RGB", (4, 4), (200, 100, 50)).quantize(4)
    (root / "train" / "aardvark").mkdir()
    colors.save(root / "train" / "aardvark" / "palette.png")
    assert images_of(root)[0, :, 0, 0].tolist() == [200, 100, 50]


def a_palette_with_alpha(folder: Path) -> None:
    paletted = Image.new("PA", (4, 4), (1, 0))
    paletted.putpalette([0, 0, 0, 200, 100, 50])
    paletted.save(folder / "0.tif")


@pytest.mark.parametrize(
    "save_it",
    [
        lambda folder: save(folder / "0.png", 7, mode="P").write_bytes(palette_png(transparency=7)),
        lambda folder: Image.new("L", (4, 4), 7).save(folder / "0.png", transparency=7),
        lambda folder: Image.new("RGB", (4, 4), (7, 8, 9)).save(folder / "0.png", transparency=(7, 8, 9)),
        lambda folder: Image.new("RGBA", (4, 4), (7, 8, 9, 0)).save(folder / "0.webp", lossless=True),
        lambda folder: (folder / "0.tif").write_bytes(tiff([0, 0], 8, extra=1)),
        a_palette_with_alpha,
    ],
    ids=["palette", "one gray", "one color", "web", "premultiplied", "palette with alpha"],
)
def test_transparent_pixels_become_white(root, save_it):
    (root / "train" / "aardvark").mkdir()
    save_it(root / "train" / "aardvark")
    assert images_of(root)[0].tolist() == np.full((3, 4, 4), 255).tolist()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(root, suffix, orientation):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16], upright[:16, 16:] = 255, 128  # each corner tells where it is
    upright[16:, :16] = 64
    turned_back = {  # how a camera stores what it saw, for each orientation
        **{1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud},
        **{5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1)},
        **{7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, 3)},
    }
    exif = Image.Exif()
    exif[274] = orientation
    path = root / "train" / "aardvark" / f"0{suffix}"
    path.parent.mkdir()
    Image.fromarray(np.ascontiguousarray(turned_back[orientation](upright))).save(path, exif=exif, quality=95)
    image = images_of(root, image_size=32)[0].astype(int)
    assert np.abs(image[:, 4::24, 4::24] - upright.transpose(2, 0, 1)[:, 4::24, 4::24]).max() < 10


def test_a_tiff_with_white_as_zero_is_not_inverted(root):
    (root / "train" / "aardvark").mkdir()
    (root / "train" / "aardvark" / "0.tif").write_bytes(tiff([55], 8, photometric=0))
    assert np.unique(images_of(root)[0]).tolist() == [200]


def test_fewer_than_eight_bits_use_the_full_range(root):
    (root / "train" / "aardvark").mkdir()
    (root / "train" / "aardvark" / "0.pgm").write_bytes(b"P5 2 2 15\n" + bytes([15] * 4))
    assert np.unique(images_of(root)[0]).tolist() == [255]


DEEP = {  # gray, of a value that is a quarter of the range, with the value that is white
    "12 bits in 16, png": (lambda: pillow("I;16", 1023, "PNG"), 4095, 64),
    "12 bits in 16, tiff": (lambda: pillow("I;16", 1023, "TIFF"), 4095, 64),
    "12 bits": (lambda: tiff([1023], 12), 4095, 64),
    "16 bits": (lambda: pillow("I;16", 16383, "PNG"), 65535, 64),
    "16 bits, big-endian": (lambda: pillow("I;16B", 16383, "TIFF"), 65535, 64),
    "16 bits, white is zero": (lambda: tiff([1023], 16, photometric=0), 4095, 191),
    "brighter than white": (lambda: pillow("I;16", 65535, "PNG"), 4095, 255),
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_deep_gray_image_is_scaled_by_the_given_white(root, kind):
    content, white, gray = DEEP[kind]
    path = root / "train" / "aardvark" / "0.png"
    path.parent.mkdir()
    path.write_bytes(content())
    assert "set --image_white to the value that is white" in failure(root)
    images_of(root, white=1)  # has a copy of its own
    assert np.unique(images_of(root, white=white)[0]).tolist() == [gray]
    assert images_of(root, white=white)[1:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22]  # 8 bits stay as they are


REFUSED = {
    "16 bits, color tiff": (lambda: tiff([4095] * 3, 16, photometric=2), "more than 8 bits"),
    "16 bits, color png": (lambda: png_16_bits(2, [4095] * 3), "more than 8 bits"),
    "16 bits, see-through gray png": (lambda: png_16_bits(4, [4095, 65535]), "more than 8 bits"),
    "16 bits, see-through color png": (lambda: png_16_bits(6, [4095] * 4), "more than 8 bits"),
    "16 bits, pgm": (lambda: b"P5 1 1 4095\n\x0f\xff", "more than 8 bits"),
    "16 bits, ppm": (lambda: b"P6 1 1 65535\n" + b"\x0f\xff" * 3, "more than 8 bits"),
    "8 bits with a sign": (lambda: tiff([200], 8, sample_format=2), "signed"),
    "16 bits with a sign": (lambda: tiff([65535], 16, sample_format=2), "signed"),
    "32 bits": (lambda: pillow("I", 70000, "TIFF"), "signed"),
    "floating point": (lambda: pillow("F", 0.5, "TIFF"), "floating-point"),
    "LAB": (lambda: pillow("LAB", (50, 0, 0), "TIFF"), "LAB"),
    "several pages": (lambda: pillow("L", 1, "TIFF", Image.new("L", (4, 4), 2)), "2 images"),
    "an animation": (lambda: pillow("RGB", (200, 0, 0), "WEBP", Image.new("RGB", (4, 4))), "2 images"),
    "another format": (lambda: pillow("RGB", (1, 2, 3), "JPEG2000"), "not a readable image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_with_an_unknown_range_is_rejected(root, kind):
    content, reason = REFUSED[kind]
    path = root / "train" / "dog" / "0.png"  # the suffix does not matter
    path.write_bytes(content())
    for white in (None, 4095):
        message = data_error(prepare, "image_folder", root, 4, "stretch", white)
        assert str(path) in message and reason in message


def test_the_preview_in_a_cameras_jpeg_is_not_a_second_image(root):
    (root / "train" / "aardvark").mkdir()
    content = pillow("L", 128, "MPO", Image.new("L", (4, 4)))
    (root / "train" / "aardvark" / "0.jpg").write_bytes(content)
    assert np.unique(images_of(root)[0]).tolist() == [128]


def pillow(mode: str, color, file_format: str, *more: Image.Image) -> bytes:
    """A file of an image of one color, and of `more` images in it."""
    file = io.BytesIO()
    pages = {"save_all": True, "append_images": more} if more else {}
    Image.new(mode, (4, 4), color).save(file, file_format, **pages)
    return file.getvalue()


def palette_png(transparency: int) -> bytes:
    file = io.BytesIO()
    image = Image.new("P", (4, 4), transparency)
    image.putpalette(range(48))
    image.save(file, "PNG", transparency=transparency)
    return file.getvalue()


def png_16_bits(color_type: int, pixel: list[int]) -> bytes:
    """A PNG of one pixel, of a kind that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, color_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(f">{len(pixel)}H", *pixel))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(pixel: list[int], bits: int, photometric: int = 1, sample_format: int = 1, extra: int | None = None) -> bytes:
    """A TIFF of two equal pixels, of a kind that Pillow does not write."""
    n = len(pixel)
    row = "".join(f"{value:0{bits}b}" for value in pixel * 2)
    if bits == 16:  # little-endian
        row = "".join(f"{value & 255:08b}{value >> 8:08b}" for value in pixel * 2)
    pixels = int(row, 2).to_bytes(len(row) // 8, "big").ljust(16, b"\0")
    bits_of_each = struct.pack("<4H", *[bits] * 4)
    entries = [
        *((256, 4, 1, 2), (257, 4, 1, 1), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, n)),
        *((278, 4, 1, 1), (279, 4, 1, len(row) // 8), (339, 3, 1, sample_format)),
        (258, 3, n, bits if n == 1 else bits | bits << 16 if n == 2 else 24),  # two fit in the entry, else: where
    ]
    if extra is not None:
        entries.append((338, 3, 1, extra))
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 32) + pixels + bits_of_each + directory + bytes(4)


FITTED = {  # an image of three gray bands, three times as wide as high; the gray at nine places of the square
    "stretch": [[10, 120, 250]] * 3,
    "pad": [[0, 0, 0], [10, 120, 250], [0, 0, 0]],
    "crop": [[120, 120, 120]] * 3,
}


@pytest.mark.parametrize("fit", FITTED)
def test_an_image_of_another_shape_is_fitted_as_chosen(root, fit, conversions):
    (root / "train" / "aardvark").mkdir()
    bands = np.array([10, 120, 250], np.uint8).repeat(20)
    Image.fromarray(np.stack([bands] * 20)).save(root / "train" / "aardvark" / "0.png")
    images_of(root, image_size=12)
    places = [1, 6, 10]
    image = images_of(root, image_size=12, fit=fit)[0]
    assert image[:, places][:, :, places].tolist() == [FITTED[fit]] * 3
    assert len(conversions) == (1 if fit == "stretch" else 2)  # each has a copy of its own


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 480), (4, 4)], ids=str)
@pytest.mark.parametrize("image_size", [4, 32])
def test_images_of_any_size_are_resized(root, size, image_size):
    save(root / "train" / "aardvark" / "0.png", (9, 8, 7), size)
    image = images_of(root, image_size=image_size)[0]
    assert image.shape == (3, image_size, image_size)
    assert image.reshape(3, -1).T.tolist() == [[9, 8, 7]] * image_size**2


def test_images_in_folders_within_a_class_belong_to_it(root):
    save(root / "train" / "cat" / "2024" / "may" / "0.png", (99, 0, 0))
    opened = open_split(prepare("image_folder", root, 4), "train")
    assert opened.labels[opened.images[:, 0, 0, 0].tolist().index(99)] == opened.classes.index("cat")


def test_files_that_are_not_images_are_ignored(root):
    (root / "train" / "cat" / "notes.txt").write_text("a good cat")
    (root / "train" / "list.csv").write_text("0.png,cat")
    assert len(reds(root)) == 6


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "cat/._0.png"])
def test_hidden_files_and_folders_are_ignored(root, hidden):
    (root / "train" / hidden).parent.mkdir(exist_ok=True)
    (root / "train" / hidden).write_bytes(b"no image at all")
    opened = open_split(prepare("image_folder", root, 4), "train")
    assert (len(opened.images), opened.classes) == (6, ["cat", "dog"])


def test_names_can_have_spaces_and_any_letters(tmp_path):
    root = tmp_path / "Bilder für später 🙂"
    for class_name in ("größe 1", "猫", "it's"):
        save(root / "train" / class_name / "ein bild – 1.png")
        save(root / "test" / class_name / "ein bild – 1.png")
    assert open_split(prepare("image_folder", root, 4), "train").classes == sorted(["größe 1", "猫", "it's"])


def test_file_names_need_not_be_utf8(root):
    name = os.fsdecode(b"gr\xf6\xdfe.png")
    try:
        (root / "train" / "cat" / "2.png").rename(root / "train" / "cat" / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert sorted(reds(root)) == [10, 11, 12, 20, 21, 22]


# ---- no test folder: a tenth is split off


@pytest.fixture
def root_without_test(tmp_path) -> Path:
    for red in range(40):
        save(tmp_path / "images" / "train" / ("even" if red % 2 == 0 else "odd") / f"{red:02}.png", (red, 0, 0))
    return tmp_path / "images"


def test_without_test_images_a_tenth_of_the_others_is_split_off(root_without_test):
    train, test = reds(root_without_test, "train"), reds(root_without_test, "test")
    assert len(test) == 4
    assert sorted(train + test) == list(range(40))


def test_split_off_images_keep_their_labels(root_without_test):
    opened = open_split(prepare("image_folder", root_without_test, 4), "test")
    expected = ["even" if red % 2 == 0 else "odd" for red in opened.images[:, 0, 0, 0].tolist()]
    assert [opened.classes[label] for label in opened.labels] == expected


def test_the_same_images_are_split_off_every_time(root_without_test, monkeypatch, tmp_path):
    first = reds(root_without_test, "test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    assert reds(root_without_test, "test") == first


# ---- the folder is only read, and read again when it changes


def test_the_folder_is_never_written_to(root):
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = state(root)
    images_of(root)
    assert state(root) == before


def test_an_unchanged_folder_is_converted_once(root, conversions):
    assert prepare("image_folder", root, 4) == prepare("image_folder", root, 4)
    assert conversions == [root]


def test_hidden_files_do_not_trigger_a_new_conversion(root, conversions):
    images_of(root)
    save(root / "train" / ".ipynb_checkpoints" / "0.png")
    save(root / "train" / "cat" / ".ipynb_checkpoints" / "0.png")
    images_of(root)
    assert len(conversions) == 1


def test_each_image_size_has_its_own_store(root):
    assert images_of(root, image_size=4).shape[2:] == (4, 4)
    assert images_of(root, image_size=8).shape[2:] == (8, 8)


def write_later(path: Path, red: int) -> None:
    """Another image under the same name, with a time that differs however fast this is."""
    before = path.stat().st_mtime_ns
    save(path, (red, 0, 0))
    os.utime(path, ns=(before + 10**9, before + 10**9))


CHANGES = {
    "a file is added": (lambda train: save(train / "cat" / "3.png", (13, 0, 0)), [10, 11, 12, 13, 20, 21, 22]),
    "a file is removed": (lambda train: (train / "cat" / "2.png").unlink(), [10, 11, 20, 21, 22]),
    "a file is written": (lambda train: write_later(train / "cat" / "2.png", 99), [10, 11, 99, 20, 21, 22]),
    "a file is renamed": (lambda train: (train / "cat" / "0.png").rename(train / "cat" / "9.png"), [11, 12, 10]),
    "a class is renamed": (lambda train: (train / "cat").rename(train / "zebra"), [20, 21, 22, 10, 11, 12]),
    "a class is added": (lambda train: save(train / "emu" / "0.png", (30, 0, 0)), [10, 11, 12, 20, 21, 22, 30]),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_converted_again(root, conversions, change, expected):
    images_of(root)
    change(root / "train")
    assert reds(root)[: len(expected)] == expected
    assert len(conversions) == 2


def test_a_change_behind_a_link_is_noticed(root, tmp_path, conversions):
    elsewhere = tmp_path / "elsewhere"
    (root / "train" / "cat").rename(elsewhere)
    (root / "train" / "cat").symlink_to(elsewhere, target_is_directory=True)
    assert reds(root) == [10, 11, 12, 20, 21, 22]
    save(elsewhere / "3.png", (13, 0, 0))
    assert reds(root) == [10, 11, 12, 13, 20, 21, 22]


def test_two_folders_with_the_same_files_are_two_data_sets(root, tmp_path):
    os.rename(root, tmp_path / "first")
    first = prepare("image_folder", tmp_path / "first", 4)
    os.rename(tmp_path / "first", root)
    assert prepare("image_folder", root, 4) != first


def test_a_new_version_of_the_pixel_rule_triggers_a_conversion(root, conversions, monkeypatch):
    images_of(root)
    monkeypatch.setattr(catalog, "RULE", catalog.RULE + 1)
    images_of(root)
    assert len(conversions) == 2


# ---- the converted copy is private, and there is one


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("dataset", ["image_folder", "digits"])
def test_only_the_user_can_read_the_converted_copy(root, empty_cache, dataset, mask):
    before = os.umask(mask)
    try:
        store = prepare(dataset, root if dataset == "image_folder" else None, 16)
    finally:
        os.umask(before)
    assert names_in(store) == sorted(
        [f"{s}-{k}.npy" for s in ("train", "test") for k in ("images", "labels")] + ["classes.txt"]
    )
    assert {path.stat().st_mode & 0o777 for path in store.iterdir()} == {0o600}
    assert store.stat().st_mode & 0o777 == 0o700


def test_the_older_copy_of_a_changed_folder_is_removed(root, empty_cache):
    other_size = prepare("image_folder", root, 8)
    for i in range(3):
        save(root / "train" / "cat" / f"new {i}.png")
        store = prepare("image_folder", root, 4)
    assert [path for path in empty_cache.iterdir() if path.is_dir()] in ([store, other_size], [other_size, store])


def test_two_folders_do_not_remove_each_others_copies(root, tmp_path, empty_cache):
    shutil.copytree(root, tmp_path / "other")
    first, second = prepare("image_folder", root, 4), prepare("image_folder", tmp_path / "other", 4)
    save(root / "train" / "cat" / "new.png")
    prepare("image_folder", root, 4)
    assert second.is_dir() and not first.exists()


def test_open_images_stay_readable_if_their_copy_is_replaced(root):
    opened = open_split(prepare("image_folder", root, 4), "train")
    save(root / "train" / "cat" / "3.png", (13, 0, 0))
    assert reds(root) == [10, 11, 12, 13, 20, 21, 22]
    assert opened.images[:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22]


def test_a_copy_that_was_replaced_before_it_was_opened_is_a_one_line_error(root):
    store = prepare("image_folder", root, 4)
    save(root / "train" / "cat" / "3.png", (13, 0, 0))
    prepare("image_folder", root, 4)
    assert "run the command again" in data_error(open_split, store, "train")


DIE_WHILE_CONVERTING = """
import os, sys
from pathlib import Path
from federation.site import catalog

catalog.read_image = lambda *args: os._exit(9)
catalog.prepare("image_folder", Path(sys.argv[1]), 4)
"""


def test_leftovers_of_a_killed_conversion_are_removed_by_the_next(root, empty_cache):
    command = [sys.executable, "-c", DIE_WHILE_CONVERTING, str(root)]
    assert subprocess.run(command, cwd=PROJECT).returncode == 9
    assert len([path for path in empty_cache.iterdir() if path.is_dir()]) == 1
    store = prepare("image_folder", root, 4)
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == [store]


def test_a_failed_conversion_leaves_nothing(root, empty_cache):
    (root / "train" / "dog" / "broken.png").write_bytes(b"no image at all")
    failure(root)
    assert [path.suffix for path in empty_cache.iterdir()] == [".lock"]


# ---- what cannot be used is named


def a_broken_file(root: Path) -> Path:
    path = root / "train" / "dog" / "broken.png"
    path.write_bytes(b"no image at all")
    return path


def an_image_that_ends_too_soon(root: Path) -> Path:
    path = save(root / "test" / "dog" / "half.jpg", size=(300, 300))
    path.write_bytes(path.read_bytes()[:700])
    return path


def a_class_without_images(root: Path) -> Path:
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "notes.txt").write_text("soon")
    return root / "train" / "emu"


def an_empty_split(root: Path, split: str) -> Path:
    (root / split).rename(root / "elsewhere")
    (root / split).mkdir()
    return root / split


def no_train_folder(root: Path) -> Path:
    (root / "train").rename(root / "training")
    return root / "train"


def no_folder_at_all(root: Path) -> Path:
    root.rename(root.parent / "elsewhere")
    return root


def a_link_to_nowhere(root: Path) -> Path:
    path = root / "train" / "cat" / "gone.png"
    path.symlink_to(root / "nowhere.png")
    return path


@pytest.mark.parametrize(
    "spoil",
    [
        a_broken_file,
        an_image_that_ends_too_soon,
        a_class_without_images,
        lambda root: an_empty_split(root, "train"),
        lambda root: an_empty_split(root, "test"),
        no_train_folder,
        no_folder_at_all,
        a_link_to_nowhere,
    ],
    ids=["broken", "truncated", "empty class", "empty train", "empty test", "no train", "no root", "dead link"],
)
def test_unusable_files_and_folders_are_named(root, spoil):
    assert str(spoil(root)) in failure(root)


def test_a_class_that_became_empty_is_named(root):
    images_of(root)
    (root / "train" / "emu").mkdir()
    assert str(root / "train" / "emu") in failure(root)


def test_a_missing_data_root_says_how_to_set_it():
    message = failure(None)
    assert all(way in message for way in ("--data_root", "FL_DATA_ROOT", "train/<class>/<image>"))


def test_a_folder_without_read_permission_is_named(root, permissions_bind):
    (root / "train" / "dog").chmod(0)
    message = failure(root)
    (root / "train" / "dog").chmod(0o755)
    assert str(root / "train" / "dog") in message and "Permission denied" in message


# ---- unreadable files: all are named, and a share of them can be skipped


@pytest.fixture
def spoiled(root) -> Path:
    """The folder with two unreadable files among ten readable ones."""
    (root / "train" / "cat" / "1 broken.png").write_bytes(b"no image at all")
    Image.new("I;16", (4, 4), 4095).save(root / "test" / "dog" / "0 x-ray.png")
    return root


def test_all_unreadable_files_are_named_at_once_with_the_share_to_allow(spoiled):
    message = failure(spoiled)
    assert "2 of 12 images cannot be used" in message and "FL_SKIP_UNREADABLE=0.17" in message
    assert "1 broken.png is not a readable image" in message and "0 x-ray.png has more than 8 bits" in message


def test_of_many_unreadable_files_the_first_are_named(root):
    for number in range(30):
        (root / "train" / "cat" / f"broken {number:02}.png").touch()
    message = failure(root)
    assert "30 of 40 images" in message and "broken 09.png" in message and "; and 20 more" in message
    assert "broken 10.png" not in message


def test_up_to_a_share_unreadable_files_are_skipped(spoiled):
    store = prepare("image_folder", spoiled, 4, skip_unreadable=0.17)
    train, test = (open_split(store, split) for split in ("train", "test"))
    assert train.images[:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.images[:, 0, 0, 0].tolist() == [10, 11, 20, 21] and test.labels.tolist() == [0, 0, 1, 1]
    assert [*train.unreadable] == [str(spoiled / "train" / "cat" / "1 broken.png")]
    assert [*test.unreadable] == [str(spoiled / "test" / "dog" / "0 x-ray.png")]


def test_a_smaller_share_is_respected_although_the_copy_exists(spoiled, conversions):
    prepare("image_folder", spoiled, 4, skip_unreadable=0.17)
    assert "2 of 12 images" in data_error(prepare, "image_folder", spoiled, 4, skip_unreadable=0.16)
    assert "2 of 12 images" in failure(spoiled)
    assert len(conversions) == 1


@pytest.mark.parametrize("share", [2.0, -0.1, float("nan")])
def test_what_is_not_a_share_skips_nothing(spoiled, share):
    assert "FL_SKIP_UNREADABLE is" in data_error(prepare, "image_folder", spoiled, 4, skip_unreadable=share)


def test_a_site_reports_how_many_files_it_skips(spoiled, options, monkeypatch, tmp_path):
    run = options(dataset="image_folder", data_root=str(spoiled), partition="none", classes=["cat", "dog"])
    run.skip_unreadable = 0.2
    monkeypatch.setattr(Options, "of_job", lambda: run)
    received = FLModel(params=make_model(run).state_dict())
    metrics = call_client("north", AppConstants.TASK_VALIDATION, received, tmp_path).metrics
    assert (metrics["skipped_images"], metrics["val_images"], metrics["test_images"]) == (2, 1, 4)
    (spoiled / "train" / "cat" / "1 broken.png").unlink()
    (spoiled / "test" / "dog" / "0 x-ray.png").unlink()
    data._opened.cache_clear()
    assert "skipped_images" not in call_client("north", AppConstants.TASK_VALIDATION, received, tmp_path).metrics


def test_only_a_real_site_itself_decides_how_much_it_skips(monkeypatch, tmp_path):
    (tmp_path / "options.json").write_text('{"env": "prod", "skip_unreadable": 0.9}')
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "settings.py"))
    assert Options.of_job().skip_unreadable == 0
    monkeypatch.setenv("FL_SKIP_UNREADABLE", "0.02")
    assert Options.of_job().skip_unreadable == 0.02


# ---- a folder for each site


UNFIT = {
    "a control character": "c\x07t",
    "a tab": "c\tt",
    "a line feed": "c\nt",
    "a carriage return": "c\rt",
    "a file separator": "c\x1ct",
    "a next line": "c\x85t",
    "a line separator": "c\u2028t",
    "a paragraph separator": "c\u2029t",
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", UNFIT.values(), ids=UNFIT)
def test_a_class_name_with_a_line_break_is_rejected(root, split, name):
    (root / split / "cat").rename(root / split / name)
    message = failure(root)
    assert f"{root / split} has a class {name!r}" in message
    assert message.splitlines() == [message]


def test_a_class_name_that_is_not_utf8_is_rejected(root):
    try:
        (root / "train" / "cat").rename(root / "train" / os.fsdecode(b"gr\xf6\xdfe"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert f"{root / 'train'} has a class 'gr\\udcf6\\udcdfe'" in failure(root)


def test_every_line_breaking_character_is_rejected_in_a_class_name():
    ends = [chr(code) for code in range(sys.maxunicode + 1) if len(f"a{chr(code)}b".splitlines()) > 1]
    assert len(ends) > 5
    for character in ends:
        assert repr(f"a{character}b") in data_error(catalog.check_classes, {"here": [f"a{character}b"]})


ALIKE = {
    "capitals": ("Cat", "cat"),
    "a space after it": ("cat", "cat "),
    "a space before it": (" cat", "cat"),
    "sharp s": ("STRASSE", "straße"),
    "composed and decomposed": ("große Kätzchen", "große Ka\u0308tzchen"),
    "wide letters": ("ｃａｔ", "cat"),
}


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("split", ["train", "test"])
def test_two_classes_that_look_alike_are_rejected(root, split, one, other):
    for name in ("train", "test"):
        shutil.rmtree(root / name / "cat")
    save(root / "train" / one / "0.png")
    save(root / split / other / "0.png")
    if {one, other} - {path.name for name in ("train", "test") for path in (root / name).iterdir()}:
        pytest.skip("this file system does not tell these names apart")
    message = failure(root)
    assert repr(one) in message and repr(other) in message
    assert str(root / "train") in message and str(root / split) in message


@pytest.fixture
def each_its_own(tmp_path, options):
    """each_its_own(**classes of each site): their folders, and the options of a run over them."""

    def make(**classes: list[str]):
        for site, names in classes.items():
            for split, n_images in (("train", 10), ("test", 2)):
                for name in names:
                    for i in range(n_images):
                        save(tmp_path / site.replace("_", "-") / split / name / f"{i}.png", (ord(name[0]), i, 0))
        root = str(tmp_path / "{site}")
        return options(dataset="image_folder", data_root=root, image_size=4, partition="none", n_clients=len(classes))

    return make


def labels_and_reds(module: data.SiteDataModule) -> set[tuple[int, int]]:
    """What the loaders give: each label with the red of its images."""
    module.setup()
    batches = [*module.train_dataloader(), *module.val_dataloader(), *module.test_dataloader()]
    return {
        (label, round((red + 1) * 127.5))
        for images, labels in batches
        for label, red in zip(labels.tolist(), images[:, 0, 0, 0].tolist(), strict=True)
    }


def test_each_site_can_have_its_own_folder(each_its_own):
    run = each_its_own(site_1=["cat"], site_2=["cat", "dog"])
    assert distribution.describe(run).counts == {"site-1": {"cat": 10, "dog": 0}, "site-2": {"cat": 10, "dog": 10}}


def test_a_class_that_a_site_lacks_does_not_shift_its_labels(each_its_own):
    run = each_its_own(site_1=["cat", "dog", "emu"], site_2=["bee", "emu"])
    run.classes = distribution.describe(run).classes
    assert run.classes == ["bee", "cat", "dog", "emu"]
    first, second = (data.SiteDataModule(site, run) for site in ("site-1", "site-2"))
    assert labels_and_reds(first) == {(1, ord("c")), (2, ord("d")), (3, ord("e"))}
    assert labels_and_reds(second) == {(0, ord("b")), (3, ord("e"))}


def test_a_class_unknown_to_the_federation_is_named(each_its_own):
    run = each_its_own(site_1=["cat", "dog"], site_2=["cat", "unicorn"])
    run.classes = ["cat", "dog"]
    with pytest.raises(UserError, match="site-2 has a class 'unicorn'.*: cat, dog"):
        data.SiteDataModule("site-2", run).setup()


def test_the_images_of_all_sites_are_pooled(each_its_own):
    run = each_its_own(site_1=["cat", "dog"], site_2=["cat", "emu"], site_3=["emu"])
    run.classes = distribution.describe(run).classes
    module = data.SiteDataModule(None, run)
    assert labels_and_reds(module) == {(0, ord("c")), (1, ord("d")), (2, ord("e"))}
    sizes = {part: len(rows) for part, rows in module.indices.items()}
    assert (sizes["train"] + sizes["val"], sizes["test"]) == (50, 10)
    assert module.counts["test"] == {"cat": 4, "dog": 2, "emu": 4}


def test_a_site_whose_folder_is_missing_is_named(each_its_own):
    run = each_its_own(site_1=["cat"], site_3=["cat"])
    run.n_clients = 3
    with pytest.raises(UserError, match="site-2.* cannot be read"):
        distribution.prepare(run)


def test_with_too_few_folders_the_error_says_how_many_sites_there_can_be(each_its_own, conversions):
    run = each_its_own(site_1=["cat"], site_2=["cat", "dog"])
    run.n_clients = 4
    message = data_error(distribution.prepare, run)
    assert "site-3 does not exist" in message and "use --n_clients 2" in message
    assert conversions == []  # it is told at once


def test_with_no_folder_at_all_the_error_suggests_no_number(each_its_own):
    run = each_its_own()
    run.n_clients = 2
    message = data_error(distribution.prepare, run)
    assert "site-1 cannot be read" in message and "--n_clients" not in message


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
def test_similar_classes_of_two_sites_are_rejected(each_its_own, one, other):
    run = each_its_own(site_1=[one, "dog"], site_2=["dog"], site_3=["dog", other])
    message = data_error(distribution.describe, run)
    assert f"site-1 has a class {one!r} and site-3 has {other!r}" in message


def test_a_single_class_over_all_sites_is_rejected(each_its_own):
    run = each_its_own(site_1=["cat"], site_2=["cat"])
    distribution.prepare(run)
    message = data_error(distribution.describe, run)
    assert "'cat'" in message and "two or more" in message and "/train/<class>" in message


# ---- the classes of real sites, from a file


@pytest.fixture
def classes_file(tmp_path, options):
    """classes_file(content): the options of a run whose --classes FILE has this content."""

    def write(content: bytes):
        (tmp_path / "classes.txt").write_bytes(content)
        return options(dataset="image_folder", classes_file=str(tmp_path / "classes.txt"))

    return write


@pytest.mark.parametrize(
    "content", [b"cat\ndog\n", b"cat\r\ndog", b"\xef\xbb\xbfcat\n\n dog \n"], ids=["", "crlf", "mark"]
)
def test_the_classes_of_real_sites_come_from_a_file(classes_file, content):
    assert distribution.known_classes(classes_file(content)) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "at least two"),
        (b"cat\n", "at least two"),
        (b"cat\ndog\ncat\n", "without duplicates"),
        (b"cat\nCat\n", "'cat'"),
        ("cat\nd\u2028og\n".encode(), r"'d\u2028og'"),
        ("cat\nd\x85og\n".encode(), r"'d\x85og'"),
        (b"cat\ndog\x1c\x1b\n", r"'dog\x1c\x1b'"),
        ("große Katze\nHund\n".encode("latin-1"), "not UTF-8"),
    ],
    ids=["none", "one", "twice", "alike", "line separator", "next line", "escape", "not UTF-8"],
)
def test_an_invalid_classes_file_is_rejected(classes_file, content, said):
    run = classes_file(content)
    message = data_error(distribution.known_classes, run)
    assert said in message and run.classes_file in message
