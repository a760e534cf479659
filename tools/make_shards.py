"""Writes images as WebDataset tars with an index: `python tools/make_shards.py folder SOURCE OUT --split train`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError
from shards.sources import class_folders
from shards.writer import WriteOptions, write_split


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0, or 2 with a message on stderr for what the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        print(_folder(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write byte-reproducible WebDataset tars and their index.")
    sources = parser.add_subparsers(dest="kind", required=True, metavar="KIND", help="where the images come from")
    folder = sources.add_parser("folder", help="class folders: SOURCE/<class>/<image>.jpg|jpeg|png|webp")
    folder.add_argument("source", type=Path, metavar="SOURCE", help="directory with one folder a class")
    folder.add_argument("out", type=Path, metavar="OUT", help="directory for shards and index; splits may share it")
    folder.add_argument("--split", required=True, metavar="NAME", help="name of the split, such as train or val")
    folder.add_argument(
        "--shard-size",
        type=int,
        default=WriteOptions.shard_size,
        metavar="N",
        help="images a shard at most (default: %(default)s)",
    )
    folder.add_argument(
        "--seed",
        type=int,
        default=WriteOptions.seed,
        metavar="S",
        help="orders the samples over the shards (default: %(default)s)",
    )
    return parser


def _folder(arguments: argparse.Namespace) -> str:
    """Writes the split and returns the summary line."""
    start = time.perf_counter()
    options = WriteOptions(arguments.split, arguments.shard_size, arguments.seed)
    classes, samples = class_folders(arguments.source)
    written = write_split(classes, samples, arguments.out, options)
    seconds = time.perf_counter() - start
    counts = (
        f"{len(samples):,} images, {len(classes):,} classes, {len(written.split.shards):,} shards, "
        f"{written.split.num_bytes:,} bytes"
    )
    if written.already_complete:
        return f"{options.split}: already complete: {counts}"
    return f"{options.split}: {counts}, {len(samples) / seconds:,.0f} images/s, {seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
