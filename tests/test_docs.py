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


def test_every_link_to_a_test_names_one():
    links = re.findall(
        r"\]\(\.\./(tests/\S+\.py) \"(\w+)\"\)", (DOCS / "frameworks.md").read_text()
    )
    assert len(links) > 20
    for file, name in links:
        assert f"\ndef {name}(" in (DOCS.parent / file).read_text(), (file, name)
