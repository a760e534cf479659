"""Checks shards against their index, to the last byte: `python tools/check_shards.py DIR`.

Exit code 0: nothing is wrong, or there are warnings only; 1: errors were found; 2: it cannot be checked, and why.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.checking.check import CheckOptions, check_directory, read_manifest
from shards.checking.contact_sheet import write_contact_sheet
from shards.checking.findings import Finding, Report
from shards.checking.repair import repair_index
from shards.classes import load_classes
from shards.durable import atomic_file
from shards.engine import Engine, open_engine
from shards.errors import UserError

_MAX_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        with open_engine("local", arguments.workers) as engine:
            return _check(arguments, engine)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check shards against their index.",
        epilog="Exit code: 0 nothing is wrong, or warnings only; 1 errors were found; 2 it cannot be checked.",
    )
    add = parser.add_argument
    add("directory", type=_path, metavar="DIR", help="directory of shards and their index")
    add("--split", action="append", default=[], metavar="NAME", help="check only this one; may be repeated")
    decode = "decode all images, N of each split (a fixed choice), or none (default: %(default)s)"
    add("--decode", type=_count, default="1000", metavar="all|N|none", help=decode)
    add("--against", type=_path, metavar="OTHER", help="shards whose images should not be in DIR, as of a test set")
    add("--classes", default="", metavar="1k|21k-p|FILE", help="what the classes must be, in this order")
    add("--fail-on-duplicates", action="store_true", help="equal images are errors; else they are warnings")
    add("--report", type=_path, metavar="FILE", help="write counts and findings as JSON")
    add("--contact-sheet", type=_path, metavar="PNG", help="draw 64 samples with their labels")
    add("--seed", type=int, default=0, metavar="S", help="chooses them (default: %(default)s)")
    add("--repair-index", action="store_true", help="first make index.json and offsets anew from the tars")
    add("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    return parser


def _path(text: str) -> Path:
    """Absolute: other processes use it."""
    return Path(text).absolute()


def _count(text: str) -> int | None:
    if text == "all":
        return None
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither all, none nor a number of images")
    return 0 if text == "none" else int(text)


def _check(arguments: argparse.Namespace, engine: Engine) -> int:
    options = CheckOptions(
        splits=tuple(arguments.split),
        decode=arguments.decode,
        against=arguments.against,
        classes=arguments.classes,
        fail_on_duplicates=arguments.fail_on_duplicates,
    )
    if arguments.repair_index:
        classes = load_classes(options.classes) if options.classes else ()
        print("\n".join(f"repaired: {line}" for line in repair_index(arguments.directory, classes, engine)))
    report = check_directory(arguments.directory, options, engine)
    if arguments.report:
        with atomic_file(arguments.report) as file:
            file.write(report.to_json())
    print("\n".join(_summary(report)))
    if arguments.contact_sheet:
        index = read_manifest(arguments.directory)
        write_contact_sheet(index, tuple(report.splits), arguments.contact_sheet, arguments.seed)
    return 1 if report.num_errors else 0


def _summary(report: Report) -> list[str]:
    """A line for each split, for each check that found something, and for each of the first findings."""
    lines = []
    for name, split in report.splits.items():
        lines.append(
            f"{name}: {split.images:,} images, {split.shards:,} shards, {split.bytes:,} bytes; {split.decoded:,} "
            f"decoded; images a class: {split.fewest_images_a_class:,} to {split.most_images_a_class:,}, "
            f"median {split.median_images_a_class:,g}; {split.classes_without_images:,} classes without images"
        )
    # Errors first.
    findings = sorted(report.findings, key=lambda finding: not report.is_error(finding.check))
    lines += [_shown(report, finding) for finding in findings[:_MAX_SHOWN]]
    counts = sorted(report.counts.items(), key=lambda item: (not report.is_error(item[0]), item[0]))
    lines += [f"{'errors' if report.is_error(check) else 'warnings'}: {count:,} {check}" for check, count in counts]
    rates = f"{report.rates.images:,.0f} images/s, {report.rates.num_bytes / 1e6:,.0f} MB/s"
    lines.append(f"{report.num_errors:,} errors, {report.num_warnings:,} warnings; {rates}")
    return lines


def _shown(report: Report, finding: Finding) -> str:
    level = "error" if report.is_error(finding.check) else "warning"
    key = f": {finding.key!a}" if finding.key else ""
    return f"{level}: {finding.shard}{key}: {finding.check}: {finding.reason}"


if __name__ == "__main__":
    sys.exit(main())
