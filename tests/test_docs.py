"""The code of every page runs, from top to bottom, in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "```python" in p.read_text())
NEEDS = {"transformers": "transformers", "accelerate": "accelerate", "peft": "peft"}
NEEDS |= {"lightning": "lightning", "diagnostics": "tensorboard"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_page(page, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **alone},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_test_that_is_named_exists():
    pages = "".join(p.read_text() for p in DOCS.rglob("*.md"))
    tests = "".join(p.read_text() for p in (DOCS.parent / "tests").rglob("*.py"))
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", pages))
    assert len(named) > 20
    assert not {name for name in named if f"def {name}(" not in tests}


@pytest.mark.slow
def test_the_site_has_no_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=DOCS.parent, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    pages = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*.html")}
    assert {"index.html", "reference.html", "results/index.html"} <= pages.keys()
    for name, page in pages.items():
        fetched = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\"\s>]*)", page
        )
        assert not fetched, name
        assert not re.search(r":(?:class|meth|func):", page), f"{name}: a role as it stands"
    for name in ("IVON", "Posterior", "predict", "merge", "sensitivity", "metrics.ece"):
        assert f'id="posterity.{name}"' in pages["reference.html"], name
