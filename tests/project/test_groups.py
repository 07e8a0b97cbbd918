"""Images of one patient stay together: in folders or in images.csv, at one site, and in train, validation, or test."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from deploy import doctor
from federation.launch import distribution
from federation.site.catalog import list_images, open_split, prepare
from federation.site.partition import most_frequent, split
from programs import data_error
from settings import PARTITIONS, Options

always_the_same = settings(derandomize=True, deadline=None, max_examples=30)


def save(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """20 patients with three images each, whose red is the patient's number; every other one is sick."""
    for patient in range(20):
        for number in range(3):
            save(tmp_path / "train" / ("sick" if patient % 2 else "well") / f"p{patient:02}" / f"{number}.png", patient)
    return tmp_path


def patients(root: Path, name: str) -> set[int]:
    return set(open_split(prepare("image_folder", root, 4), name).images[:, 0, 0, 0].tolist())


def run(root: Path, **changes) -> Options:
    defaults = {"dataset": "image_folder", "data_root": str(root), "image_size": 4, "n_clients": 2}
    return Options(**{**defaults, **changes})


def parts(options: Options) -> dict[tuple[str, str], list[int]]:
    """Site and part -> the patients of its images."""
    found = {}
    for site in [f"site-{i + 1}" for i in range(options.n_clients)]:
        module = data.SiteDataModule(site, options)
        module.setup()
        for name, images in module.parts.items():
            found[site, name] = [int(images.images[row, 0, 0, 0]) for row in images.rows]
    return found


# ---- folders


def test_without_a_test_folder_whole_groups_are_split_off(root):
    train, test = patients(root, "train"), patients(root, "test")
    assert len(test) == 2 and len(train) == 18 and not train & test


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
def test_every_group_is_at_one_site_and_in_one_part(root, scheme):
    found = parts(run(root, partition=scheme, alpha=5.0))
    everyone = [patient for own in found.values() for patient in set(own)]
    assert sorted(everyone) == list(range(20))  # each in a single part of a single site,
    assert sorted(patient for own in found.values() for patient in own) == sorted(
        list(range(20)) * 3
    )  # with all images
    assert all(found[site, "val"] and found[site, "train"] for site in ("site-1", "site-2"))


