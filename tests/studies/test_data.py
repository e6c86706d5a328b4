"""The data sets: strict decoding, safe archives, an atomic cache, sources in order."""

import errno
import gzip
import io
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posterity_studies import data
from posterity_studies.data import DataError, Listing, Source, cache, idx, sources

SHAPES = {
    "train.inputs": (6, 3, 2),
    "train.targets": (6,),
    "test.inputs": (4, 3, 2),
    "test.targets": (4,),
}


def to_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def images(shape: tuple[int, ...] = (6, 3, 2)) -> np.ndarray:
    return (np.arange(math.prod(shape)) * 7 % 256).astype(np.uint8).reshape(shape)


FILES = tuple(to_idx(images(shape)) for shape in SHAPES.values())
ARRAYS = idx.decode(FILES, SHAPES)
DIGEST = cache.digest(ARRAYS)


class Served:
    """A source that counts its calls and serves, or raises, what it is told to."""

    __name__ = "served"

    def __init__(self, content=FILES, before=lambda: None):
        self.content, self.before, self.calls = content, before, 0

    def __call__(self, address, files):
        self.calls += 1
        self.before()
        if isinstance(self.content, BaseException):
            raise self.content
        return self.content


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def register(folder, monkeypatch):
    def register(*kinds: Served) -> None:
        served = tuple(
            Source(kind, f"address{i}", (), partial(idx.decode, shapes=SHAPES))
            for i, kind in enumerate(kinds)
        )
        facts = {"name": "tiny", "licence": "none", "digest": DIGEST, "sources": served}
        tiny = Listing(**facts, class_names=tuple("abcdef"), mean=(0.5,), std=(0.25,))
        monkeypatch.setattr(data, "LISTINGS", {"tiny": tiny})

    return register


# --- idx ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(6, 3, 2), (5,), (0, 4)])
def test_idx_round_trip(shape, wrap):
    parsed = idx.parse(wrap(to_idx(images(shape))), shape)
    np.testing.assert_array_equal(parsed, images(shape))
    assert parsed.dtype == np.uint8
    assert parsed.flags.writeable


@given(st.data())
def test_every_truncation_of_an_idx_file_is_refused(draw):
    file = draw.draw(st.sampled_from([FILES[0], gzip.compress(FILES[0])]))
    cut = draw.draw(st.integers(0, len(file) - 1))
    with pytest.raises(ValueError, match=r"idx|gzip"):
        idx.parse(file[:cut], SHAPES["train.inputs"])


@given(st.integers(0, 15), st.integers(1, 255))
def test_every_change_of_an_idx_header_is_refused(position, change):
    file = bytearray(FILES[0])
    file[position] ^= change
    with pytest.raises(ValueError, match=r"header|gzip"):
        idx.parse(bytes(file), SHAPES["train.inputs"])


@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_trailing_bytes_are_refused(wrap):
    with pytest.raises(ValueError, match="has 52 bytes, got more"):
        idx.parse(wrap(FILES[0] + b"\0"), SHAPES["train.inputs"])


def test_a_gzip_checksum_error_is_refused():
    damaged = bytearray(gzip.compress(FILES[0]))
    damaged[-8] ^= 1
    with pytest.raises(ValueError, match="damaged gzip"):
        idx.parse(bytes(damaged), SHAPES["train.inputs"])


def test_a_gzip_bomb_is_never_inflated(monkeypatch):
    inflated = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda self, size=-1: inflated.append(size) or read(self, size)
    )
    bomb = gzip.compress(FILES[0] + bytes(1 << 24))
    with pytest.raises(ValueError, match="got more"):
        idx.parse(bomb, SHAPES["train.inputs"])
    assert inflated == [len(FILES[0]) + 1]


def test_decode_wants_exactly_the_files():
    assert ARRAYS["train.targets"].dtype == np.int64
    assert ARRAYS["train.inputs"].dtype == np.uint8
    for files in (FILES[:3], (*FILES, FILES[0])):
        with pytest.raises(ValueError, match="zip"):
            idx.decode(files, SHAPES)


# --- archives -------------------------------------------------------------------------------


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def archive(path: Path, *members) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


