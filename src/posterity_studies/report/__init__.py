"""Self-contained HTML reports: one file, no script, no network, light and dark."""

from posterity_studies.report.claims import write_claims
from posterity_studies.report.comparison import write_comparison
from posterity_studies.report.entry import Entry
from posterity_studies.report.sensitivity import write_sensitivity

__all__ = ["Entry", "write_claims", "write_comparison", "write_sensitivity"]
