"""What the README and the public names promise."""

import inspect
import json
import re
import statistics
from pathlib import Path

import pytest

import posterity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_ten_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "posterior.safetensors").stat().st_size > 0
    assert capsys.readouterr().out.startswith("tensor([")


def test_two_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for command in ("demo", "test", "lint", "bench", "docs"):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci/run").read_text()


def public():
    """Every public name, and every public method that posterity itself defines."""
    names = [(name, getattr(posterity, name)) for name in posterity.__all__]
    names += [(f"metrics.{n}", getattr(posterity.metrics, n)) for n in posterity.metrics.__all__]
    for name, thing in list(names):
        if inspect.isclass(thing):
            members = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
            names += [(f"{name}.{k}", v) for k, v in members.items() if callable(v)]
    return dict(names)


@pytest.mark.parametrize("name", public())
def test_public_names_have_a_docstring_with_one_line_first(name):
    doc = inspect.getdoc(public()[name])
    assert doc, f"{name} has no docstring"
    first = doc.split("\n\n")[0]
    assert "\n" not in first, f"{name}: the docstring does not begin with one line"
    assert first.rstrip().endswith((".", ":")), f"{name}: {first!r}"


@pytest.mark.parametrize("name", ["IVON", "Posterior", "Mixture", "merge", "predict"])
def test_main_names_have_example_and_source(name):
    doc = inspect.getdoc(public()[name]) or ""
    assert ">>>" in doc, f"{name}: no example"
    assert "Source" in doc, f"{name}: no source"
    assert "Raises" in doc, f"{name}: no errors"


@pytest.mark.parametrize("name", posterity.metrics.__all__)
def test_metrics_have_example_and_source(name):
    if inspect.isfunction(getattr(posterity.metrics, name)):
        doc = inspect.getdoc(getattr(posterity.metrics, name)) or ""
        assert ">>>" in doc, f"{name}: no example"
        assert "Source" in doc or "Σ" in doc, f"{name}: no formula or source"


def test_results_table_is_that_of_the_committed_results():
    from posterity_studies import compare  # the command line's own table

    files = sorted((ROOT / "results/fashion-mnist").glob("*-seed*.json"))
    results = [json.loads(path.read_text()) for path in files]
    assert results
    for label, *row in compare.rows(sorted(results, key=lambda r: r["settings"]["optimizer"])):
        found = compare.values(results, *row)
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {label} |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        shown = ("accuracy", "nll", "ece", "brier", "ood_auroc", "ood_fpr_at_95")
        for cell, metric in zip(cells, shown, strict=True):
            mean, spread = statistics.mean(found[metric]), statistics.stdev(found[metric])
            form = compare.COLUMNS[metric][1]
            assert cell.replace("**", "") == f"{form.format(mean)} ± {form.format(spread)}"
