"""Tensors and facts in one safetensors file: whole or not at all, and no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1  # of the files

Tensors = dict[str, Tensor]


def save(path: str | Path, form: str, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    """Write a safetensors file beside its place, then move it there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    told = {"format": form, "version": str(VERSION)}
    told |= {name: json.dumps(value) for name, value in facts.items()}
    try:
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # save_file's own is 0600, whatever the umask
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, told)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def loaded(path: str | Path, form: str) -> Iterator[tuple[Tensors, dict[str, Any]]]:
    """The tensors and facts of a file; any fault, in the body's use of them too, names the file."""
    try:
        with safe_open(str(path), "pt") as file:
            told = dict(file.metadata() or {})
            found, version = told.pop("format", "unknown"), int(told.pop("version", 0))
            if found != form:
                raise ValueError(f"its format is {found}, not {form}")
            if version > VERSION:
                raise ValueError(f"its version is {version}, this posterity reads up to {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield tensors, {name: json.loads(value) for name, value in told.items()}
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"cannot load {path}: {error}") from error
