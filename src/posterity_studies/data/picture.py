"""Image files from a user: bounded, checked, and brought to the shape of the data."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy
import torch
from PIL import Image

from posterity_studies.data.cache import DataError


def read_image(path: Path, colour: bool = False) -> torch.Tensor:
    """A picture file as uint8, (28, 28) in grey or (32, 32, 3); transparent parts are black.

    Raises:
        DataError: no such file, no image, or one too large to be meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        shown = Image.alpha_composite(black, rgba).convert("RGB" if colour else "L")
        size = (32, 32) if colour else (28, 28)
        return torch.from_numpy(numpy.array(shown.resize(size, Image.Resampling.LANCZOS)))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"{path}: not an image that can be read ({error})") from None
