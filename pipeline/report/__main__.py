"""One HTML page about runs, side by side: `python -m pipeline.report RUN... [-o FILE] [--price X]`.

Exit code 0: the page is written; 2: it cannot be, and why.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.report.page import write
from pipeline.status import check_is_run
from shards.errors import UserError

NAME = "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    arguments = _parser().parse_args(argv)
    runs: list[Path] = arguments.runs
    output = arguments.output or (runs[0] / NAME if len(runs) == 1 else Path(NAME))
    try:
        for run in runs:
            check_is_run(run)
        written = write(runs, output, arguments.price)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report",
        description="Write one self-contained HTML page about runs, side by side.",
        epilog="Exit code: 0 the page is written; 2 it cannot be.",
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, or a chain's with all of its stages")
    add("-o", "--output", type=Path, metavar="FILE", help=f"the page (default: RUN/{NAME}, of several runs {NAME})")
    add("--price", type=float, metavar="X", help="of an hour of one process (one GPU), in any currency")
    return parser


if __name__ == "__main__":
    sys.exit(main())
