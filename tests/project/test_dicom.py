"""DICOM files, on those that pydicom ships, and copies of them that were changed."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from federation.site.catalog import open_split, prepare, read_image
from programs import data_error

pydicom = pytest.importorskip("pydicom")

FOLDER = Path(pydicom.__file__).parent / "data" / "test_files"
CT, MR, COLOR = FOLDER / "CT_small.dcm", FOLDER / "MR_small.dcm", FOLDER / "examples_rgb_color.dcm"
# CT: 128 x 128, 16 bits, intercept -1024, no window. MR: 64 x 64, 16 bits with a sign, window 600, 1600.


@pytest.fixture
def changed(tmp_path):
    """changed(file, **elements): a copy of a file with other elements; None removes one, pixels replace the image."""

    def save(file: Path, pixels=None, **elements) -> Path:
        dataset = pydicom.dcmread(file)
        if pixels is not None:
            dataset.Rows, dataset.Columns = pixels.shape
            dataset.PixelData = pixels.tobytes()
        for name, value in elements.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        dataset.save_as(tmp_path / "changed.dcm")
        return tmp_path / "changed.dcm"

    return save


def gray_of(path: Path, size: int, white: int | None = None) -> np.ndarray:
    """The image at its own size, S x S: float (S, S); its three channels are equal."""
    image = read_image(path, size, "stretch", white)
    assert image.shape == (3, size, size) and (image[0] == image[1]).all() and (image[0] == image[2]).all()
    return image[0].astype(float)


def stored(path: Path) -> np.ndarray:
    return pydicom.dcmread(path).pixel_array.astype(float)


def scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    return ((values - black) / (white - black)).clip(0, 1) * 255


def test_the_window_of_the_file_is_applied():
    expected = scaled(stored(MR), 600 - 0.5 - 1599 / 2, 600 - 0.5 + 1599 / 2)  # PS3.3, C.11.2.1.2.1
    assert np.abs(gray_of(MR, 64) - expected).max() <= 0.5
    assert expected.std() > 30


def test_values_are_rescaled_before_they_are_windowed(changed):
    window = {"WindowCenter": 40, "WindowWidth": 401, "RescaleSlope": 2, "RescaleIntercept": -1024}
    path = changed(CT, **window)
    expected = scaled(2 * stored(CT) - 1024, 39.5 - 200, 39.5 + 200)
    assert np.abs(gray_of(path, 128) - expected).max() <= 0.5
    assert 0.1 < (expected == 0).mean() < 0.9


def test_the_first_of_several_windows_is_used(changed):
    several = changed(MR, WindowCenter=[600, 40], WindowWidth=[1600, 80])
    assert (gray_of(several, 64) == gray_of(MR, 64)).all()


def test_a_sigmoid_window_is_applied(changed):
    path = changed(MR, VOILUTFunction="SIGMOID")
    expected = 255 / (1 + np.exp(-4 * (stored(MR) - 600) / 1600))
    assert np.abs(gray_of(path, 64) - expected).max() <= 0.5


def test_monochrome1_is_inverted(changed):
    path = changed(MR, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(gray_of(path, 64) - (255 - gray_of(MR, 64))).max() <= 1


def test_without_a_window_more_than_8_bits_need_a_white(changed):
    message = data_error(read_image, CT, 128)
    assert str(CT) in message and "16 bits and no window: set --image_white" in message
    assert "no window" in data_error(read_image, changed(MR, WindowCenter="", WindowWidth=""), 64)
    assert np.abs(gray_of(CT, 128, white=2000) - scaled(stored(CT) - 1024, 0, 2000)).max() <= 0.5


@pytest.mark.parametrize(("signed", "black", "white"), [(0, 0, 255), (1, -128, 127)])
def test_without_a_window_8_bits_keep_their_range(changed, signed, black, white):
    pixels = np.linspace(black, white, 64).round().reshape(8, 8).astype(np.int8 if signed else np.uint8)
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": signed}
    path = changed(CT, pixels, **bits)
    assert np.abs(gray_of(path, 8) - scaled(pixels.astype(float), black, white)).max() <= 0.5


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "examples_jpeg2k.dcm", "SC_ybr_full_422_uncompressed.dcm"])
def test_color_becomes_rgb(name):
    pixels = pydicom.pixels.pixel_array(FOLDER / name)  # converts to RGB
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2))
    assert (read_image(FOLDER / name, 32) == expected.transpose(2, 0, 1)).all()
    assert len({channel.tobytes() for channel in read_image(FOLDER / name, 32)}) == 3


REFUSED = {
    "several frames": ("examples_ybr_color.dcm", "has 30 images: save each one as its own file"),
    "a palette": ("examples_palette.dcm", "PALETTE COLOR: save it as gray, or as RGB"),
    "deep color": ("SC_rgb_rle_16bit.dcm", "16 bits of RGB: save it as gray, or as RGB with 8 bits"),
    "no image": ("rtstruct.dcm", "is not a readable DICOM file"),
    "truncated": ("MR_truncated.dcm", "is not a readable DICOM file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_named(kind):
    name, said = REFUSED[kind]
    message = data_error(read_image, FOLDER / name, 32, "stretch", 4095)
    assert message.startswith(str(FOLDER / name)) and said in message


def test_a_folder_can_have_dicom_files_among_others(tmp_path):
    for kind, file in (("ct", MR), ("us", COLOR)):
        for split in ("train", "test"):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            (folder / "0.dcm").write_bytes(file.read_bytes())
            Image.new("L", (5, 5), 77).save(folder / "1.png")
    opened = open_split(prepare("image_folder", tmp_path, 32), "train")
    assert opened.labels.tolist() == [0, 0, 1, 1]
    assert [len(np.unique(image)) > 1 for image in opened.images] == [True, False] * 2


def test_files_are_not_skipped_for_good_because_pydicom_is_missing(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / split / "mr").mkdir(parents=True)
        (tmp_path / split / "mr" / "0.dcm").write_bytes(MR.read_bytes())
        Image.new("L", (5, 5), 77).save(tmp_path / split / "mr" / "1.png")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pydicom", None)
        assert "pip install 'pydicom>=3'" in data_error(prepare, "image_folder", tmp_path, 32, skip_unreadable=0.5)
    assert len(open_split(prepare("image_folder", tmp_path, 32, skip_unreadable=0.5), "train").labels) == 2


def test_without_pydicom_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    message = data_error(read_image, MR, 32)
    assert message == f"{MR} is a DICOM file: {sys.executable} -m pip install 'pydicom>=3'"
