"""Colour pictures of 32×32 pixels, decoded strictly."""

import io
import json
import tarfile
from collections.abc import Iterable

import numpy as np
from PIL import Image

CIFAR = 10_000  # images in a file
SIDE = 32


def cifar_pictures(files: Iterable[bytes]) -> dict[str, np.ndarray]:
    """CIFAR-10 as six PNGs, a row of pixels for each image, and two JSON lists of labels.

    Raises ValueError on another size or labels that are no classes.
    """
    *pictures, train, test = files
    images = np.concatenate([_rows(picture) for picture in pictures])
    return _divided(images, np.array([*json.loads(train), *json.loads(test)]))


def _rows(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        if image.size[0] * image.size[1] != CIFAR * SIDE * SIDE:
            raise ValueError(f"a picture of {image.size} does not hold {CIFAR} images")
        return np.array(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)


def cifar_binary(files: Iterable[bytes]) -> dict[str, np.ndarray]:
    """CIFAR-10's own binary archive: for each image its label, then three planes of colour.

    Raises ValueError on a missing file or another size.
    """
    (archive,) = files
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        parts = []
        for name in names:
            member = tar.extractfile(f"cifar-10-batches-bin/{name}.bin")
            if member is None:
                raise ValueError(f"{name} is no file")
            parts.append(np.frombuffer(member.read(), np.uint8))
    rows = np.concatenate(parts).reshape(-1, 1 + 3 * SIDE * SIDE)
    images = rows[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return _divided(np.ascontiguousarray(images), rows[:, 0])


def _divided(images: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    if len(images) != 6 * CIFAR or targets.shape != (6 * CIFAR,) or not 0 <= targets.max() <= 9:
        raise ValueError(f"expected {6 * CIFAR} images and labels, got {len(images)}")
    n = 5 * CIFAR
    return {
        "train.inputs": images[:n],
        "train.targets": targets[:n].astype(np.int64),
        "test.inputs": images[n:],
        "test.targets": targets[n:].astype(np.int64),
    }


def emoji(files: Iterable[bytes]) -> dict[str, np.ndarray]:
    """Square pictures on white, each pixel the mean of 2×2; they are for testing only."""
    images = np.stack([_on_white(file) for file in files])
    nothing = np.zeros((0, SIDE, SIDE, 3), np.uint8)
    return {
        "train.inputs": nothing,
        "train.targets": np.zeros(0, np.int64),
        "test.inputs": images,
        "test.targets": np.zeros(len(images), np.int64),
    }


def _on_white(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        rgba = np.array(image.convert("RGBA")).astype(np.float64)
    if rgba.shape != (2 * SIDE, 2 * SIDE, 4):
        raise ValueError(f"an emoji of {rgba.shape[:2]} pixels, expected {(2 * SIDE, 2 * SIDE)}")
    alpha = rgba[..., 3:] / 255
    white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    means = white.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3))
    return np.rint(means).astype(np.uint8)
