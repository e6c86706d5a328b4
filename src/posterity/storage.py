"""Tensors and facts in one safetensors file: whole or not at all, and no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from .binding import some

VERSION = 1  # of the files

Tensors = dict[str, Tensor]


def save(
    path: str | Path,
    form: str,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    values: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a safetensors file beside its place, then move it there; the same bits, same bytes.

    With ``values``, ``tensors`` only tell dtypes and shapes (they may be on the meta device), and
    the values come one by one, in any order: a file may be larger than the memory.
    """
    from . import __version__  # not there yet when this module is imported

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    told = {"format": form, "version": str(VERSION)}
    made = {"posterity": __version__, **facts}
    told |= {name: json.dumps(value) for name, value in made.items()}
    header, places = _header(tensors, told)
    try:
        with temporary.open("xb") as file:
            file.write(header)
            for name, value in tensors.items() if values is None else values:
                if (value.dtype, value.shape) != (tensors[name].dtype, tensors[name].shape):
                    raise ValueError(f"{name} has another dtype or shape than the file's header")
                file.seek(len(header) + places.pop(name))
                file.write(_bytes(value))
            if places:
                raise ValueError(f"no values for {some(places)}")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Tensor], told: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors', and where each tensor's begin after them.

    https://huggingface.co/docs/safetensors/index#format; safetensors' own writer needs all tensors
    in memory, and orders the facts at random.
    """
    listed: dict[str, Any] = {"__metadata__": told}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):  # wide first: aligned
        places[name], size = end, tensors[name].nbytes
        span = [end, end := end + size]
        shape = list(tensors[name].shape)
        listed[name] = {"dtype": _code(tensors[name].dtype), "shape": shape, "data_offsets": span}
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


@cache
def _code(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return json.loads(serialised({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"]


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def loaded(path: str | Path, form: str) -> Iterator[tuple[Tensors, dict[str, Any]]]:
    """The tensors and facts of a file; any fault, in the body's use of them too, names the file."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file in it")
    try:
        with safe_open(str(path), "pt") as file:
            told = dict(file.metadata() or {})
            found, version = told.pop("format", "unknown"), int(told.pop("version", 0))
            told.pop("posterity", None)  # what wrote it, for whoever looks
            if found != form:
                raise ValueError(f"its format is {found}, not {form}")
            if version > VERSION:
                raise ValueError(f"its version is {version}, this posterity reads up to {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield tensors, {name: json.loads(value) for name, value in told.items()}
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot load {path}: {error}; it must be whole, and written by posterity"
        ) from error


def stored(path: str | Path, name: str) -> Tensor:
    """One tensor of a file; nothing else of the file stays in memory."""
    with safe_open(str(path), "pt") as file:
        return file.get_tensor(name)
