"""Small data in the real format, and the command line on them."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest

from posterity_studies import cli, data
from posterity_studies.data import cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache with small sets under the real names, and the environment that uses it."""
    home = tmp_path_factory.mktemp("data")
    generator = numpy.random.default_rng(0)
    patterns = generator.integers(0, 256, (10, 28, 28))
    listings = {}
    patch = pytest.MonkeyPatch()
    patch.setenv("POSTERITY_DATA", str(home))
    for name in ("fashion-mnist", "mnist"):
        arrays = {}
        for split, n in (("train", 600), ("test", 100)):
            targets = generator.integers(0, 10, n)
            noisy = 0.5 * patterns[targets] + 0.5 * generator.integers(0, 256, (n, 28, 28))
            arrays[f"{split}.inputs"] = noisy.astype(numpy.uint8)
            arrays[f"{split}.targets"] = targets
        cache.write(name, arrays, "made for a test")
        listings[name] = replace(data.LISTINGS[name], digest=cache.digest(arrays))
    (home / "sitecustomize.py").write_text(
        "import json, pathlib, sys\n"
        "from dataclasses import replace\n"
        "from posterity_studies import data\n"
        f"for name, digest in { ({k: v.digest for k, v in listings.items()})!r}.items():\n"
        "    data.LISTINGS[name] = replace(data.LISTINGS[name], digest=digest)\n"
    )
    patch.setattr(data, "LISTINGS", listings)
    yield home
    patch.undo()


@pytest.fixture
def environment(folder):
    paths = [str(folder), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "COLUMNS": "150"}


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """The command line in this process: exit code, what it printed, what it said of errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["posterity", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run
