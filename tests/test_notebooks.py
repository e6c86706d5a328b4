"""The notebooks run from the first cell to the last, and hold what they printed."""

import json
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])


def kinds(book):
    """Of each cell's outputs in order, but for what libraries warn of; printed lines are one."""
    every = [[o for o in c.get("outputs", ()) if o.get("name") != "stderr"] for c in book["cells"]]
    return [[kind for kind, _ in groupby(o["output_type"] for o in cell)] for cell in every]


@each
def test_a_notebook_is_kept_with_its_outputs_and_none_is_an_error(path):
    book = json.loads(path.read_text())
    counts = [c["execution_count"] for c in book["cells"] if c["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert any(kinds(book))
    assert not any("error" in cell for cell in kinds(book))
    assert path.stat().st_size < 200_000
    assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.network
@each
def test_a_notebook_runs(path, tmp_path):
    """Its assertions hold, and it prints and draws as often as it holds: the numbers may differ."""
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    before, where = kinds(book), {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=where).execute()
    assert kinds(book) == before
