"""The cache: one verified safetensors file per data set, under `$POSTERITY_DATA`."""

import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

Arrays = Mapping[str, np.ndarray]
KEYS = ("train.inputs", "train.targets", "test.inputs", "test.targets")
STALE = 3600.0  # seconds after which a temporary file was left by a killed process


class DataError(RuntimeError):
    """A data set cannot be had; the message says why and what to do."""


def path(name: str) -> Path:
    """The cache file of a data set, in `$POSTERITY_DATA` or `~/.cache/posterity`."""
    folder = os.environ.get("POSTERITY_DATA") or "~/.cache/posterity"
    return Path(folder).expanduser() / f"{name}.safetensors"


def digest(arrays: Arrays) -> str:
    """SHA-256 over dtype, shape and bytes of the four arrays, in the order of `KEYS`."""
    sha = hashlib.sha256()
    for key in KEYS:
        array = np.ascontiguousarray(arrays[key])
        sha.update(f"{array.dtype} {array.shape}\n".encode())
        sha.update(array.data)
    return f"sha256:{sha.hexdigest()}"


def read(name: str, expected: str | None) -> tuple[Arrays, str] | None:
    """Read the cached arrays and the source that served them; None where there is no file.

    Raises DataError on a file that cannot be read, is damaged, or whose digest is not `expected`
    (None: the one that the file itself tells).
    """
    file = path(name)
    try:
        arrays, told = _open(file)
        found = digest(arrays)
        expected = expected or told.get("digest", "a digest in the file")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(file.parent, error) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        whole = hashlib.sha256(file.read_bytes()).hexdigest()
        found = f"no arrays: {error} (the file itself has sha256:{whole})"
    if found != expected:
        raise DataError(
            f"{file} is damaged or foreign\n  expected {expected}\n  found    {found}\n"
            "Delete the file and run again to fetch it anew."
        )
    return arrays, told.get("source", "unknown")


def prepare(name: str) -> None:
    """Make the cache folder, and be sure that one can write to it; sweep what killed runs left.

    Raises DataError where the folder cannot be made or written to.
    """
    file = path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
        for left in file.parent.glob(f".{file.name}.*"):
            with suppress(FileNotFoundError):  # another process sweeps, too
                if left.stat().st_mtime < time.time() - STALE:
                    left.unlink()
    except OSError as error:
        raise _unusable(file.parent, error) from error


def write(name: str, arrays: Arrays, source: str) -> None:
    """Write the cache file whole or not at all, even beside other processes doing the same.

    Raises DataError where that fails, as on a full disk.
    """
    file = path(name)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:  # not mkstemp: the umask decides who may read
            stream.write(save(dict(arrays), {"source": source, "digest": digest(arrays)}))
            stream.flush()
            os.fsync(stream.fileno())
        if digest(_open(temporary)[0]) != digest(arrays):
            raise OSError("the file read back differs from what was written")
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise _unusable(file.parent, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _open(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    file.open("rb").close()  # safe_open would call a file without read permission missing
    with safe_open(file, framework="np") as stored:
        arrays = {key: stored.get_tensor(key) for key in KEYS}
        return arrays, stored.metadata() or {}


def _unusable(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"cannot use the cache folder {folder}: {error}\n"
        "Make room or give access there, or set POSTERITY_DATA to a folder that can be written to."
    )
