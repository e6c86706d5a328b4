"""Pictures in the forms their authors publish, decoded strictly. None is in a package registry."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from posterity_studies.data.cache import Arrays
from posterity_studies.data.colour import SIDE

CIFAR100 = {"train": 50_000, "test": 10_000}  # images
TINY = 64  # pixels a side


def arrays(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Arrays:
    """Pictures uint8 and classes, under the cache's names.

    Raises:
        ValueError: pictures and classes differ in number, or a class is negative.
    """
    found = {}
    for split, (images, targets) in (("train", train), ("test", test)):
        targets = np.asarray(targets, np.int64).reshape(-1)
        if images.dtype != np.uint8 or len(images) != len(targets) or targets.min(initial=0) < 0:
            raise ValueError(f"{split} has {images.shape} {images.dtype}, {targets.shape} classes")
        found[f"{split}.inputs"], found[f"{split}.targets"] = np.ascontiguousarray(images), targets
    return found


def cifar100(files: Iterable[bytes]) -> Arrays:
    """The binary archive: for each image its coarse and fine label, then three planes of colour.

    Raises:
        ValueError: a file is missing, or of another size.
    """
    (archive,) = files
    parts = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for split, count in CIFAR100.items():
            member = tar.extractfile(f"cifar-100-binary/{split}.bin")
            if member is None:
                raise ValueError(f"{split}.bin is no file")
            rows = np.frombuffer(member.read(), np.uint8)
            if rows.size != count * (2 + 3 * SIDE * SIDE):
                raise ValueError(f"{split}.bin does not hold {count} images")
            rows = rows.reshape(count, -1)
            parts[split] = rows[:, 2:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), rows[:, 1]
    return arrays(parts["train"], parts["test"])


def matlab(file: bytes) -> Mapping[str, Any]:
    """The variables of a file of MATLAB.

    Raises:
        ImportError: scipy is not installed.
    """
    from scipy.io import loadmat

    return loadmat(io.BytesIO(file))


def svhn(files: Iterable[bytes]) -> Arrays:
    """Street numbers, cropped: X (32, 32, 3, images) and y, in which 10 is the digit 0."""
    parts = []
    for file in files:
        found = matlab(file)
        parts.append((np.moveaxis(found["X"], 3, 0), found["y"].reshape(-1) % 10))
    train, test = parts
    return arrays(train, test)


def flowers(files: Iterable[bytes]) -> Arrays:
    """Oxford's flowers, 32×32 pixels: the square in a picture's middle, averaged down.

    The training pictures are the published training and validation sets.
    """
    archive, labels, splits = files
    targets = matlab(labels)["labels"].reshape(-1).astype(np.int64) - 1
    told = matlab(splits)
    pictures = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".jpg") else None
            if content is not None:
                number = int(PurePosixPath(member.name).stem.removeprefix("image_"))
                pictures[number] = _square(content.read())
    if len(pictures) != len(targets):
        raise ValueError(f"{len(pictures)} pictures, {len(targets)} classes")

    def split(*names: str) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.concatenate([told[name].reshape(-1) for name in names])
        return np.stack([pictures[n] for n in numbers.tolist()]), targets[numbers - 1]

    return arrays(split("trnid", "valid"), split("tstid"))


def _square(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        cut = image.convert("RGB").crop((left, top, left + side, top + side))
        return np.array(cut.resize((SIDE, SIDE), Image.Resampling.BOX))


def tiny_imagenet(files: Iterable[bytes]) -> Arrays:
    """Stanford's TinyImageNet: 64×64 pixels, classes in the order of their names.

    The published validation set is for testing: its test set has no labels.
    """
    (archive,) = files
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        inside = sorted(name for name in zipped.namelist() if name.endswith(".JPEG"))
        root = "tiny-imagenet-200"
        told = zipped.read(f"{root}/val/val_annotations.txt").decode()
        held = dict(line.split("\t")[:2] for line in told.splitlines())
        train = [name for name in inside if name.startswith(f"{root}/train/")]
        test = [f"{root}/val/images/{name}" for name in sorted(held)]
        classes = sorted({name.split("/")[2] for name in train})
        numbers = {name: k for k, name in enumerate(classes)}

        def read(names: list[str]) -> np.ndarray:
            found = np.empty((len(names), TINY, TINY, 3), np.uint8)
            for k, name in enumerate(names):
                with Image.open(io.BytesIO(zipped.read(name))) as image:
                    if image.size != (TINY, TINY):
                        raise ValueError(f"{name} has {image.size} pixels")
                    found[k] = np.array(image.convert("RGB"))
            return found

        return arrays(
            (read(train), np.array([numbers[name.split("/")[2]] for name in train])),
            (read(test), np.array([numbers[held[name]] for name in sorted(held)])),
        )


def medmnist(files: Iterable[bytes]) -> Arrays:
    """A file of MedMNIST; its validation images are left out."""
    (file,) = files
    with np.load(io.BytesIO(file), allow_pickle=False) as found:
        train, test = (
            (found[f"{split}_images"], found[f"{split}_labels"]) for split in ("train", "test")
        )
        return arrays(train, test)
