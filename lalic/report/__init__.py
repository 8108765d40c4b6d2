"""One self-contained HTML page for one evaluation: tables, curves, BD-rate, and pictures to look at.

cli.py is the command, page.py puts the page together, from tables.py (numbers), chart.py (curves as SVG),
pictures.py (what is embedded, and how) and viewer.py (pictures to compare); page.css and page.js are built in.
"""

from lalic.report.page import write_report
from lalic.report.pictures import PictureOptions

__all__ = ["PictureOptions", "write_report"]