def test_real_sites_validate_on_other_groups_than_they_train_on(root):
    found = parts(run(root, partition="none", n_clients=1))
    train, val, test = (set(found["site-1", name]) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (14, 4, 2) and len(train | val | test) == 20


def test_a_group_can_have_images_of_several_classes(tmp_path):
    for patient in range(10):
        for name in ("sick", "well"):
            save(tmp_path / "train" / name / f"p{patient}" / "0.png", patient)
    train, test = patients(tmp_path, "train"), patients(tmp_path, "test")
    assert len(test) == 1 and not train & test


def test_an_image_without_a_group_is_on_its_own(root):
    for number in range(20, 40):
        save(root / "train" / "sick" / f"{number}.png", number)
    found = parts(run(root, partition="iid"))
    assert sorted(patient for own in found.values() for patient in set(own)) == list(range(40))


def test_only_the_first_folder_below_the_class_is_the_group(root):
    save(root / "train" / "sick" / "p01" / "2024" / "may.png", 1)
    assert {file.group for file in list_images(root)["train"] if file.path.stem == "may"} <= {"p01"}


@pytest.mark.parametrize(
    ("scheme", "said"), [("iid", "1 training groups are too few"), ("none", "1 group(s) cannot be")]
)
def test_a_single_group_cannot_be_split(tmp_path, scheme, said):
    for number in range(9):
        save(tmp_path / "train" / "sick" / "only" / f"{number}.png")
        save(tmp_path / "test" / "sick" / "other" / f"{number}.png")
    assert said in data_error(data.SiteDataModule("site-1", run(tmp_path, partition=scheme)).setup)


# ---- images.csv


def write_table(root: Path, rows: list[str], header: str = "file,class,group,site") -> None:
    (root / "images.csv").write_text("\n".join([header, *rows]), encoding="utf-8-sig")


@pytest.fixture
def table(tmp_path) -> Path:
    """12 patients with two images each, at three sites; every other one is sick."""
    rows = []
    for patient in range(12):
        for number in range(2):
            save(tmp_path / "scans" / f"{patient}-{number}.png", patient)
            rows.append(
                f"scans/{patient}-{number}.png,{'sick' if patient % 2 else 'well'},p{patient},site-{patient // 4 + 1}"
            )
    write_table(tmp_path, rows)
    return tmp_path


def test_a_table_lists_files_classes_and_groups(table):
    opened = open_split(prepare("image_folder", table, 4), "train")
    assert opened.classes == ["sick", "well"]
    assert [opened.classes[label] for label in opened.labels] == [
        "sick" if red % 2 else "well" for red in opened.images[:, 0, 0, 0].tolist()
    ]
    found = parts(run(table, partition="iid"))
    assert sorted(patient for own in found.values() for patient in set(own)) == list(range(12))


def test_the_partition_site_follows_the_table(table):
    found = parts(run(table, partition="site", n_clients=3))
    for number in range(3):
        own = [patient for name in ("train", "val", "test") for patient in found[f"site-{number + 1}", name]]
        assert sorted(own) == sorted(list(range(4 * number, 4 * number + 4)) * 2)
        assert found[f"site-{number + 1}", "test"]  # split off at each site
    pooled = data.SiteDataModule(None, run(table, partition="site", n_clients=3))
    pooled.setup()
    assert sum(map(len, pooled.indices.values())) == 24
    assert distribution.describe(run(table, partition="site", n_clients=3)).classes == ["sick", "well"]


@pytest.mark.parametrize("n_sites", [2, 4])
def test_the_tables_sites_must_be_all_simulated_sites(table, n_sites):
    message = data_error(data.SiteDataModule("site-1", run(table, partition="site", n_clients=n_sites)).setup)
    assert f"must have site-1 to site-{n_sites}: see --n_clients" in message


def test_the_partition_site_needs_a_table_with_sites(root):
    assert "needs images.csv" in data_error(data.SiteDataModule("site-1", run(root, partition="site")).setup)


def test_files_in_the_folder_test_are_test_images(table):
    save(table / "test" / "0.png", 99)
    with (table / "images.csv").open("a") as file:
        file.write("\ntest/0.png,well,p99,site-1")
    assert patients(table, "test") == {99} and patients(table, "train") == set(range(12))


def test_a_table_without_groups_or_sites_is_enough(table):
    write_table(table, [f"scans/{patient}-0.png,{'ab'[patient % 2]}" for patient in range(12)], "file,class")
    opened = open_split(prepare("image_folder", table, 4), "train")
    assert (opened.classes, opened.groups, opened.sites) == (["a", "b"], None, None)


def test_a_changed_table_or_file_is_converted_again(table):
    before = prepare("image_folder", table, 4)
    write_table(table, ["scans/0-0.png,well", "scans/1-0.png,sick", "scans/2-0.png,well"], "file,class")
    shorter = prepare("image_folder", table, 4)
    write_table(table, ["scans/0-0.png,well,p", "scans/1-0.png,sick,", "scans/2-0.png,well,p"], "file,class,group")
    corrected = prepare("image_folder", table, 4)
    save(table / "scans" / "0-0.png", 200)
    assert len({before, shorter, corrected, prepare("image_folder", table, 4)}) == 4


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            ["scans/0-0.png,,p,site-1"],
            "row 2 of .*images.csv lacks its file or class: expected the columns file, class",
        ),
        (["scans/0-0.png;well;p;site-1"], "row 2 .* with commas"),
        (["scans/0-0.png,well,p,site-1", "./scans/0-0.png,sick,p,site-1"], "row 3 .* lists scans/0-0.png again"),
        (["scans/none.png,well,p,site-1"], "none.png cannot be read: No such file"),
        ([], "lists no training images"),
        (["scans/0-0.png,Well,p,site-1", "scans/1-0.png,well,p,site-1"], "'Well'.*'well': use one spelling"),
    ],
    ids=["no class", "semicolons", "twice", "missing", "empty", "alike"],
)
def test_a_wrong_table_is_one_line(table, rows, said):
    write_table(table, rows)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(data_error(prepare, "image_folder", table, 4))


