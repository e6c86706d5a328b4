"""``posterity sensitivity``: its table, its gallery, and what it refuses."""

import csv
import json
import re
import shutil
from statistics import fmean

import pytest
import torch
from torch.nn.functional import cross_entropy

from posterity import Posterior, sensitivity
from posterity.perturbation import Perturbation
from posterity_studies import recipes, runs, tasks, train
from posterity_studies.data import LISTINGS
from posterity_studies.report import write_sensitivity
from reports import comparison


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    chosen = recipes.recipe("smoke").with_settings("ivon", ["temperature=0.01"])  # narrow
    for optimizer in ("ivon", "sgd"):
        train.train(chosen, optimizer, 0, home / optimizer)
    return home / "ivon"


def test_the_table_holds_the_scores_of_every_training_image(call, run):
    done = call("sensitivity", run)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((run / "sensitivity.csv").open()))
    result, model, posterior = runs.load(run)
    inputs, targets = tasks.load_task(runs.recipe_of(result)).train
    assert [int(row["image"]) for row in rows] == list(range(600))
    expected = sensitivity(model, posterior, (inputs, targets))
    found = torch.tensor([float(row["sensitivity"]) for row in rows])
    torch.testing.assert_close(found, expected)
    names = LISTINGS["fashion-mnist"].class_names
    assert [row["label"] for row in rows] == [names[c] for c in targets.tolist()]
    left_out = torch.tensor([float(row["left_out_loss"]) for row in rows]).mean()
    assert f"estimate of the test loss {left_out:.4f}" in done.stdout


def test_the_gallery_shows_the_most_sensitive_first(call, run):
    call("sensitivity", run)
    page = (run / "sensitivity.html").read_text()
    rows = list(csv.DictReader((run / "sensitivity.csv").open()))
    rows.sort(key=lambda row: -float(row["sensitivity"]))
    first = page.index('data-index="')
    assert page[first:].startswith(f'data-index="{rows[0]["image"]}"')
    assert page.count("data:image/png") == 240 + 24
    test_loss = runs.read_json(run / "result.json")["evaluations"]["mean"]["nll"]
    assert f"the test loss {test_loss:.4f}." in page
    assert "http" not in page.replace("http-equiv", "")
    result, model, _ = runs.load(run)
    task = tasks.load_task(runs.recipe_of(result))
    with torch.no_grad():
        losses = cross_entropy(model(task.test[0]), task.test[1], reduction="none")
    for c, name in enumerate(LISTINGS["fashion-mnist"].class_names):
        row = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*)</tr>', page)[1]
        cells = re.findall(r"<td>([^<]*)</td>", row)
        mine = [r for r in rows if r["label"] == name]
        means = [fmean(float(r[key]) for r in mine) for key in ("loss", "left_out_loss")]
        means.append(losses[task.test[1] == c].mean().item())
        assert cells[3:6] == [f"{mean:.3f}" for mean in means]
        assert row.count("<circle") == 2
        assert row.count(" 2V14") == 1


def test_the_page_of_what_cannot_be_drawn(tmp_path):
    content = comparison()
    targets = content["targets"]
    values = torch.rand(3, len(targets), generator=torch.Generator().manual_seed(1))
    values[2, targets == 0] = torch.inf
    values[0, targets == 1] = torch.nan
    known = targets != 2
    shown = {k: content[k] for k in ("targets", "class_names", "images", "provenance")}
    shown |= {"found": Perturbation(*values, torch.ones_like(targets)), "title": "t"}
    probs = content["entries"][-1].probs
    page = tmp_path / "page.html"

    def rows():
        found = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page.read_text())
        return {name: (text.count("<circle"), text.count(" 2V14")) for name, text in found}

    names = content["class_names"]
    write_sensitivity(page, probs=probs, tested=(values[1][known], targets[known]), **shown)
    drawn = rows()
    assert [drawn[names[c]] for c in (0, 1, 2, 3)] == [(0, 0), (2, 1), (2, 0), (2, 1)]
    assert [*drawn][-1] == names[1]  # its sensitivity is no number
    write_sensitivity(page, probs=probs, **shown)
    assert {bars for _, bars in rows().values()} == {0}
    assert "test loss" not in page.read_text().replace("estimate of the test loss", "")


def test_samples_need_no_derivative_and_say_nearly_the_same(call, run, tmp_path):
    tables = []
    for extra in ((), ("--variance", "samples", "--samples", "300"), ("--no-full",)):
        path = tmp_path / f"{len(tables)}.csv"
        done = call("sensitivity", run, "--first", "90", "--table", path, *extra)
        assert done.returncode == 0, done.stderr
        tables.append([float(row["sensitivity"]) for row in csv.DictReader(path.open())])
    full, sampled, diagonal = map(torch.tensor, tables)
    assert len(full) == 90
    assert ((sampled - full).abs() / full).mean() < 0.2  # ten outputs, each to 1/√300
    assert not torch.allclose(diagonal, full, rtol=0.1)  # of the probabilities, another measure


def test_parquet_where_pyarrow_is_installed(call, run, tmp_path):
    done = call("sensitivity", run, "--first", "9", "--table", tmp_path / "t.parquet")
    try:
        import pyarrow.parquet
    except ImportError:
        assert done.returncode == 2
        assert "pip install pyarrow" in done.stderr
    else:
        assert pyarrow.parquet.read_table(tmp_path / "t.parquet").num_rows == 9


def other_network(copy):
    result = json.loads((copy / "result.json").read_text()) | {"network": "lenet5"}
    (copy / "result.json").write_text(json.dumps(result))


def other_posterior(copy):
    weights = {"weight": torch.ones(2)}
    Posterior(weights, weights).save(copy / "posterior.safetensors")


def truncated(copy):
    path = copy / "posterior.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def overflowing(copy):
    path = copy / "posterior.safetensors"
    posterior = Posterior.load(path)
    mean = {name: torch.full_like(value, 1e30) for name, value in posterior.mean.items()}
    Posterior(mean, posterior.precision).save(path)


@pytest.mark.parametrize(
    ("spoil", "arguments", "said"),
    [
        (None, ["--first", "0"], "--first must be between 1 and 600"),
        (None, ["--table", "t.txt"], "ends in .csv or .parquet"),
        (other_network, [], "fits no lenet5"),
        (other_posterior, [], "does not fit the model"),
        (truncated, [], "cannot load"),
        (overflowing, [], "no image has a finite sensitivity"),
        (lambda copy: (copy / "posterior.safetensors").unlink(), [], "needs a run of IVON"),
        (lambda copy: (copy / "result.json").unlink(), [], "folder of a finished run"),
        (shutil.rmtree, [], "no folder of a run"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(call, run, tmp_path, spoil, arguments, said):
    copy = tmp_path / "run"
    keep = shutil.ignore_patterns("sensitivity.*")
    shutil.copytree(run, copy, ignore=keep)
    if spoil:
        spoil(copy)
    before = sorted(copy.rglob("*"))
    done = call("sensitivity", copy, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(copy.rglob("*")) == before
