"""The reports in a browser: no complaint, every control does what it says, and all can use them.

POSTERITY_SCREENSHOTS names a folder for pictures of them. With POSTERITY_BROWSER these tests fail
where they would be skipped: without playwright, or without Chromium.
"""

import importlib
import math
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
NEEDED = bool(os.environ.get("POSTERITY_BROWSER"))
find = importlib.import_module if NEEDED else pytest.importorskip
api = find("playwright.sync_api")
axe = find("axe_playwright_python.sync_playwright")

from posterity_studies import claims  # noqa: E402
from posterity_studies.report import (  # noqa: E402
    write_claims,
    write_comparison,
    write_merge,
    write_sensitivity,
)
from posterity_studies.report.layers import Layer  # noqa: E402
from posterity_studies.report.merge import Merged  # noqa: E402
from reports import CLASSES, change, comparison, sensitivity  # noqa: E402

pytestmark = pytest.mark.browser
PRIORS = (0.02, math.nan, 0.01)
STATUSES = ("holds", "does not hold", "not yet run")
SIZES = {
    "desktop": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "dark",
        "is_mobile": True,
        "has_touch": True,
    },
}
ORDERS = {
    "comparison": {
        "least sure first": ("entropy", -1),
        "surest first": ("entropy", 1),
        "worst first": ("loss", -1),
        "as in the data": ("index", 1),
    },
    "sensitivity": {
        "most sensitive first": ("sensitivity", -1),
        "largest loss first": ("loss", -1),
        "as in the data": ("index", 1),
    },
}
sized = pytest.mark.parametrize("size", SIZES)
every = pytest.mark.parametrize("kind", ["comparison", "sensitivity", "merge", "claims"])
with_images = pytest.mark.parametrize("kind", ORDERS)


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    if found is None:
        (pytest.fail if NEEDED else pytest.skip)("no Chromium on this machine")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of each kind of report."""
    folder, content = tmp_path_factory.mktemp("pages"), comparison()
    shapes = {"2.weight": (8, 4), "10.weight": (4, 300), "10.bias": (4,)}
    found = [
        Layer(name, shape, 0.3 / k, 0.01 * k, (-k, 0.1, 0.5, 1.0, 2.0), 0.1 * k, prior)
        for k, (prior, (name, shape)) in enumerate(zip(PRIORS, shapes.items(), strict=True), 1)
    ]
    content = change(content, 3, layers=found)
    judged = [
        claims.Judged(claim, scale, status, "NLL 0.2345 against 0.3456" * (status in STATUSES[:2]))
        for claim, status in zip(claims.CLAIMS, STATUSES, strict=False)
        for scale in claims.SCALES
    ]
    return {
        "comparison": write_comparison(folder / "comparison.html", **content),
        "sensitivity": write_sensitivity(folder / "sensitivity.html", **sensitivity()),
        "merge": write_merge(
            folder / "merge.html",
            title="Two posteriors merged",
            labels=["imdb", "tweets"],
            found=[Merged(layer, (0.5, 2.0), (0.1, 0.7)) for layer in found],
            provenance=content["provenance"],
        ),
        "claims": write_claims(folder / "claims.html", judged, content["provenance"]),
    }


@pytest.fixture
def visit(chromium, pages):
    """Open a report; what it logs is an error at the end, and so is that it scrolls sideways."""
    opened, logged = [], []

    def visit(kind, size="desktop", **context):
        page = chromium.new_page(**SIZES[size], **context)
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or logged.append(r.url))
        page.goto(pages[kind].as_uri())
        opened.append(page)
        return page

    visit.logged = logged
    yield visit
    for page in opened:
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == page.viewport_size["width"]
        page.close()
    assert logged == []


def complaints(page):
    """What axe-core's rules find: names, roles, landmarks, contrast, targets too small …"""
    options = {"rules": {"target-size": {"enabled": True}}, "resultTypes": ["violations"]}
    broken = axe.Axe().run(page, options=options).response["violations"]
    return [(v["id"], [n["html"] for n in v["nodes"]][:3]) for v in broken]


def press(page, control):
    """With a finger on a phone, with the keyboard on a desk."""
    if page.viewport_size == SIZES["phone"]["viewport"]:
        control.tap()
    else:
        control.press("Enter")


@every
@sized
def test_all_can_use_it(visit, kind, size):
    page, folder = visit(kind, size), os.environ.get("POSTERITY_SCREENSHOTS")
    assert complaints(page) == []
    picture = page.screenshot(full_page=True, path=folder and Path(folder, f"{kind}-{size}.png"))
    assert len(picture) > 20_000


@every
@sized
def test_all_can_use_what_its_controls_have_changed(visit, kind, size):
    page = visit(kind, size)
    press(page, page.locator("summary"))
    for button in page.locator("table.sortable th:first-child button").all():
        press(page, button)
    for form in page.locator("form").all():
        form.get_by_label("Order").select_option("loss -1")
        form.get_by_label("The model").select_option("wrong")
    for button in page.get_by_role("button", name="Show more").all():
        press(page, button)
    assert complaints(page) == []


@every
def test_a_finger_hits_every_control(visit, kind):
    page = visit(kind, "phone")
    boxes = [c.bounding_box() for c in page.locator("button, select, summary").all()]
    sizes = [min(box["width"], box["height"]) for box in boxes if box]
    assert min(sizes) >= 24


