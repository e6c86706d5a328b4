"""The comparison report: what it says, and what it escapes; test_page.py looks at it."""

import base64
import hashlib
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from posterity import Posterior  # noqa: E402
from posterity_studies.report import (  # noqa: E402
    figures,
    panels,
    write_comparison,
    write_sensitivity,
)
from posterity_studies.report.layers import layers  # noqa: E402
from posterity_studies.report.table import verdict  # noqa: E402
from reports import CLASSES, LABELS, change, comparison, sensitivity  # noqa: E402

HOSTILE = (
    "<script>alert(1)</script>",
    "a$b$",
    '"><img src=x onerror=alert(1)>',
    r"$\frac{1}{$ & ' }",
)
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses strictly enough for the tests: every tag is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []

    def having(self, attribute):
        return [a[attribute] for _, a in self.tags if attribute in a]


@pytest.fixture(scope="module")
def content():
    return comparison()


@pytest.fixture(scope="module")
def text(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    assert write_comparison(path, **content) == path
    return path.read_text(encoding="utf-8")


def test_page_is_whole_and_depends_on_nothing(text):
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object"}
    policy = "".join(page.having("content"))
    script = text.split("<script>")[1].split("</script>")[0]
    told = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert text.count("<script") == 1
    assert f"script-src 'sha256-{told}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"fetch|import|XMLHttp|innerHTML|eval", script)
    for attribute in "src", "href", "xlink:href":
        assert all(value.startswith(("data:", "#")) for value in page.having(attribute))
    assert text.count("url(") == text.count("url(#")
    assert "@import" not in text
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]


def test_ids_are_unique_and_every_reference_leads_somewhere(text):
    page = Page(text)
    ids = page.having("id")
    assert len(ids) == len({*ids})
    references = page.having("aria-labelledby")
    references += [value[1:] for value in page.having("xlink:href")]
    assert {*references} <= {*ids}
    assert all(f'id="{part.split(")")[0]}"' in text for part in text.split("url(#")[1:])


def palettes(text):
    """The style sheet's variables, light and dark."""
    light = dict(re.findall(r"--([\w-]+): #(\w+)", text.split("@media (prefers")[0]))
    dark = dict(
        re.findall(r"--([\w-]+): #(\w+)", text.split("@media (prefers")[1].split("body {")[0])
    )
    return light, dark


def luminance(colour):
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_figures_take_every_colour_from_the_page(text):
    used = {*re.findall(r"var\(--([\w-]+)\)", text)} - {"p"}  # --p: the length of a bar
    for palette in palettes(text):
        assert used <= palette.keys()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert not [colour for svg in drawings for colour in re.findall(r": #[0-9a-f]{6}\b", svg)]


def test_contrast_meets_wcag_aa_in_light_and_dark(text):
    text_pairs = [(ink, ground) for ink in ("ink", "muted") for ground in ("card", "page")]
    text_pairs += [("ink", "tint"), ("right", "card"), ("wrong", "card")]
    pairs = [
        *((a, b, 4.5) for a, b in text_pairs),
        *((f"series-{i}", "card", 3.0) for i in range(6)),
    ]
    for palette in palettes(text):
        for a, b, least in pairs:
            low, high = sorted((luminance(palette[a]), luminance(palette[b])))
            assert (high + 0.05) / (low + 0.05) >= least, (a, b)


def test_every_figure_states_its_finding_in_numbers(text, content):
    labels = [a["aria-label"] for _, a in Page(text).tags if a.get("role") == "img"]
    assert len(labels) == 2 + 4 + 4 + 1
    assert all(any(c.isdigit() for c in label) for label in labels)
    assert "IVON at the mean from 0.700 to 0.400" in labels[0]


def test_table_names_units_directions_and_the_best(text, content):
    page = Page(text)
    assert [a["scope"] for tag, a in page.tags if tag == "th"] == ["col"] * 9 + ["row"] * 4
    assert text.count('<td class="best">') == 6  # time and memory tie: nobody leads
    for cell in "25.00<span", "0.1500<span", "20.00<span", ">12.3<", ">1,234<":
        assert cell in text.replace("(best)", "")
    assert "higher is better" in text
    assert "lower is better" in text


