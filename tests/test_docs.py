"""The code of every page runs, from top to bottom, in a fresh process, and prints what it shows."""

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

# A fence without a language that follows code at once is what this code prints, all of it.
CODE = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```\n(.*?)^```$)?", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\w)")
END = "\x1e"  # of a block's output


def near(shown: str, printed: str) -> bool:
    """Within 2 %, or two units of the last digit that is shown: machines round differently."""
    a, b = (float(number.replace(",", "")) for number in (shown, printed))
    digits, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(a - b) <= max(0.02 * abs(a), 2 * unit) * (1 + 1e-9)


def alike(shown: str, printed: str) -> bool:
    """The same words, with numbers that are near; spaces are as wide as columns need."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, printed)]
    numbers = [NUMBER.findall(text) for text in (shown, printed)]
    return words[0] == words[1] and all(map(near, *numbers))


def blocks(page: Path) -> list[tuple[str, str | None]]:
    """Code, and what is shown below it; None where nothing is."""
    return [(found[1], found[2]) for found in CODE.finditer(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_page(page, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    code = "".join(f"{block}\nprint({END!r}, flush=True)\n" for block, _ in blocks(page))
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
    *printed, _ = done.stdout.split(f"{END}\n")
    for (_, shown), found in zip(blocks(page), printed, strict=True):
        assert shown is None or alike(shown, found), f"it shows\n{shown}but prints\n{found}"


def test_every_fence_is_code_or_what_it_prints():
    """Else :func:`test_page` would compare nothing, and no one would know."""
    shown = {page: [out for _, out in blocks(page) if out is not None] for page in PAGES}
    assert all(shown[DOCS / page] for page in ("start.md", "diagnostics.md"))
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text(), re.M)
        assert len(fences) == 2 * len(blocks(page) + shown[page]), page.name


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("NLL 0.134  ECE 0.006", "NLL 0.136 ECE 0.008", True),  # two units
        ("NLL 0.134", "NLL 0.137", False),
        ("KL 1.322e+04 nats", "KL 1.345e+04 nats", True),  # 2 %
        ("KL 1.322e+04 nats", "KL 1.355e+04 nats", False),
        ("1,500 steps", "1,520 steps", True),
        ("1,500 steps", "1,560 steps", False),
        ("-0.884", "0.884", False),
        ("100%", "97%", False),
        ("0.weight  640", "0.weight 640", True),
        ("0.weight 640", "2.weight 640", False),  # a name and no number
        ("h has moved", "h has not moved", False),
        ("0.5", "0.5 0.5", False),
        ("0.5", "nan", False),
        ("line\n", "", False),
    ],
)
def test_what_is_alike(shown, printed, same):
    assert alike(shown, printed) is same


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
