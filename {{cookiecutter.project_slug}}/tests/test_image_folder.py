"""The user's own images: what may lie in the folder, what is said when it cannot be used, and when it is read again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from conftest import PROJECT, data_error, names_in
from federation import catalog
from federation.catalog import open_split, prepare
from federation.fetch import DataError


def save(path: Path, colour=(200, 100, 50), size=(5, 3), mode: str = "RGB") -> Path:
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def save_16_bits(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 5), value, np.uint16)).save(path)
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

    def count(root, image_size, store):
        converted.append(root)
        convert(root, image_size, store)

    monkeypatch.setattr(catalog, "_convert_folder", count)
    return converted


def images_of(root: Path, split: str = "train", image_size: int = 4) -> np.ndarray:
    return open_split(prepare("image_folder", root, image_size), split).images


def reds(root: Path, split: str = "train") -> list[int]:
    """The red of each image: which images they are."""
    return images_of(root, split)[:, 0, 0, 0].tolist()


def failure(root: Path | None) -> str:
    return data_error(prepare, "image_folder", root, 4)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


# ---- what becomes of the images


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_places_in_the_sorted_list_of_folders(root, split):
    opened = open_split(prepare("image_folder", root, 4), split)
    assert opened.classes == ["cat", "dog"]
    assert [opened.classes[label] for label in opened.labels] == sorted(["cat", "dog"] * (len(opened.labels) // 2))
    assert opened.labels.dtype == np.int64


def test_images_come_in_the_order_of_their_names(root):
    assert reds(root, "train") == [10, 11, 12, 20, 21, 22]
    assert reds(root, "test") == [10, 11, 20, 21]


@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("colour.png", "RGB", (200, 100, 50), (200, 100, 50)),
        ("grey.png", "L", 77, (77, 77, 77)),
        ("black and white.png", "1", 1, (255, 255, 255)),
        ("palette.png", "P", 0, (0, 0, 0)),
        ("see-through.png", "RGBA", (200, 100, 50, 128), (200, 100, 50)),
        ("see-through grey.png", "LA", (77, 128), (77, 77, 77)),
        ("print.tif", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("bitmap.BMP", "RGB", (1, 2, 3), (1, 2, 3)),
        ("web.webp", "RGB", (255, 255, 255), (255, 255, 255)),
        ("photograph.JPG", "RGB", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_every_kind_of_image_becomes_rgb(root, name, mode, colour, expected):
    save(root / "train" / "aardvark" / name, colour, mode=mode)
    image = images_of(root)[0]
    assert image.dtype == np.uint8
    assert image.reshape(3, -1).T.tolist() == [list(expected)] * 16


def test_a_palettes_colours_are_looked_up(root):
    colours = Image.new("RGB", (4, 4), (200, 100, 50)).quantize(4)
    (root / "train" / "aardvark").mkdir()
    colours.save(root / "train" / "aardvark" / "palette.png")
    assert images_of(root)[0, :, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (255, 0), (0x8000, 128), (0xFFFF, 255)])
def test_sixteen_bits_are_scaled_and_not_clipped(root, suffix, value, expected):
    save_16_bits(root / "train" / "aardvark" / f"x-ray{suffix}", value)
    assert images_of(root)[0].tolist() == np.full((3, 4, 4), expected).tolist()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 480), (4, 4)], ids=str)
@pytest.mark.parametrize("image_size", [4, 32])
def test_every_size_is_brought_to_the_one_asked_for(root, size, image_size):
    save(root / "train" / "aardvark" / "0.png", (9, 8, 7), size)
    image = images_of(root, image_size=image_size)[0]
    assert image.shape == (3, image_size, image_size)
    assert image.reshape(3, -1).T.tolist() == [[9, 8, 7]] * image_size**2


def test_images_in_folders_within_a_class_belong_to_it(root):
    save(root / "train" / "cat" / "2024" / "may" / "0.png", (99, 0, 0))
    opened = open_split(prepare("image_folder", root, 4), "train")
    assert opened.labels[opened.images[:, 0, 0, 0].tolist().index(99)] == opened.classes.index("cat")


def test_files_that_are_no_images_are_passed_over(root):
    (root / "train" / "cat" / "notes.txt").write_text("a good cat")
    (root / "train" / "list.csv").write_text("0.png,cat")
    assert len(reds(root)) == 6


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "cat/._0.png"])
def test_what_is_hidden_is_passed_over(root, hidden):
    (root / "train" / hidden).parent.mkdir(exist_ok=True)
    (root / "train" / hidden).write_bytes(b"no image at all")
    opened = open_split(prepare("image_folder", root, 4), "train")
    assert (len(opened.images), opened.classes) == (6, ["cat", "dog"])


def test_names_may_have_spaces_and_any_letters(tmp_path):
    root = tmp_path / "Bilder für später 🙂"
    for class_name in ("größe 1", "猫", "it's"):
        save(root / "train" / class_name / "ein bild – 1.png")
        save(root / "test" / class_name / "ein bild – 1.png")
    assert open_split(prepare("image_folder", root, 4), "train").classes == sorted(["größe 1", "猫", "it's"])


def test_a_name_that_is_not_utf8_is_no_obstacle(root):
    name = os.fsdecode(b"gr\xf6\xdfe.png")
    try:
        (root / "train" / "cat" / "2.png").rename(root / "train" / "cat" / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert sorted(reds(root)) == [10, 11, 12, 20, 21, 22]


# ---- no test folder: a tenth is held out


@pytest.fixture
def root_without_test(tmp_path) -> Path:
    for red in range(40):
        save(tmp_path / "images" / "train" / ("even" if red % 2 == 0 else "odd") / f"{red:02}.png", (red, 0, 0))
    return tmp_path / "images"


def test_without_test_images_a_tenth_of_the_others_is_held_out(root_without_test):
    train, test = reds(root_without_test, "train"), reds(root_without_test, "test")
    assert len(test) == 4
    assert sorted(train + test) == list(range(40))


def test_held_out_images_keep_their_labels(root_without_test):
    opened = open_split(prepare("image_folder", root_without_test, 4), "test")
    expected = ["even" if red % 2 == 0 else "odd" for red in opened.images[:, 0, 0, 0].tolist()]
    assert [opened.classes[label] for label in opened.labels] == expected


def test_the_same_images_are_held_out_each_time(root_without_test, monkeypatch, tmp_path):
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


def test_what_is_hidden_does_not_change_a_folder(root, conversions):
    images_of(root)
    save(root / "train" / ".ipynb_checkpoints" / "0.png")
    save(root / "train" / "cat" / ".ipynb_checkpoints" / "0.png")
    images_of(root)
    assert len(conversions) == 1


def test_each_image_size_has_a_store_of_its_own(root):
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


def test_a_change_behind_a_link_is_seen(root, tmp_path, conversions):
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


# ---- the converted copy is private, and there is one


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("dataset", ["image_folder", "digits"])
def test_nobody_else_can_read_the_converted_copy(root, empty_cache, dataset, mask):
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


def test_a_changed_folder_leaves_no_older_copy_behind(root, empty_cache):
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


def test_images_that_are_open_stay_readable_when_their_copy_is_replaced(root):
    opened = open_split(prepare("image_folder", root, 4), "train")
    save(root / "train" / "cat" / "3.png", (13, 0, 0))
    assert reds(root) == [10, 11, 12, 13, 20, 21, 22]
    assert opened.images[:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22]


def test_a_copy_that_was_replaced_before_it_was_opened_is_an_error_of_one_line(root):
    store = prepare("image_folder", root, 4)
    save(root / "train" / "cat" / "3.png", (13, 0, 0))
    prepare("image_folder", root, 4)
    assert "run the same command again" in data_error(open_split, store, "train")


DIE_WHILE_CONVERTING = """
import os, sys
from pathlib import Path
from federation import catalog

