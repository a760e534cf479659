"""Where weights come from: `python tools/provenance.py PATH` prints the stages of the chain that led to them, the files
that each left, and the data it was made of, back to the first. PATH is a stage's directory, or a file in it.

--shards lists the shards with their hashes, --check compares what is still there with what was noted, and names the
rest.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.chain import lineage
from shards.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: printed, and nothing differs; 1: something does; 2: there is no provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--shards", action="store_true", help="list the shards, too")
    parser.add_argument("--check", action="store_true", help="hash the files that are there, and read the indexes")
    options = parser.parse_args(argv)
    try:
        found = lineage.find(options.path)
        print("\n".join(lineage.lines(found, options.shards)))
        differences = list(lineage.check(found)) if options.check else []
        missing = list(lineage.missing(found)) if options.check else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in missing:
        print(f"not there to be compared: {name}")
    for difference in differences:
        print(f"differs: {difference}")
    if options.check and not differences:
        print("everything that is still there is as it was noted")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
