"""Read DICOM files. Needs pydicom, which only sites with such files have to install."""

import sys
from pathlib import Path

import numpy as np

from federation.errors import UserError


def read_dicom(path: Path, white: int | None) -> np.ndarray:
    """Read a DICOM file with one image, as a viewer shows it first: uint8 (H, W) if gray, (H, W, 3) if color.

    - Gray values are rescaled (modality LUT, or slope and intercept), then windowed by the file's first window.
    - Without a window, up to 8 bits keep their whole range; of more bits, 0 is black and `white` is white.
    - MONOCHROME1 is inverted. Color has 8 bits and becomes RGB.

    See PS3.3 of the standard, C.11.1 and C.11.2.

    Raises:
        UserError: pydicom is missing, or the file is rejected or cannot be read.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_windowing, pixel_array
    except ImportError:
        raise UserError(f"{path} is a DICOM file: {sys.executable} -m pip install 'pydicom>=3'") from None
    try:
        file = pydicom.dcmread(path)
        kind, bits = file.PhotometricInterpretation, file.BitsStored
        gray, windowed = kind.startswith("MONOCHROME"), bool(file.get("WindowWidth"))  # can be there, but empty
        refusal = ""
        if (n_images := int(file.get("NumberOfFrames") or 1)) > 1:
            refusal = f"has {n_images} images: save each one as its own file"
        elif kind == "PALETTE COLOR" or not gray and bits > 8:
            refusal = f"has {bits} bits of {kind}: save it as gray, or as RGB with 8 bits"
        elif gray and not windowed and bits > 8 and not white:
            refusal = f"has {bits} bits and no window: set --image_white to the value that is white"
        if not refusal:
            values = pixel_array(file)
            if gray:
                first = -(2 ** (bits - 1)) if file.PixelRepresentation else 0
                ends = apply_modality_lut(np.array([first, first + 2**bits - 1]), file)
                values = apply_modality_lut(values, file).astype(np.float64)
                if windowed:
                    with np.errstate(over="ignore"):  # of a sigmoid
                        values, ends = (apply_windowing(own, file) for own in (values, np.array([-1e9, 1e9])))
                elif bits > 8:
                    ends = np.array([0, white])
                values = ((values - ends[0]) / (ends[1] - ends[0])).clip(0, 1)
                values = ((1 - values if kind == "MONOCHROME1" else values) * 255).round().astype(np.uint8)
    except Exception as error:  # pydicom raises many types for a broken file
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable DICOM file ({reason}): repair or remove it") from None
    if refusal:
        raise UserError(f"{path} {refusal}")
    return values