def test_verdict_is_computed(text, content):
    assert "<b>AdamW</b> has the lowest NLL (0.1500 nats) and the lowest ECE (20.00%)" in text
    assert "<b>IVON, 64 samples</b> has the highest accuracy (25.00%)" in text
    metrics = content["entries"][0].metrics
    worse = change(content, 0, metrics=metrics | {"nll": 9.0, "ece": math.nan})["entries"]
    assert verdict(worse)[0] == (
        ["SGD"],
        ["the lowest NLL (0.2000 nats)", "the lowest ECE (25.00%)"],
    )
    tied = change(content, 1, metrics=metrics)["entries"]
    assert verdict(tied)[0][0] == ["AdamW", "SGD"]
    assert verdict(content["entries"][:1]) == []


def test_lead_is_paired_over_images(text, content):
    nll = [-e.probs.double()[range(400), content["targets"]].log() for e in content["entries"]]
    first, second = sorted(range(4), key=lambda i: float(nll[i].mean()))[:2]
    gap = (nll[second] - nll[first]).numpy()
    assert f"by {gap.mean():.4f} ± {gap.std() / 20:.4f} nats" in text
    assert f"<b>{LABELS[first]}</b> beats <b>{LABELS[second]}</b>" in text


def test_further_metrics_get_a_column_without_a_best(content, tmp_path):
    metrics = content["entries"][0].metrics | {"aurc": 0.0125}
    page = write_comparison(tmp_path / "r.html", **change(content, 0, metrics=metrics)).read_text()
    assert "aurc" in page
    assert "<td>0.0125</td>" in page


def plain_ece(probs, targets, bins=20):
    """From the definition, image by image, in plain Python: right-closed bins."""
    held = [[] for _ in range(bins)]
    for row, target in zip(probs.double().tolist(), targets.tolist(), strict=True):
        place = next(b for b in range(bins) if max(row) <= (b + 1) / bins or b == bins - 1)
        held[place].append((max(row), row.index(max(row)) == target))
    gaps = (abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in held)
    return sum(gaps) / len(targets)


def test_ece_in_the_figure_matches_the_definition(text, content):
    shown = [
        line.split()[1] for line in Page(text).texts if line.startswith("ECE ") and "%" in line
    ]
    expected = [plain_ece(e.probs, content["targets"]) for e in content["entries"]]
    assert shown == [f"{100 * value:.2f}%" for value in expected]


def test_confidence_on_an_edge_falls_into_the_lower_bin(content, tmp_path):
    """0.75 (wrong) and 0.7 (right) share no bin: (0.70, 0.75] and (0.65, 0.70]."""
    rest = 0.25 / 9, 0.3 / 9
    rows = [[0.75, *[rest[0]] * 9], [0.7, *[rest[1]] * 9]]
    small = comparison(n=2)
    small["targets"] = torch.tensor([1, 0])
    probs = torch.tensor(rows, dtype=torch.float64)
    page = write_comparison(tmp_path / "r.html", **change(small, 3, probs=probs)).read_text()
    assert "ECE 52.50%" in page  # (0.75 + 0.3) / 2; one common bin would give 22.5 %


