"""The idx format of MNIST and its kin, parsed strictly."""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

SHAPES: Mapping[str, tuple[int, ...]] = {
    "train.inputs": (60_000, 28, 28),
    "train.targets": (60_000,),
    "test.inputs": (10_000, 28, 28),
    "test.targets": (10_000,),
}


def parse(file: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Parse one idx file, plain or gzipped, that must hold uint8 values of exactly `shape`.

    Raises ValueError on anything else, decompressing at most one byte more than expected.
    """
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = len(header) + math.prod(shape)
    if file[:2] == b"\x1f\x8b":
        try:
            file = gzip.GzipFile(fileobj=io.BytesIO(file)).read(size + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"damaged gzip file: {error}") from error
    start = file[: len(header)]
    if start != header:
        raise ValueError(f"idx header of {shape} is {header.hex()}, got {start.hex() or 'nothing'}")
    if len(file) != size:
        got = f"{len(file)}" if len(file) < size else "more"
        raise ValueError(f"idx file of {shape} has {size} bytes, got {got}")
    return np.frombuffer(bytearray(file), np.uint8, offset=len(header)).reshape(shape)


def decode(
    files: Iterable[bytes], shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> dict[str, np.ndarray]:
    """Decode idx files, in the order of `shapes`; targets become int64.

    Raises ValueError on a malformed, missing or surplus file.
    """
    arrays = {key: parse(file, shapes[key]) for key, file in zip(shapes, files, strict=True)}
    return {
        key: array.astype(np.int64) if key.endswith(".targets") else array
        for key, array in arrays.items()
    }
