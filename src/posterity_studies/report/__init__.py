"""Self-contained HTML reports: one file, no network, light and dark, and whole without scripts."""

from posterity_studies.report.claims import write_claims
from posterity_studies.report.comparison import write_comparison
from posterity_studies.report.entry import Entry
from posterity_studies.report.merge import merged, write_merge
from posterity_studies.report.sensitivity import write_sensitivity

__all__ = [
    "Entry",
    "merged",
    "write_claims",
    "write_comparison",
    "write_merge",
    "write_sensitivity",
]
