"""From run directories to tables, figures and pages. Reads records only; trains nothing.

Example:
  >>> from experiments import report
  >>> runs = report.read("runs/demo")  # doctest: +SKIP
  >>> print(report.markdown(runs))  # doctest: +SKIP
  >>> report.write(runs, "runs/demo/report", "Demo")  # doctest: +SKIP
"""

from experiments.report.drawing import png
from experiments.report.figures import accuracy, churn, density
from experiments.report.first_layer import first_layer, pixel_counts, unpack_mask
from experiments.report.main import main, show, write
from experiments.report.page import draw, page
from experiments.report.readme import fill
from experiments.report.runs import Run, read, read_run, split
from experiments.report.tables import Row, grids, group, markdown, rows, terminal, unfinished_text

__all__ = [
    "Row",
    "Run",
    "accuracy",
    "churn",
    "density",
    "draw",
    "fill",
    "first_layer",
    "grids",
    "group",
    "main",
    "markdown",
    "page",
    "pixel_counts",
    "png",
    "read",
    "read_run",
    "rows",
    "show",
    "split",
    "terminal",
    "unfinished_text",
    "unpack_mask",
    "write",
]
