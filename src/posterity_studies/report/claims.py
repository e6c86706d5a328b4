"""The paper's claims beside ours, as one self-contained HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from posterity_studies.claims import Judged
from posterity_studies.report.comparison import PAGES, write_page


def write_claims(path: Path, found: Sequence[Judged], provenance: Mapping[str, str]) -> Path:
    """Write the page to `path`, whole or not at all, and return the path."""
    by_claim: dict[int, dict[str, Judged]] = {}
    for judged in found:
        by_claim.setdefault(id(judged.claim), {})[judged.scale] = judged
    rows = [{"claim": next(iter(scales.values())).claim, **scales} for scales in by_claim.values()]
    counts = Counter(judged.status for judged in found if judged.scale == "desk")
    text = PAGES.get_template("claims.html.jinja").render(
        title="The paper on your desk",
        rows=rows,
        counts={s: counts[s] for s in ("holds", "does not hold", "not yet run")},
        large=sum(j.scale == "paper" and j.status != "not yet run" for j in found),
        provenance=provenance,
    )
    return write_page(path, text)