@pytest.mark.parametrize("kind", ["comparison", "sensitivity", "merge"])
def test_on_a_desk_no_table_is_cut_off(visit, kind):
    page = visit(kind)
    cut = "e => [...e].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.eval_on_selector_all(".scroll", cut) == 0
    assert page.locator(".scroll table").count() > 0


def test_a_complaint_would_be_heard(visit):
    page = visit("comparison")
    page.evaluate("console.error('heard')")
    assert visit.logged == ["heard"]
    visit.logged.clear()


@every
@sized
def test_where_the_numbers_come_from_is_told_when_asked(visit, kind, size):
    page = visit(kind, size)
    asked, told = page.locator("summary"), page.locator("details dl")
    assert not told.is_visible()
    press(page, asked)
    assert told.inner_text().split() == ["git", "0123abc", "seed", "0"]
    press(page, asked)
    assert not told.is_visible()


class Gallery:
    """The first one of a page, its controls and its cards: their data."""

    def __init__(self, page):
        self.page, self.box = page, page.locator("[data-gallery]")
        self.order, self.label, self.answer = self.box.locator("select").all()
        self.more = self.box.get_by_role("button", name="Show more")

    def data(self, which):
        cards = self.box.locator(f"li[data-index]{which}")
        return cards.evaluate_all("cards => cards.map(card => ({...card.dataset}))")

    @property
    def cards(self):
        return self.data("")

    @property
    def shown(self):
        return self.data(":visible")

    @property
    def told(self):
        return self.box.get_by_role("status").inner_text()


@with_images
@sized
def test_the_gallery_is_ordered_as_it_says(visit, kind, size):
    gallery = Gallery(visit(kind, size))
    first, words = gallery.shown, gallery.order.locator("option").all_inner_texts()
    assert words == [*ORDERS[kind]]
    for word in [*words, words[0]]:
        gallery.order.select_option(label=word)
        key, sign = ORDERS[kind][word]
        ordered = sorted(gallery.cards, key=lambda c: (sign * float(c[key]), int(c["index"])))
        assert gallery.shown == ordered[:24]
    assert gallery.shown == first


@with_images
@sized
def test_the_gallery_is_chosen_from(visit, kind, size):
    gallery = Gallery(visit(kind, size))
    gallery.answer.select_option("wrong")
    assert {card["answer"] for card in gallery.shown} == {"wrong"}
    gallery.label.select_option(label=CLASSES[3])
    wanted = [c for c in gallery.cards if (c["answer"], c["truth"]) == ("wrong", "3")]
    assert 0 < len(wanted) < 24
    assert gallery.shown == wanted
    assert gallery.told == f"{len(wanted)} of {len(wanted)} shown"
    assert not gallery.more.is_visible()
    for choice in gallery.label, gallery.answer:
        choice.select_option(label="all")
    assert len(gallery.shown) == 24
    assert gallery.more.is_visible()


@with_images
@sized
def test_the_gallery_is_continued_with_what_was_chosen(visit, kind, size):
    gallery = Gallery(visit(kind, size))
    gallery.answer.select_option("right")
    wanted = [card for card in gallery.cards if card["answer"] == "right"]
    for before in range(24, len(wanted), 24):
        assert gallery.told == f"{before} of {len(wanted)} shown"
        press(gallery.page, gallery.more)
        assert gallery.shown == wanted[: before + 24]
        at = gallery.page.evaluate("document.activeElement.dataset.index")
        assert at == wanted[before]["index"]  # the first of the new ones
    assert len(wanted) > 24
    assert not gallery.more.is_visible()
    gallery.answer.select_option("")
    assert len(gallery.shown) == 24


def column(page, heading):
    table = page.locator("table", has=page.get_by_role("columnheader", name=heading)).first
    heads = table.locator("thead th").all_inner_texts()
    at = next(k for k, text in enumerate(heads) if text.startswith(heading))
    return table.locator(f"tbody tr > :nth-child({at + 1})").all_inner_texts()


@pytest.mark.parametrize(
    ("kind", "heading"),
    [
        ("comparison", "NLL"),
        ("comparison", "Weights"),
        ("sensitivity", "Images"),
        ("merge", "Moved"),
    ],
)
@sized
def test_a_heading_orders_its_table(visit, kind, heading, size):
    page = visit(kind, size)
    button = page.get_by_role("button", name=heading).first
    before = column(page, heading)
    for way, reverse in (("descending", True), ("ascending", False)):
        press(page, button)
        head = page.locator("th[aria-sort]")
        assert head.get_attribute("aria-sort") == way
        values = [float(text.split()[0].replace(",", "")) for text in column(page, heading)]
        assert values == sorted(values, reverse=reverse)
    assert sorted(column(page, heading)) == sorted(before)


def test_what_is_missing_comes_last(visit):
    page = visit("comparison")
    for expected in (["2.0%", "1.0%", "–"], ["1.0%", "2.0%", "–"]):
        page.get_by_role("button", name="Prior").click()
        assert column(page, "Prior") == expected


def test_names_are_ordered_as_words(visit):
    page = visit("comparison")
    page.get_by_role("button", name="Tensor").click()
    names = [text.split()[0] for text in column(page, "Tensor")]
    assert names == ["2.weight", "10.bias", "10.weight"]


def test_without_scripts_the_first_cards_stand_there(visit):
    page = visit("comparison", java_script_enabled=False)
    assert page.locator("form").count() == 1
    assert not page.locator("form").is_visible()
    assert page.locator("li[data-index]:visible").count() == 24
