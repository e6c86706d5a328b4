"""Self-contained HTML reports: one file, no script, no network, light and dark."""

from posterity_studies.report.comparison import write_comparison
from posterity_studies.report.entry import Entry

__all__ = ["Entry", "write_comparison"]