catalog._write_classes = lambda *args: os._exit(9)
catalog.prepare("image_folder", Path(sys.argv[1]), 4)
"""


def test_what_a_killed_conversion_left_is_removed_by_the_next(root, empty_cache):
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
def test_what_cannot_be_used_is_named(root, spoil):
    assert str(spoil(root)) in failure(root)


def test_an_empty_class_is_named_though_the_folder_was_converted_before(root):
    images_of(root)
    (root / "train" / "emu").mkdir()
    assert str(root / "train" / "emu") in failure(root)


def test_without_a_data_root_the_ways_to_give_one_are_named():
    message = failure(None)
    assert all(way in message for way in ("--data_root", "FL_DATA_ROOT", "train/<class>/<image>"))


def test_a_folder_that_may_not_be_read_is_named(root, permissions_bind):
    (root / "train" / "dog").chmod(0)
    message = failure(root)
    (root / "train" / "dog").chmod(0o755)
    assert str(root / "train" / "dog") in message and "Permission denied" in message


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
def test_a_class_whose_name_is_no_line_of_text_is_refused(root, split, name):
    (root / split / "cat").rename(root / split / name)
    message = failure(root)
    assert f"{root / split} has a class {name!r}" in message
    assert message.splitlines() == [message]


def test_a_class_whose_name_is_not_utf8_is_refused(root):
    try:
        (root / "train" / "cat").rename(root / "train" / os.fsdecode(b"gr\xf6\xdfe"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert f"{root / 'train'} has a class 'gr\\udcf6\\udcdfe'" in failure(root)


def test_every_character_that_ends_a_line_is_refused_in_a_name():
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
def test_two_classes_that_look_alike_are_refused(root, split, one, other):
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
def each_its_own(tmp_path, monkeypatch, options):
    """each_its_own(**classes of each site): their folders, and the options of a run over them."""

    def make(**classes: list[str]):
        for site, names in classes.items():
            for split, n_images in (("train", 10), ("test", 2)):
                for name in names:
                    for i in range(n_images):
                        save(tmp_path / site.replace("_", "-") / split / name / f"{i}.png", (ord(name[0]), i, 0))
        monkeypatch.setenv("FL_DATA_ROOT", str(tmp_path / "{site}"))
        return options(dataset="image_folder", image_size=4, partition="none", n_clients=len(classes))

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


def test_each_site_has_a_folder_of_its_own(each_its_own):
    run = each_its_own(site_1=["cat"], site_2=["cat", "dog"])
    held = data.describe(run)
    assert held.counts == {"site-1": {"cat": 10, "dog": 0}, "site-2": {"cat": 10, "dog": 10}}


def test_a_class_that_one_site_lacks_does_not_shift_its_other_labels(each_its_own):
    run = each_its_own(site_1=["cat", "dog", "emu"], site_2=["bee", "emu"])
    classes = data.describe(run).classes
    assert classes == ["bee", "cat", "dog", "emu"]
    first, second = (data.SiteDataModule(site, classes, run) for site in ("site-1", "site-2"))
    assert labels_and_reds(first) == {(1, ord("c")), (2, ord("d")), (3, ord("e"))}
    assert labels_and_reds(second) == {(0, ord("b")), (3, ord("e"))}


def test_a_class_that_the_federation_does_not_know_is_named(each_its_own):
    run = each_its_own(site_1=["cat", "dog"], site_2=["cat", "unicorn"])
    with pytest.raises(DataError, match="site-2 has a class 'unicorn'.*: cat, dog"):
        data.SiteDataModule("site-2", ["cat", "dog"], run).setup()


def test_the_images_of_all_sites_are_pooled(each_its_own):
    run = each_its_own(site_1=["cat", "dog"], site_2=["cat", "emu"], site_3=["emu"])
    classes = data.describe(run).classes
    module = data.pooled(classes, run)
    assert labels_and_reds(module) == {(0, ord("c")), (1, ord("d")), (2, ord("e"))}
    assert (module.n_train + module.n_val, module.n_test) == (50, 10)


def test_a_site_whose_folder_is_missing_is_named(each_its_own):
    run = each_its_own(site_1=["cat"], site_3=["cat"])
    run.n_clients = 3
    with pytest.raises(DataError, match="site-2.* cannot be read"):
        data.prepare(run)


def test_more_sites_than_folders_are_answered_with_the_number_of_folders(each_its_own, conversions):
    run = each_its_own(site_1=["cat"], site_2=["cat", "dog"])
    run.n_clients = 4
    message = data_error(data.prepare, run)
    assert "site-3 is not there" in message and "use --n_clients 2" in message
    assert conversions == []  # it is told at once


def test_a_folder_for_no_site_at_all_is_not_answered_with_a_number(each_its_own):
    run = each_its_own()
    run.n_clients = 2
    message = data_error(data.prepare, run)
    assert "site-1 cannot be read" in message and "--n_clients" not in message


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
def test_classes_of_two_sites_that_look_alike_are_refused(each_its_own, one, other):
    run = each_its_own(site_1=[one, "dog"], site_2=["dog"], site_3=["dog", other])
    message = data_error(data.describe, run)
    assert f"site-1 has a class {one!r} and site-3 has {other!r}" in message


def test_a_single_class_over_all_sites_is_refused(each_its_own):
    run = each_its_own(site_1=["cat"], site_2=["cat"])
    data.prepare(run)
    message = data_error(data.describe, run)
    assert "'cat'" in message and "two or more" in message and "/train/<class>" in message


# ---- the classes of real sites, from a file


@pytest.fixture
def classes_file(tmp_path, options):
    """classes_file(content): the options of a run whose --classes FILE has this content."""

    def write(content: bytes):
        (tmp_path / "classes.txt").write_bytes(content)
        return options(dataset="image_folder", classes=str(tmp_path / "classes.txt"))

    return write


@pytest.mark.parametrize(
    "content", [b"cat\ndog\n", b"cat\r\ndog", b"\xef\xbb\xbfcat\n\n dog \n"], ids=["", "crlf", "mark"]
)
def test_the_classes_of_real_sites_are_the_lines_of_a_file(classes_file, content):
    assert data.known_classes(classes_file(content)) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "at least two"),
        (b"cat\n", "at least two"),
        (b"cat\ndog\ncat\n", "none twice"),
        (b"cat\nCat\n", "'cat'"),
        ("cat\nd\u2028og\n".encode(), r"'d\u2028og'"),
        ("cat\nd\x85og\n".encode(), r"'d\x85og'"),
        (b"cat\ndog\x1c\x1b\n", r"'dog\x1c\x1b'"),
        ("große Katze\nHund\n".encode("latin-1"), "not UTF-8"),
    ],
    ids=["none", "one", "twice", "alike", "line separator", "next line", "escape", "not UTF-8"],
)
def test_a_file_of_classes_that_cannot_be_used_is_refused(classes_file, content, said):
    run = classes_file(content)
    message = data_error(data.known_classes, run)
    assert said in message and run.classes in message
