"""A run folder: configuration, checkpoints, metrics, result. Written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import posterity
from posterity.binding import Samples
from posterity_studies import baselines, data, ranks
from posterity_studies.models import NETWORKS
from posterity_studies.recipes import Recipe, UserError, recipe

TEMPORARY = ".tmp"  # ends the hidden names of files that are not whole yet


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder that is there, and goes again if the block leaves nothing in it."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well, and vanishes when not."""
    with made(path.parent):
        try:
            handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
        except OSError as error:
            error.filename = str(path)
            raise
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _serialised(path: Path) -> Iterator[Path]:
    """As :func:`replacing`, for writers that tell of a full disk in words of their own."""
    with replacing(path) as temporary:
        try:
            yield temporary
        except (RuntimeError, SafetensorError) as error:
            if not re.search("writ|space|I/O|inline_container", str(error)):
                raise
            raise OSError(
                f"{path} cannot be written: is the disk full? Free some space and run the same "
                f"command again ({error})"
            ) from error


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """A run folder that no other process works in; what a killed one left half written goes.

    Raises:
        UserError: another process is at work there.
    """
    if not ranks.first():
        yield
        return
    with made(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is at work in {folder}") from None
            except OSError:  # a file system without locks
                pass
            for left in folder.glob(f".*{TEMPORARY}"):
                left.unlink()
            yield
        finally:
            os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def as_json(content: Any) -> str:
    """JSON in one line; what is not finite, which JSON has no word for, is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content))


def read(path: Path, load: Callable[[Path], Any]) -> Any:
    """Read a file of a run folder.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: is {path.parent} the folder of a finished run?"
        ) from None
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): remove it, and run again "
            "what made it"
        ) from None


def read_json(path: Path) -> Any:
    """Read JSON of a run folder; UserError where it is missing or damaged."""
    return read(path, lambda p: json.loads(p.read_text()))


def kept(path: Path, asked: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make`` found, from the file if it was done before.

    Args:
        path: of the file.
        asked: all that the finding depends on, as plain values.
        make: finds plain values.

    Raises:
        UserError: the file is of something else that was asked, or damaged.
    """
    asked = json.loads(json.dumps(asked))
    if not path.exists():
        made_by = {"posterity": posterity.__version__}
        write_json(path, {**made_by, "asked": asked, "found": make()})
    content = read_json(path)
    if content.get("asked") != asked:
        raise UserError(f"{path} is of other settings: remove it, or choose another --out")
    return content["found"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with _serialised(path) as temporary:
        safetensors.torch.save_file(plain, temporary, {"posterity": posterity.__version__})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a run folder; UserError where it is missing or damaged."""
    return read(path, safetensors.torch.load_file)


def distinct(names: Sequence[str]) -> list[str]:
    """Names, numbered where two of them are the same."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{k}: {name}" for k, name in enumerate(names, 1)]


def recipe_of(result: dict[str, Any]) -> Recipe:
    """The recipe of a finished run."""
    given = (
        "ood",
        "epochs",
        "batch_size",
        "samples",
        "validation",
        "train_limit",
        "label_noise",
        "augment",
    )
    return replace(recipe(result["name"]), **{k: result[k] for k in given if k in result})


def load(run: Path) -> tuple[dict[str, Any], nn.Module, Samples | None]:
    """A finished run's result, its model at the mean, and its posterior if there is one.

    Raises:
        UserError: there is no finished run, or it is damaged.
    """
    if not run.is_dir():
        raise UserError(f"{run} is no folder of a run")
    result = read_json(run / "result.json")
    model = NETWORKS[result["network"]](len(data.LISTINGS[result["data"]].class_names))
    try:
        model.load_state_dict(read_tensors(run / "model.safetensors"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{run / 'model.safetensors'} fits no {result['network']}: {reason}"
        ) from None
    path = run / "posterior.safetensors"
    return result, model, baselines.load(path) if path.exists() else None


def load_sampled(run: Path, samples: int) -> tuple[dict[str, Any], nn.Module, Samples | None]:
    """As :func:`load`; no posterior for no samples.

    Raises:
        UserError: as :func:`load`, or a negative number of samples.
    """
    if samples < 0:
        raise UserError("--samples must be 0 (at the mean) or more")
    result, model, posterior = load(run)
    return result, model, posterior if samples else None


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a training checkpoint, atomically."""
    with _serialised(path) as temporary:
        torch.save({"posterity": posterity.__version__, **checkpoint}, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint without running code from it; UserError where it is damaged.

    Its tensors are on the CPU: it may have been written where there was a GPU.
    """
    return read(path, lambda p: torch.load(p, map_location="cpu", weights_only=True))


def environment(**changes: str) -> dict[str, str]:
    """The environment of a training process.

    glibc by default hands large blocks back to the kernel at once, and training then spends a third
    of its time on fresh pages: let it keep them. The user's own settings win.
    """
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return {**keep, **os.environ, **changes}


def provenance(seed: int | str, data_digest: str, code: str | None = None) -> dict[str, str]:
    """What made a result: code, versions, machine, data, seed, time.

    ``code`` is the commit of when it was begun, by :func:`git_hash`: it may be another now.
    """
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "seed": str(seed),
        "data": data_digest,
        "git": code or git_hash(),
        "posterity": posterity.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "device": ", ".join([*gpu, processor(), f"{torch.get_num_threads()} threads"]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_hash() -> str:
    """The commit of the code that runs, with ``+`` for local changes.

    Of a copy without git it is the variable ``POSTERITY_COMMIT``, or ``unknown``.
    """
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=here, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here.parent))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("POSTERITY_COMMIT", "unknown")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
