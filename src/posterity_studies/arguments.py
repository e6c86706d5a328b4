"""From a command line to a command; what is wrong with it is told in a line."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from posterity_studies.recipes import UserError, unknown

Name = tyro.conf.Positional[str]
RecipeName = Annotated[Name, tyro.conf.arg(metavar="RECIPE")]
RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Json = Annotated[bool, tyro.conf.arg(name="json")]
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Real = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
Place = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
SETTINGS = {"lr", "ess", "hess_init", "weight_decay", "clip_radius"}  # of optimizers, and their
SETTINGS |= {"memory", "temperature", "momentum", "beta2"}  # shorter names on the command line
COLOUR = re.compile(r"\x1b\[[\d;]*m")
RULE = re.compile(r"[─╭╮╰╯]{3,}|-{10,}")  # where a terminal knows no lines, of dashes
SAID = {
    r"^Missing from posterity \S+ (\S+(?: [A-Z]{2,})?) ": r"needs \1: ",
    r"^Missing value for argument '(.*?)'.*": r"\1 needs a value",
    r"^Error parsing (\S+): no type matching {None}\|(\w+) .*?\[(.*)\]$": r"\1 takes \2, not \3",
    r"^Error parsing (\S+): invalid literal for int\(\) .*?: (.*)": r"\1 takes INT, not \2",
    r"^Error parsing (\S+): could not convert string to float: (.*)": r"\1 takes FLOAT, not \2",
    r"^Error parsing (\S+): Could not find valid parse.*?\[(.*?)\].*": r"\1 cannot take \2",
    r"^Error parsing ": "",
    r"^Unrecognized options: (.*)": r"what is \1?",
}


def parsed(commands: Mapping[str, type], prog: str, description: str) -> Callable[[], None]:
    """The command that ``sys.argv`` asks for.

    Raises:
        UserError: it asks for none, or wrongly.
        SystemExit: it asked for help, or for what a shell completes, which is printed.
    """
    _known(commands, sys.argv[1:])
    told = io.StringIO()
    try:
        with redirect_stderr(told), _unwrapped():
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands), prog=prog, description=description
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_line(told.getvalue())}; see posterity {sys.argv[1]} --help") from None


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Let no line of a message end before it is over; help is as wide as the terminal."""
    before = dict(os.environ)
    if not {"-h", "--help"} & {*sys.argv}:
        os.environ["COLUMNS"] = "9999"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _known(commands: Mapping[str, type], given: Sequence[str]) -> None:
    """Name what is not known first: a parser would miss what the misspelt option leaves out."""
    command, *rest = given or [""]
    if command in ("-h", "--help") or command.startswith("--tyro"):
        return
    if not command or command.startswith("-"):
        raise UserError(f"needs a command: {', '.join(commands)}; posterity --help explains them")
    if command not in commands:
        raise UserError(unknown("command", command, commands))
    hints = get_type_hints(commands[command], include_extras=True)
    named = [f.name for f in fields(commands[command]) if not _placed(hints[f.name])]
    options = {name.removeprefix("as_").replace("_", "-") for name in named}
    shown, seen = [f"--{option}" for option in sorted(options)], set[str]()
    options |= {f"no-{option}" for option in options} | {"help"}
    for each in rest:
        option = each.partition("=")[0].removeprefix("--").replace("_", "-")
        if each == "--":
            raise UserError("leave out the --: options stand anywhere after the command")
        if not re.match("--[a-z]", each) or option.startswith("tyro"):
            continue
        if option not in options:
            told = unknown(f"option of {command}", f"--{option}", shown)
            setting = option.replace("-", "_") if "set" in options else ""
            if setting in SETTINGS:
                told = f"{setting} is a setting of the optimizer: --set {setting}=NUMBER"
            raise UserError(told)
        if option in seen:
            raise UserError(f"--{option} stands there twice: put all its values behind one")
        seen.add(option)


def _placed(hint: Any) -> bool:
    """Whether an argument has its place instead of a name."""
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _line(box: str) -> str:
    """What a box says under its title, without the parser's reasons and the help text."""
    _, *parts = RULE.split(re.sub(r"[│\n ]+", " ", COLOUR.sub("", box)))
    said = re.split(r"Got errors:|\(required\)", (parts or [box])[0])[0].strip(" .")
    for told, better in SAID.items():
        said = re.sub(told, better, said)
    return said