def test_a_table_that_is_not_utf8_is_one_line(table):
    (table / "images.csv").write_bytes(b"file,class\ngr\xf6\xdfe.png,well\n")
    assert "save it as CSV, in UTF-8" in data_error(prepare, "image_folder", table, 4)


# ---- for any data


rows = st.builds(
    lambda n_rows, n_groups, seed: [np.random.RandomState(seed).randint(0, n, n_rows) for n in (3, n_groups)],
    n_rows=st.integers(120, 300),
    n_groups=st.integers(40, 60),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("scheme", [scheme for scheme in PARTITIONS if scheme != "none"])
@always_the_same
@given(train=rows, test=rows, seed=st.integers(0, 2**32 - 1))
def test_rows_of_a_group_are_never_separated_and_none_is_lost(scheme, train, test, seed):
    options = Options(partition=scheme, n_clients=3, seed=seed, alpha=5.0)
    (labels, groups), (test_labels, test_groups) = train, test
    sites = [split(labels, test_labels, f"site-{i}", options, (groups, test_groups)) for i in (1, 2, 3)]
    trained = [own[part] for own in sites for part in ("train", "val")]
    for column, pieces in ((groups, trained), (test_groups, [own["test"] for own in sites])):
        assert sorted(np.concatenate(pieces).tolist()) == list(range(len(column)))
        assert sum(len(set(column[piece].tolist())) for piece in pieces) == len(set(column.tolist()))


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_groups_of_one_row_each_change_nothing(scheme):
    labels, test_labels = np.arange(90) % 3, np.arange(30) % 3
    options = Options(partition=scheme, n_clients=2, seed=4, alpha=5.0)
    for site in ("site-1", "site-2"):
        plain = split(labels, test_labels, site, options)
        grouped = split(labels, test_labels, site, options, (np.arange(90) + 7, np.arange(30)))
        assert {part: own.tolist() for part, own in plain.items()} == {
            part: own.tolist() for part, own in grouped.items()
        }


def test_the_groups_of_a_small_example_never_change():
    labels, groups = np.arange(24) % 3, np.arange(24) // 3
    own = split(labels, labels[:6], "site-1", Options(partition="iid", n_clients=2, seed=7), (groups, groups[:6]))
    assert {part: groups[found].tolist()[::3] for part, found in own.items()} == {
        **{"train": [0, 2, 6], "val": [5], "test": [0]},
    }


def test_a_groups_class_is_its_most_frequent_one():
    assert most_frequent(np.array([1, 0, 0, 2, 2, 0]), np.array([0, 0, 0, 1, 1, 2])).tolist() == [0, 2, 0]


# ---- the doctor


def line(root: Path) -> doctor.Line:
    return doctor.compare_groups(list_images(root), 2)


def test_the_doctor_warns_of_a_patient_in_train_and_in_test(root):
    assert line(root).status == "ok" and line(root).found.startswith("20, each in train or in test; 0 images")
    for patient in ("p03", "p04"):
        save(root / "test" / "well" / patient / "0.png")
    assert (line(root).status, line(root).found) == ("warning", "'p03' and 1 more in train and in test")


def test_the_doctor_warns_of_names_that_look_like_several_images_of_each_patient(tmp_path):
    for patient in range(10):
        for number in range(3):
            save(tmp_path / "train" / ("sick" if patient % 2 else "well") / f"patient{patient}_{number}.png")
    assert line(tmp_path).status == "warning"
    assert "10 series of files, such as 'patient1'" in line(tmp_path).found


def test_the_doctor_accepts_a_few_names_that_look_alike(tmp_path):
    for number in range(60):
        name = f"scan{number // 2}_{number % 2}" if number < 12 else f"{number}x"
        save(tmp_path / "train" / ("sick" if number % 2 else "well") / f"{name}.png")
    assert line(tmp_path).status == "ok"


@pytest.mark.parametrize("pattern", ["{:04}.png", "IMG_{:04}.png", "{name}-{:03}.png", "{0:08x}f.png"])
def test_the_doctor_accepts_names_that_only_count(tmp_path, pattern):
    for number in range(40):
        name = "sick" if number % 2 else "well"
        save(tmp_path / "train" / name / pattern.format(number, name=name))
    assert line(tmp_path).status == "ok"