def test_gallery_holds_the_highest_entropies_and_losses_in_order(text, content):
    probs, targets = content["entries"][-1].probs.double().numpy(), content["targets"].numpy()
    entropy = -(probs * np.log(probs)).sum(1)
    loss = -np.log(probs[np.arange(len(probs)), targets])
    chosen = {*np.argsort(-entropy)[:160].tolist(), *np.argsort(-loss)[:80].tolist()}
    expected = sorted(chosen, key=lambda i: -entropy[i])
    page = Page(text)
    assert [int(i) for i in page.having("data-index")] == expected
    assert np.allclose(
        [float(v) for v in page.having("data-entropy")], entropy[expected], rtol=1e-5
    )
    assert np.allclose([float(v) for v in page.having("data-loss")], loss[expected], rtol=1e-5)
    right = (probs.argmax(1) == targets)[expected]
    assert [a == "right" for a in page.having("data-answer")] == right.tolist()
    marks = [line for line in page.texts if line in ("✓ right", "✗ wrong")]
    assert [line == "✓ right" for line in marks] == right.tolist()
    alts = [f"Test image {i}, {CLASSES[targets[i]]}" for i in expected]
    assert page.having("alt") == alts
    hidden = ["hidden" in a for tag, a in page.tags if tag == "li" and "data-index" in a]
    assert hidden == [k >= 24 for k in range(len(expected))]


def test_risk_is_the_share_of_errors_among_the_surest(text, content):
    for e in content["entries"]:
        probs, targets = e.probs.double(), content["targets"]
        wrong = (probs.argmax(1) != targets)[probs.amax(1).argsort(descending=True)].double()
        told = (
            f"{e.label} errs in {wrong.mean():.2%} of all, {wrong[:320].mean():.2%} of the surest"
        )
        assert told in text


def test_risk_of_few_images_and_without_what_is_not_finite(content):
    few = [replace(e, probs=e.probs[:40].clone()) for e in content["entries"]]
    few[1].probs[7] = math.nan
    few[2].probs.fill_(math.nan)
    drawn, figure = [], figures.risk_curves

    def kept(name, curves):
        drawn.extend(curves)
        return figure(name, curves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "risk_curves", kept)
        found = panels.risk(few, content["targets"][:40])
    assert found["labels"] == [LABELS[k] for k in (0, 1, 3)]
    assert [len(shares) for _, shares, _ in drawn] == [40, 39, 40]
    for _, shares, errors in drawn:
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert all(0 <= e <= 1 for e in errors)


def test_a_single_row_is_not_judged_against_others(content, tmp_path):
    one = content | {"entries": content["entries"][-1:]}
    text = write_comparison(tmp_path / "r.html", **one).read_text()
    assert "tried on 400 test images" in text
    assert "No row leads" not in text


def test_layers_say_what_the_posterior_holds(content, tmp_path):
    """Of m = 2 and σ = 1 but for a quarter of σ = 4 all numbers are known."""
    mean = {"10.w": torch.full((4, 10), 2.0), "2.w": torch.zeros(3), "none": torch.empty(0)}
    precision = {n: torch.ones_like(m) for n, m in mean.items()}
    precision["10.w"][0] = 1 / 16
    posterior = Posterior(mean, precision, prior_precision=0.5, ess=10)
    found = layers(posterior, ["2.w", "10.w", "none", "not trained"])
    assert [layer.name for layer in found] == ["2.w", "10.w"]
    zero, wide = found
    assert (zero.weight, zero.noise, zero.lost) == (0, 1, 1)
    assert (wide.weight, wide.lost) == pytest.approx((2, 0.25))
    assert wide.noise == pytest.approx(math.sqrt((3 + 16) / 4))
    assert wide.prior == pytest.approx(0.5 * (3 + 16) / 4)
    halves = [math.log10(0.5), math.log10(2)]
    assert wide.quantiles == pytest.approx((halves[0], *[halves[1]] * 4))
    path = tmp_path / "r.html"
    write_comparison(path, **change(content, 3, layers=found))
    page = Page(path.read_text())
    assert "The posterior of IVON, 64 samples, layer by layer" in page.texts
    assert {"2.w", "10.w", "4 × 10", "25.0%", "100.0%"} <= {*page.texts}


def test_hostile_names_are_shown_as_they_are(content, tmp_path):
    hostile = content | {
        "title": HOSTILE[0],
        "class_names": [HOSTILE[k % 4] + str(k) for k in range(10)],
        "provenance": dict.fromkeys(HOSTILE, HOSTILE[2]),
        "ood_name": HOSTILE[1],
        "data_name": HOSTILE[3],
        "entries": [replace(e, label=h) for e, h in zip(content["entries"], HOSTILE, strict=True)],
    }
    page = Page(write_comparison(tmp_path / "r.html", **hostile).read_text())
    assert [tag for tag, a in page.tags if tag == "script" or "onerror" in a] == ["script"]
    assert len(page.having("src")) == len(page.having("data-index")) > 24
    assert page.texts.count(HOSTILE[0]) >= 4
    assert page.texts.count("a$b$") >= 4


