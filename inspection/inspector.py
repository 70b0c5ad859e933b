"""The names that doctor takes from here; they lie in reports/text.py."""

from reports.text import paragraph, table

__all__ = ["paragraph", "table"]