ATTACKS = {
    "parent": member("../evil", b"x"),
    "hidden parent": member("package/../../evil", b"x"),
    "absolute": member("/tmp/evil", b"x"),
    "symlink": member("package/a", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": member("package/a", kind=tarfile.LNKTYPE, link="package/b"),
    "device": member("package/a", kind=tarfile.CHRTYPE),
    "pipe": member("package/a", kind=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_unsafe_archive_is_refused_and_nothing_written(attack, tmp_path):
    path = archive(tmp_path / "a.tgz", member("package/b", b"good"), attack)
    with pytest.raises(ValueError, match=f"unsafe archive: '{attack[0].name}'"):
        sources.read_tar(path, ["package/b"])
    assert list(tmp_path.iterdir()) == [path]


def test_archive_files_come_in_the_order_asked_for(tmp_path):
    path = archive(tmp_path / "a.tgz", member("./p/a", b"first"), member("./p/b", b"second"))
    assert sources.read_tar(path, ["p/b", "p/a"]) == [b"second", b"first"]
    with pytest.raises(ValueError, match="lacks p/c"):
        sources.read_tar(path, ["p/a", "p/c"])


def test_an_oversized_member_is_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tgz", member("big", b"12345"))
    monkeypatch.setattr(sources, "LIMIT", 4)
    with pytest.raises(ValueError, match="'big' is over 4 bytes"):
        sources.read_tar(path, ["big"])


# --- registry clients, played by scripts ----------------------------------------------------


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Put scripts, and nothing but the shell's own tools, on the path."""
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def program(name: str, script: str) -> None:
        (bin / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$LOG"\n{script}\n')
        (bin / name).chmod(0o755)

    return program


def test_npm_reads_the_packed_archive(programs, tmp_path):
    path = archive(tmp_path / "a.tgz", member("package/data/x", b"content"))
    programs("npm", f"cp {path} made-1.0.tgz")
    assert sources.npm("made@1.0", ["package/data/x"]) == [b"content"]
    said = (tmp_path / "log").read_text()
    assert said.startswith("npm pack made@1.0 --ignore-scripts")


def test_npm_refuses_an_archive_that_climbs_out(programs, tmp_path):
    path = archive(tmp_path / "a.tgz", member("package/x", b"good"), ATTACKS["parent"])
    programs("npm", f"cp {path} made-1.0.tgz")
    with pytest.raises(ValueError, match="unsafe archive"):
        sources.npm("made@1.0", ["package/x"])


def test_a_wheel_is_read_in_the_order_that_was_asked(programs, tmp_path, monkeypatch):
    path = tmp_path / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("made/b/2", "made/b/1", "made/a", "../evil"):
            wheel.writestr(name, name)
    monkeypatch.setattr(sys, "executable", "python-of-this-test")
    programs("python-of-this-test", f"cp {path} .")
    assert sources.pypi("made==1.0", ["made/b/*", "made/a"]) == [
        b"made/b/1",
        b"made/b/2",
        b"made/a",
    ]
    said = (tmp_path / "log").read_text()
    assert said.startswith("python-of-this-test -m pip download -q --no-deps")
    assert said.endswith("--only-binary :all: made==1.0\n")
    with pytest.raises(ValueError, match="lacks made/c"):
        sources.pypi("made==1.0", ["made/c"])
    monkeypatch.setattr(sources, "LIMIT", 3)
    with pytest.raises(ValueError, match="'made/a' is over 3 bytes"):
        sources.pypi("made==1.0", ["made/a"])


def test_a_failing_client_is_quoted(programs):
    programs("npm", 'echo noise >&2; echo "npm error code E404" >&2; echo bye >&2; exit 3')
    with pytest.raises(ChildProcessError, match=r"^npm ended with 3: npm error code E404$"):
        sources.npm("made@1.0", ["x"])


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for source, missing in ((sources.npm, "npm"), (sources.debian, "apt-get")):
        with pytest.raises(FileNotFoundError, match=f"^{missing} is not installed"):
            source("made", ["x"])


@pytest.mark.parametrize("lists", ["good", "stale"])
def test_debian_updates_private_lists_only_when_it_must(lists, programs, tmp_path):
    path = archive(tmp_path / "a.tgz", member("./usr/share/x", b"content"))
    private = 'grep -q "Dir::State::Lists" apt.conf && test -d lists/partial'
    gate = "" if lists == "good" else f'case "$*" in *apt.conf*) {private} ;; *) exit 100 ;; esac'
    programs("apt-get", f'{gate or ":"} || exit 1\ntest "$1" = update || touch made.deb')
    programs("dpkg-deb", f"cat {path}")
    assert sources.debian("made", ["usr/share/x"]) == [b"content"]
    commands = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[:2] for line in commands].count(["apt-get", "download"]) == (
        1 if lists == "good" else 2
    )
    assert any("update" in line for line in commands) == (lists == "stale")


def test_debian_tells_both_failures(programs):
    said = 'case "$*" in *apt.conf*) echo "E: lost" ;; *) echo "E: net" ;; esac'
    programs("apt-get", f"{said} >&2; exit 7")
    with pytest.raises(
        ChildProcessError, match=r"with 7: E: net; with fresh lists: .* with 7: E: lost"
    ):
        sources.debian("made", ["x"])


# --- downloads ------------------------------------------------------------------------------


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path.endswith(("one", "two"))
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(f"content of {self.path}".encode())

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url_downloads_in_order(server, monkeypatch):
    assert list(sources.url(server, ["two", "one"])) == [b"content of /two", b"content of /one"]
    with pytest.raises(OSError, match="404"):
        list(sources.url(server, ["three"]))
    monkeypatch.setattr(sources, "LIMIT", 5)
    with pytest.raises(ValueError, match="larger than 5"):
        list(sources.url(server, ["one"]))


def test_a_silent_address_is_given_up_at_its_first_file(monkeypatch):
    monkeypatch.setattr(sources, "CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        with pytest.raises(OSError, match=r"timed out|no answer"):
            list(sources.url(f"http://127.0.0.1:{silent.getsockname()[1]}", ["a", "b", "c", "d"]))
        assert time.perf_counter() - start < 0.6


def test_a_download_that_stalls_halfway_is_given_up(monkeypatch):
    monkeypatch.setattr(sources, "CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_half():
            connection, _ = listening.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            stalled.wait(2)
            connection.close()

        stalled = threading.Event()
        threading.Thread(target=answer_half, daemon=True).start()
        with pytest.raises(TimeoutError, match="timed out"):
            list(sources.url(f"http://127.0.0.1:{listening.getsockname()[1]}", ["a"]))
        stalled.set()


def test_a_hanging_name_look_up_is_given_up(monkeypatch):
    monkeypatch.setattr(sources, "CONNECT", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
    with pytest.raises(TimeoutError, match=r"no answer from http://nowhere/a within 0\.1 s"):
        list(sources.url("http://nowhere", ["a"]))


# --- load: order and fallback ---------------------------------------------------------------


def test_the_first_good_source_serves_and_the_cache_after_it(register, folder, capsys):
    first, second = Served(), Served()
    register(first, second)
    for _ in range(2):
        tiny = data.load("tiny")
        assert (tiny.name, tiny.source, tiny.digest) == ("tiny", "served address0", DIGEST)
        np.testing.assert_array_equal(tiny.train.inputs, ARRAYS["train.inputs"])
        np.testing.assert_array_equal(tiny.test.targets, ARRAYS["test.targets"])
        assert tiny.train.targets.dtype == torch.int64
        assert (len(tiny.train), len(tiny.test)) == (6, 4)
    assert (first.calls, second.calls) == (1, 0)
    assert [file.name for file in folder.iterdir()] == ["tiny.safetensors"]
    assert capsys.readouterr().err == "posterity: fetching tiny from served address0\n"


@pytest.mark.parametrize(
    "bad",
    [
        OSError("the net is down"),
        (*FILES[:3], to_idx(255 - images((4,)))),  # well-formed, but other targets
        FILES[:3],
        (*FILES[:3], b""),
    ],
    ids=["raises", "digest", "missing file", "empty file"],
)
def test_a_bad_source_falls_through_to_the_next(bad, register, folder):
    first, second = Served(bad), Served()
    register(first, second)
    tiny = data.load("tiny")
    assert tiny.source == "served address1"
    assert (first.calls, second.calls) == (1, 1)
    assert data.load("tiny").source == "served address1"


def test_when_all_sources_fail_each_says_why_in_a_line(register, folder):
    wrong = (*FILES[:3], to_idx(255 - images((4,))))
    register(Served(OSError("the net\nis down")), Served(wrong))
    with pytest.raises(DataError) as raised:
        data.load("tiny")
    lines = str(raised.value).splitlines()
    assert lines[0] == "tiny: no source could serve it"
    assert lines[1] == "  served address0: OSError: the net is down"
    assert lines[2].startswith("  served address1: ValueError: served sha256:")
    assert lines[2].endswith(f"expected {DIGEST}")
    assert "npm" in lines[3]
    assert f"POSTERITY_DATA to a folder that holds tiny.safetensors (now {folder})" in lines[3]
    assert len(lines) == 4
    assert list(folder.iterdir()) == []


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cifar-1'; there are fashion-mnist, mnist"):
        data.load("cifar-1")


# --- cache ----------------------------------------------------------------------------------


def test_the_digest_sees_order_types_shapes_and_values():
    def changed(key, array):
        return cache.digest({**ARRAYS, key: array})

    inputs = ARRAYS["train.inputs"]
    other = inputs.copy()
    other[0, 0, 0] ^= 1
    swapped = {**ARRAYS, "train.targets": ARRAYS["test.targets"]}
    swapped["test.targets"] = ARRAYS["train.targets"]
    digests = [
        DIGEST,
        changed("train.inputs", other),
        changed("train.inputs", inputs.reshape(6, 2, 3)),
        changed("train.inputs", inputs.view(np.int8)),
        cache.digest(swapped),
    ]
    assert len(set(digests)) == len(digests)
    assert changed("train.inputs", np.asfortranarray(inputs)) == DIGEST


def test_the_folder_is_the_variable_or_the_home_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POSTERITY_DATA", "~/elsewhere")
    assert cache.path("x") == tmp_path / "elsewhere/x.safetensors"
    monkeypatch.setenv("POSTERITY_DATA", "")
    assert cache.path("x") == tmp_path / ".cache/posterity/x.safetensors"
    monkeypatch.delenv("POSTERITY_DATA")
    assert cache.path("x") == tmp_path / ".cache/posterity/x.safetensors"


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped", "foreign"])
def test_a_damaged_file_is_an_error_with_both_digests(damage, register, folder):
    good = Served()
    register(good)
    data.load("tiny")
    file = folder / "tiny.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[:-1],
            "empty": b"",
            "garbage": b"\xff" * 100,
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "foreign": cache.save({"weight": np.zeros(3)}),
        }[damage]
    )
    with pytest.raises(DataError) as raised:
        data.load("tiny")
    first, expected, found, remedy = str(raised.value).splitlines()
    assert str(file) in first
    assert expected == f"  expected {DIGEST}"
    assert found.startswith("  found ")
    assert found.count("sha256:") == 1
    assert DIGEST not in found
    assert "Delete the file" in remedy
    file.unlink()
    assert data.load("tiny").source == "served address0"
    assert good.calls == 2


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(register, folder, monkeypatch):
    register(Served())
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    with pytest.raises(DataError, match=r"(?s)No space left.*set POSTERITY_DATA") as raised:
        data.load("tiny")
    assert str(folder) in str(raised.value)
    assert list(folder.iterdir()) == []


def test_a_write_cut_short_by_the_system_leaves_nothing(register, folder):
    register(Served())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot use the cache folder"):
            data.load("tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(folder.iterdir()) == []


def test_what_the_disk_garbles_is_never_cached(folder, monkeypatch):
    cache.prepare("tiny")
    monkeypatch.setattr(cache, "save", lambda arrays, about: b"\xff" * 64)
    with pytest.raises(DataError, match="cannot use the cache folder"):
        cache.write("tiny", ARRAYS, "here")
    assert list(folder.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(register, folder):
    register(Served(KeyboardInterrupt()), Served())
    with pytest.raises(KeyboardInterrupt):
        data.load("tiny")
    assert list(folder.iterdir()) == []


def test_a_killed_writer_leaves_no_final_name_and_is_swept_later(register, folder):
    cache.prepare("tiny")
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        cache.write("tiny", ARRAYS, "here")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.name.startswith(".tiny.safetensors.")
    register(Served())
    data.load("tiny")
    assert left.exists()  # young: it might be another process's
    os.utime(left, (0, 0))
    (folder / "tiny.safetensors").unlink()
    data.load("tiny")
    assert [file.name for file in folder.iterdir()] == ["tiny.safetensors"]


def test_an_unusable_folder_is_found_before_the_download(register, folder):
    source = Served()
    register(source)
    folder.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"(?s)cannot use the cache folder .*set POSTERITY_DATA"):
        data.load("tiny")
    assert source.calls == 0


def test_a_read_only_folder_is_one_clear_error(register, folder, monkeypatch):
    folder.mkdir()
    source = Served()
    register(source)
    if os.geteuid():
        folder.chmod(0o500)
    else:  # permissions do not bind root: let the kernel's own read-only tree refuse
        folder = Path("/proc/self")
        monkeypatch.setenv("POSTERITY_DATA", str(folder))
    with pytest.raises(DataError, match="set POSTERITY_DATA") as raised:
        data.load("tiny")
    assert str(folder) in str(raised.value)
    assert source.calls == 0


def test_a_read_only_folder_that_has_the_file_serves(register, folder):
    register(Served())
    data.load("tiny")
    folder.chmod(0o500)
    try:
        assert data.load("tiny").source == "served address0"
    finally:
        folder.chmod(0o700)


def test_concurrent_loads_all_see_whole_data(register, folder):
    meet = threading.Barrier(4)
    register(Served(before=meet.wait))
    loaded, failures = [], []

    def work():
        try:
            loaded.append(data.load("tiny"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(loaded) == 4
    assert [file.name for file in folder.iterdir()] == ["tiny.safetensors"]


def test_a_loaded_tensor_is_not_tied_to_the_file(register, folder):
    register(Served())
    data.load("tiny")
    tiny = data.load("tiny")
    tiny.train.inputs.zero_()
    assert data.load("tiny").train.inputs.any()


# --- normalise ------------------------------------------------------------------------------


def test_normalise_takes_this_sets_moments(register):
    register(Served())
    tiny = data.load("tiny")  # mean 0.5, std 0.25
    pixels = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-2.0, 2.0], [-1.2, -0.4]]]])
    torch.testing.assert_close(tiny.normalise(pixels), expected)
    assert pixels[0, 0, 1] == 255
    with pytest.raises(ValueError, match="uint8"):
        tiny.normalise(pixels.float())


def test_normalise_puts_colour_channels_first():
    colour = data.DataSet(
        name="colour",
        class_names=(),
        mean=(0.0, 0.2, 1.0),
        std=(1.0, 2.0, 4.0),
        licence="none",
        digest=DIGEST,
        sources=(),
        source="here",
        train=data.Split(torch.empty(0), torch.empty(0)),
        test=data.Split(torch.empty(0), torch.empty(0)),
    )
    pixels = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    pixels[1, 2, 3] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    normalised = colour.normalise(pixels)
    assert normalised.shape == (2, 3, 4, 5)
    assert normalised.is_contiguous()
    torch.testing.assert_close(normalised[1, :, 2, 3], torch.tensor([1.0, 0.0, -0.25]))
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor([0.0, -0.1, -0.25]))


# --- the real data --------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("fashion-mnist", [6000] * 10),
        ("mnist", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    ],
)
def test_the_real_data(name, counts, folder, monkeypatch):
    loaded = data.load(name)
    assert loaded.train.inputs.shape == (60_000, 28, 28)
    assert loaded.test.inputs.shape == (10_000, 28, 28)
    assert loaded.train.inputs.dtype == loaded.test.inputs.dtype == torch.uint8
    assert loaded.train.targets.dtype == loaded.test.targets.dtype == torch.int64
    assert torch.bincount(loaded.train.targets).tolist() == counts
    assert len(loaded.test.targets.unique()) == len(loaded.class_names) == 10
    arrays = {
        f"{split}.{part}": getattr(getattr(loaded, split), part).numpy()
        for split in ("train", "test")
        for part in ("inputs", "targets")
    }
    assert cache.digest(arrays) == loaded.digest
    normalised = loaded.normalise(loaded.train.inputs)
    assert normalised.shape == (60_000, 1, 28, 28)
    assert abs(normalised.mean()) < 1e-3
    assert abs(normalised.std() - 1) < 1e-3

    monkeypatch.setattr(subprocess, "run", None)  # from here on only the cache can serve
    monkeypatch.setattr(sources, "_opened", None)
    again = data.load(name)
    assert torch.equal(again.train.inputs, loaded.train.inputs)
    assert again.source == loaded.source
