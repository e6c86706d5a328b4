"""Each wrong input on docs/errors.md prints what the page says, in a line, and changes nothing.

And each command that a page or the help shows is one that the command line takes.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from posterity import Posterior
from posterity_studies import arguments, cli, recipes, train

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
SHOWN = {
    line
    for pattern in ("*.md", "docs/**/*.md", "results/*.md", "src/posterity_studies/*.py")
    for path in ROOT.glob(pattern)
    for line in re.findall(
        r"^    (?:\.venv/bin/)?posterity ((?:.*\\\n)*.*)$", path.read_text(), re.M
    )
}
CASES = re.findall(r"^    \$ posterity (.*)\n    posterity: error: (.*)$", PAGE.read_text(), re.M)


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """What the page's commands find."""
    home = tmp_path_factory.mktemp("place")
    for name in ("ivon", "adamw"):
        train.train(recipes.recipe("smoke"), name, 0, home / "runs" / name)
    damaged = shutil.copytree(home / "runs" / "ivon", home / "runs" / "damaged")
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("notes", "empty"):
        (home / name).mkdir()
    (home / "notes" / "readme.txt").write_text("not a picture, and no run")
    (home / "short.txt").write_text("too short")
    Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)}).save(home / "other.safetensors")
    return home


def listing(home):
    return {p: p.is_file() and p.read_bytes() for p in home.rglob("*")}


def test_the_page_lists_thirty_and_every_command():
    assert len(CASES) >= 30
    commands = {line.split()[0] for line, _ in CASES}
    assert commands >= {"train", "compare", "evaluate", "predict", "tune", "tokens", "pretrain"}
    assert commands >= {"finetune", "sensitivity", "merge", "study"}


@pytest.mark.parametrize(("line", "said"), CASES, ids=[line for line, _ in CASES])
def test_a_wrong_input_says_what_to_do_and_loses_nothing(line, said, place, call, monkeypatch):
    monkeypatch.chdir(place)
    before = listing(place)
    done = call(*line.split())
    assert done.stderr == f"posterity: error: {said}\n"
    assert done.returncode == 2
    assert done.stdout == ""
    assert listing(place) == before


def test_pages_and_help_show_commands():
    assert {line.split()[0] for line in SHOWN} == set(cli.COMMANDS)


@pytest.mark.parametrize("line", sorted(SHOWN))
def test_what_is_shown_is_a_command(line, monkeypatch):
    given = shlex.split(line.replace("\\\n", " "), comments=True)
    monkeypatch.setattr(sys, "argv", ["posterity", *given])
    command = arguments.parsed(cli.COMMANDS, "posterity", "")
    assert isinstance(command, cli.COMMANDS[given[0]])
