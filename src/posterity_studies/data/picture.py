"""Image files from a user: bounded, checked, and brought to the shape of the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from PIL import Image

from posterity_studies.data.cache import DataError


def read_image(
    path: Path,
    colour: bool,
    side: int,
    cut: Callable[[int, int], tuple[float, float, float, float]] | None = None,
) -> torch.Tensor:
    """A picture file as uint8, (side, side) or (side, side, 3); transparent parts are black.

    ``cut`` says which part of the picture, of its width and height; default all of it.

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
        box = cut(*shown.size) if cut else None
        shown = shown.resize((side, side), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(numpy.array(shown))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"{path}: not an image that can be read ({error})") from None
