"""One HTML page about runs: `python -m pipeline.report RUN...`, and `write` for whoever ends a chain."""

from pipeline.report.page import write

__all__ = ["write"]
