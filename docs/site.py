"""Hooks of the site: pages and files from outside docs/ are in it, where the repository has them.

So every link between files works both in the repository and on the site, and is checked.
"""

import os
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "results/README.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
LITERAL = re.compile(r"^Example::\n((?:\n| {4}.*\n?)+)", re.M)
DOCTEST = re.compile(r"^>>> (?:.+\n?)+", re.M)
ROLE = re.compile(r":(?:class|meth|func|mod|attr):<code>~?([\w.\s]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and every file that a page links to."""
    for name in OUTSIDE:
        _add(name, files, config)
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for link in LINK.findall(_path(page.src_uri).read_text()):
            name = _uri(page.src_uri, link)
            if (ROOT / name).is_file() and files.get_file_from_path(name) is None:
                _add(name, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository as links between files of the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        return os.path.relpath(_uri(here, match[1]), Path(here).parent)

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx's roles in docstrings as plain code, with a link to what is on the same page."""

    def shown(match: re.Match[str]) -> str:
        name = re.sub(r"\s", "", match[1])
        code = f"<code>{name.removeprefix('posterity.')}</code>"
        found = next((n for n in (name, f"posterity.{name}") if f'id="{n}"' in html), None)
        return f'<a href="#{found}">{code}</a>' if found else code

    return ROLE.sub(shown, html)


class Docstrings(Extension):
    """Examples as code, which in plain text need no fence."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Mark them before the docstring is parsed."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            text = LITERAL.sub(lambda m: "Examples:\n" + _fenced(m[1], "    "), text)
            obj.docstring.value = DOCTEST.sub(lambda m: _fenced(m[0], ""), text)


def _fenced(code: str, indent: str) -> str:
    return f"{indent}```python\n{code.strip(chr(10))}\n{indent}```\n"


def _add(name: str, files: Files, config: Any) -> None:
    files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))


def _path(uri: str) -> Path:
    """Where a file of the site is in the repository."""
    return ROOT / uri if (ROOT / uri).exists() else ROOT / "docs" / uri


def _uri(page: str, link: str) -> str:
    """Where what a page links to is on the site: docs/ is its root, and a folder its account."""
    found = (_path(page).parent / link).resolve().relative_to(ROOT)
    if found.parts[0] == "results" and (ROOT / found).is_dir():
        return "results/README.md"
    return found.as_posix().removeprefix("docs/")
