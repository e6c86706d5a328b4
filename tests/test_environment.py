"""`python -m posterity` says what runs here; version and citation agree."""

import subprocess
import sys
from pathlib import Path

import torch

import posterity
from posterity import ops
from posterity.__main__ import report

ROOT = Path(__file__).parents[1]


def test_the_report_names_versions_and_implementations():
    done = subprocess.run([sys.executable, "-m", "posterity"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    told = {key.strip(): value.strip() for key, value in found.items()}
    assert told["posterity"] == posterity.__version__
    assert told["torch"] == torch.__version__
    assert "CPU" in told["on a CPU"] or told["on a CPU"].startswith("reference")


def test_it_says_why_no_fused_pass_runs(monkeypatch):
    monkeypatch.setattr(ops.cpu, "missing", lambda: "the extension was not built")
    ops._fused.cache_clear()
    try:
        assert report()["on a CPU"] == "reference (the extension was not built)"
    finally:
        ops._fused.cache_clear()


def test_a_package_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setattr("posterity.__main__.PEERS", ("no-such-package",))
    assert report()["no-such-package"] == "not installed"


def test_the_version_is_one():
    stated = f"version: {posterity.__version__}\n"
    assert stated in (ROOT / "CITATION.cff").read_text()
    assert f"## {posterity.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{posterity.__version__}"' in (ROOT / "pyproject.toml").read_text()
