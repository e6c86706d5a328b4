"""The reports in a browser: no complaint, every control does what it says, and all can use them."""

import math
import shutil

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

from posterity.perturbation import Perturbation  # noqa: E402
from posterity_studies.report import write_comparison, write_merge, write_sensitivity  # noqa: E402
from posterity_studies.report.layers import Layer  # noqa: E402
from posterity_studies.report.merge import Merged  # noqa: E402
from reports import CLASSES, change, comparison  # noqa: E402

pytestmark = pytest.mark.browser
PRIORS = (0.02, math.nan, 0.01)
SIZES = {"desktop": (1280, "light"), "phone": (390, "dark")}


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
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
    n, probs = len(content["targets"]), content["entries"][-1].probs
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(3, n, generator=generator)
    perturbed = Perturbation(*values, torch.ones(n, dtype=torch.long))
    tested = values[2], content["targets"]
    shown = {k: content[k] for k in ("targets", "class_names", "images", "provenance")}
    return {
        "comparison": write_comparison(folder / "comparison.html", **content),
        "sensitivity": write_sensitivity(
            folder / "sensitivity.html",
            title="t",
            found=perturbed,
            probs=probs,
            tested=tested,
            **shown,
        ),
        "merge": write_merge(
            folder / "merge.html",
            title="m",
            labels=["imdb", "tweets"],
            found=[Merged(layer, (0.5, 2.0), (0.1, 0.7)) for layer in found],
            provenance=content["provenance"],
        ),
    }


@pytest.fixture
def visit(chromium, pages):
    """Open a report; what it logs is an error at the end."""
    opened, logged = [], []

    def visit(kind, size="desktop", **context):
        width, scheme = SIZES[size]
        page = chromium.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **context
        )
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or logged.append(r.url))
        page.goto(pages[kind].as_uri())
        opened.append(page)
        return page

    visit.logged = logged
    yield visit
    for page in opened:
        page.close()
    assert logged == []


@pytest.mark.parametrize("kind", ["comparison", "sensitivity", "merge"])
@pytest.mark.parametrize("size", SIZES)
def test_all_can_use_it(visit, kind, size):
    """axe-core's rules: names, roles, landmarks, contrast …; and no scrolling sideways."""
    page = visit(kind, size)
    broken = axe.Axe().run(page).response["violations"]
    assert [(v["id"], [n["html"] for n in v["nodes"]][:3]) for v in broken] == []
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert len(page.screenshot()) > 20_000


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


def shown(page, name="gallery"):
    """Cards that stand there, in order: their data."""
    cards = page.locator(f'[aria-labelledby="{name}"] li[data-index]:visible')
    return cards.evaluate_all("cards => cards.map(card => ({...card.dataset}))")


@pytest.mark.parametrize("kind", ["comparison", "sensitivity"])
def test_the_gallery_is_ordered_chosen_from_and_continued(visit, kind):
    page, (name, first) = (
        visit(kind),
        {
            "comparison": ("gallery", "entropy"),
            "sensitivity": ("most", "sensitivity"),
        }[kind],
    )
    section = page.locator(f'section[aria-labelledby="{name}"]')
    values = [float(card[first]) for card in shown(page, name)]
    assert len(values) == 24
    assert values == sorted(values, reverse=True)
    answer, label = (section.locator(f"select[name={part}]") for part in ("answer", "truth"))
    section.get_by_label("Order").select_option("loss -1")
    values = [float(card["loss"]) for card in shown(page, name)]
    assert values == sorted(values, reverse=True)
    answer.select_option("wrong")
    assert {card["answer"] for card in shown(page, name)} == {"wrong"}
    label.select_option(label=CLASSES[3])
    few = shown(page, name)
    assert {card["truth"] for card in few} == {"3"}
    assert section.get_by_role("status").inner_text() == f"{len(few)} of {len(few)} shown"
    more = section.get_by_role("button", name="Show more")
    assert not more.is_visible()
    label.select_option("")
    answer.select_option("")
    assert len(shown(page, name)) == 24
    more.focus()
    page.keyboard.press("Enter")
    assert len(shown(page, name)) == 48
    where = "document.activeElement.dataset.index"
    assert page.evaluate(where) == shown(page, name)[24]["index"]  # the first of the new ones


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
def test_a_heading_orders_its_table(visit, kind, heading):
    page = visit(kind)
    button = page.get_by_role("button", name=heading).first
    before = column(page, heading)
    for way, reverse in (("descending", True), ("ascending", False)):
        button.focus()
        page.keyboard.press("Space")
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
