"""posterity merge: files and runs in, a file and its card out, or one line and nothing."""

import hashlib
import json
import re

import pytest
import torch

from posterity import Posterior, merge
from posterity.merging import METHODS


def make(seed, names=("a", "b"), **kwargs):
    rng = torch.Generator().manual_seed(seed)
    mean = {n: torch.randn(3, 2, generator=rng) for n in names}
    precision = {n: torch.rand(3, 2, generator=rng) + (2 if seed else 0.5) for n in names}
    told = {"prior_precision": 0.5, "ess": 10.0 * seed or None, "settings": {"lr": seed / 10}}
    return Posterior(mean, precision, **told | kwargs)


@pytest.fixture
def files(tmp_path):
    """Two files, a run's folder, and a base."""
    for name, seed in (("A", 1), ("B", 2), ("base", 0)):
        make(seed).save(tmp_path / f"{name}.safetensors")
    (tmp_path / "run").mkdir()
    make(3).save(tmp_path / "run" / "posterior.safetensors")
    return tmp_path


def state(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def test_files_and_runs_become_one_file_and_a_card_that_works(call, files):
    inputs = [files / "A.safetensors", files / "run"]
    base, out = files / "base.safetensors", files / "new" / "merged.safetensors"
    done = call("merge", *inputs, "--base", base, "--alpha", 0.5, "--weights", 2, 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    expected = merge([make(1), make(3)], base=make(0), alpha=0.5, weights=[2, 3])
    expected.save(files / "expected")
    assert out.read_bytes() == (files / "expected").read_bytes()
    assert {p.name for p in out.parent.iterdir()} == {
        "merged.safetensors",
        "merged.md",
        "merged.html",
    }

    card = out.with_suffix(".md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    told = {row[0]: row[1:] for row in rows if len(row) in (2, 6)}
    assert told["method"] == ["hessian"]
    assert told["α"] == ["0.5"]
    assert told["ess"] == [f"{expected.ess:g}"]
    assert told["torch"] == [torch.__version__]
    held = {"2": inputs[0], "3": inputs[1] / "posterior.safetensors", "base": base}
    for weight, path in held.items():
        file, size, digest, ess, made = told[weight]
        whole = path.read_bytes()
        assert (file, size) == (str(path), str(len(whole)))
        assert digest == hashlib.sha256(whole).hexdigest()
        posterior = Posterior.load(path)
        assert ess == ("unknown" if posterior.ess is None else f"{posterior.ess:g}")
        assert json.loads(made.strip("`")) == posterior.settings

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in "ab")

        def forward(self, x):
            return x @ (self.a + self.b)

    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) == 3
    scope = {"model": Both(), "inputs": torch.randn(4, 3)}
    exec(code.replace('"merged', f'"{out.parent}/merged'), scope)
    assert scope["prediction"].probs.shape == (4, 2)


def test_the_page_says_how_far_each_model_moved_and_what_it_weighs(call, files):
    """A model of precision 4 at 1, one of precision 12 at 5, no base: θ = 4, 6 and 3.46 σ away."""
    for name, mean, precision in (("low", 1.0, 4.0), ("high", 5.0, 12.0)):
        values = {"w": torch.full((3, 2), mean)}, {"w": torch.full((3, 2), precision)}
        (files / name).mkdir()
        Posterior(*values, prior_precision=0.0, ess=10).save(files / name / "posterior.safetensors")
    out = files / "m.safetensors"
    done = call("merge", files / "low", files / "high", "--method", "fisher", "--out", out)
    assert done.stdout.splitlines()[-1] == f"page: {files / 'm.html'}", done.stderr
    text = (files / "m.html").read_text()
    (row,) = re.findall(r"<tr><th scope=\"row\">w.*?</tr>", text, re.DOTALL)
    assert re.findall(r"<td>([\d.]+%?)</td>", row) == ["6", "6", "25.0%", "3.46", "75.0%", "0.0%"]
    assert "<b>low</b> moved by 6 of its σ" in text
    assert "Farthest went <b>w</b> of low: 6 σ" in text


def test_shares_and_the_bases_are_the_whole_precision(call, files):
    how = ("--base", files / "base.safetensors", "--alpha", 0.5, "--weights", 2, 3)
    inputs, out = (files / "A.safetensors", files / "B.safetensors"), files / "m.safetensors"
    assert call("merge", *inputs, *how, "--out", out).returncode == 0
    whole, base = Posterior.load(out), make(0)
    text = (files / "m.html").read_text()
    for name in ("a", "b"):
        (row,) = re.findall(rf'<tr><th scope="row">{name} .*?</tr>', text, re.DOTALL)
        shares = [float(share) for share in re.findall(r"<td>([\d.]+)%</td>", row)][:2]
        own = float((base.precision[name] / whole.precision[name]).mean())
        assert sum(shares) / 100 + own == pytest.approx(1, abs=2e-3)
    average = files / "average.safetensors"
    assert call("merge", *inputs, "--method", "average", "--out", average).returncode == 0
    assert "Share" not in average.with_suffix(".html").read_text()


@pytest.mark.parametrize("method", [m for m, how in METHODS.items() if not how.density])
def test_every_method_by_its_name(call, files, method):
    base = ("--base", files / "base.safetensors") if METHODS[method].base else ()
    inputs, out = (files / "A.safetensors", files / "B.safetensors"), files / "m.safetensors"
    done = call("merge", *inputs, *base, "--method", method, "--out", out)
    assert done.returncode == 0, done.stderr
    how = {"base": make(0)} if base else {}
    expected = merge([make(1), make(2)], method=method, **how)
    assert torch.equal(Posterior.load(out).mean["a"], expected.mean["a"])
    assert f"| method | {method} |" in (files / "m.md").read_text()
    assert ("| α |" in (files / "m.md").read_text()) == METHODS[method].alpha


def other(folder):
    make(5, ("a", "c")).save(folder / "other.safetensors")


def truncated(folder):
    path = folder / "B.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


AB, BASE = ("A.safetensors", "B.safetensors"), ("--base", "base.safetensors")
REFUSED = {
    "no base": (AB, None, "method 'hessian' needs a base"),
    "useless base": ((*AB, *BASE, "--method", "fisher"), None, "'fisher' uses no base"),
    "other network": (("A.safetensors", "other.safetensors", *BASE), other, "different names: "),
    "nan weights": ((*AB, *BASE, "--weights", "1", "nan"), None, "2 positive finite weights"),
    "few weights": ((*AB, *BASE, "--weights", "1"), None, "2 positive finite weights"),
    "nothing": (BASE, None, "nothing to merge"),
    "missing": (("A.safetensors", "C.safetensors", *BASE), None, "C.safetensors does not exist"),
    "no run": (("A.safetensors", "empty", *BASE), lambda f: (f / "empty").mkdir(), "empty holds"),
    "truncated": ((*AB, *BASE), truncated, "cannot load"),
    "method": ((*AB, *BASE, "--method", "mean"), None, "unknown method 'mean'"),
    "density": ((*AB, *BASE, "--method", "ties"), None, "needs a density"),
    "alpha": ((*AB, *BASE, "--alpha", "nan"), None, "alpha=nan must be finite"),
    "output": ((*AB, *BASE), lambda f: (f / "out.safetensors").touch(), "out.safetensors exists"),
    "card": ((*AB, *BASE), lambda f: (f / "out.md").touch(), "out.md exists"),
    "page": ((*AB, *BASE), lambda f: (f / "out.html").touch(), "out.html exists"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_wrong_input_is_one_line_and_writes_nothing(call, files, monkeypatch, fault):
    arguments, prepare, message = REFUSED[fault]
    if prepare:
        prepare(files)
    monkeypatch.chdir(files)
    before = state(files)
    done = call("merge", *arguments, "--out", "out.safetensors")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("posterity: error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert state(files) == before


def test_an_interruption_writes_nothing(call, files, monkeypatch):
    from posterity_studies import merge as command

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(files)
    monkeypatch.setattr(command, "_page", interrupted)  # file and card are complete by then
    before = state(files)
    assert call("merge", *AB, *BASE, "--out", "new/x/out.safetensors").returncode == 130
    assert state(files) == before


def test_a_method_that_needs_peft_says_so(call, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setitem(__import__("sys").modules, "peft.utils", None)
    how = ("--method", "ties", "--density", "0.5", "--out", "out.safetensors")
    done = call("merge", *AB, *BASE, *how)
    assert done.returncode == 2
    assert done.stderr == "posterity: error: method 'ties' needs PEFT: pip install peft\n"
    assert not (files / "out.safetensors").exists()