def test_same_content_same_bytes(content, text, tmp_path):
    again = write_comparison(tmp_path / "r.html", **comparison())
    assert again.read_text(encoding="utf-8") == text


def test_full_size_stays_small(tmp_path):
    path = write_comparison(tmp_path / "r.html", **comparison(n=10_000, m=10_000))
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("side", [32, 64, 224])
def test_colour_images_stay_small(tmp_path, side):
    """Of noise, which nothing makes smaller."""
    noise = torch.randint(256, (1, side, side, 3), dtype=torch.uint8).expand(10_000, -1, -1, -1)
    content = sensitivity(n=10_000) | {"images": noise}
    path = write_sensitivity(tmp_path / "r.html", **content)
    assert path.read_text().count("data:image/") == 240 + 24
    assert path.stat().st_size < 5_000_000


def test_large_pictures_are_kept_as_small_as_they_are_shown(content, tmp_path):
    large = content | {"images": torch.zeros(400, 300, 200, 3, dtype=torch.uint8)}
    text = write_comparison(tmp_path / "r.html", **large).read_text()
    images = [src.split(",")[1] for src in Page(text).having("src")]
    sizes = {Image.open(io.BytesIO(base64.b64decode(image))).size for image in images}
    assert sizes == {(56, 84)}


@pytest.mark.filterwarnings("error")
def test_a_run_that_diverged_is_shown_with_dashes(content, tmp_path):
    nan = torch.full((400, 10), math.nan)
    lost = change(
        content,
        3,
        metrics={"accuracy": math.nan, "nll": math.inf},
        curve={"epoch": [1], "train_loss": [math.nan], "test_nll": [math.inf]},
        probs=nan,
        ood_probs=nan,
    )
    page = write_comparison(tmp_path / "r.html", **lost).read_text()
    assert page.count("<td>–</td>") == 8
    assert "ECE –" in page
    assert "AUROC –" in page
    assert page.count("no finite predictions") == 4  # two figures, each in sight and to the ear
    assert Page(page).having("data-index") == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probs": torch.ones(399, 10)}, r"entry 'SGD': probs: .*\(400, 10\), got .*\(399, 10\)"),
        ({"probs": torch.ones(400, 9)}, "entry 'SGD': probs"),
        ({"ood_probs": torch.ones(300, 9)}, "entry 'SGD': ood_probs"),
        ({"ood_probs": torch.ones(0, 10)}, "entry 'SGD': ood_probs"),
        ({"curve": {"epoch": [1.0], "train_loss": [], "test_nll": [1.0]}}, "entry 'SGD': curve"),
        ({"curve": {"epoch": [1.0]}}, "entry 'SGD': curve"),
        ({"label": "AdamW"}, "labels must differ"),
    ],
)
def test_a_wrong_entry_is_named(content, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path / "r.html", **change(content, 1, **fields))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("targets", torch.zeros(399, dtype=torch.int64)),
        ("targets", torch.zeros(400)),
        ("targets", torch.full((400,), 10)),
        ("images", torch.zeros(400, 28, 28)),
        ("images", torch.zeros(399, 28, 28, dtype=torch.uint8)),
        ("entries", []),
    ],
)
def test_wrong_data_is_named(content, tmp_path, key, value):
    with pytest.raises(ValueError, match=r"targets|images|at least one entry"):
        write_comparison(tmp_path / "r.html", **content | {key: value})


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_failure_leaves_the_old_file(content, tmp_path, monkeypatch, step):
    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    path = tmp_path / "r.html"
    path.write_text("old")
    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_comparison(path, **content)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "old"
