"""Writes images as WebDataset tars with an index: `python tools/make_shards.py folder SOURCE OUT --split train`.

`python tools/make_shards.py --help` lists the kinds of sources, and `KIND --help` their options.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.classes import load_classes
from shards.engine import ENGINES, Engine, open_engine
from shards.errors import UserError
from shards.images import FORMATS, ImageOptions
from shards.index import Index
from shards.progress import Progress
from shards.sources.kinds import KINDS, Asked, Kind, open_source
from shards.sources.webdataset import WebDatasetTars, explain_21k_p
from shards.tars.in_place import ForeignOptions, index_in_place
from shards.writing.begin import Begun, Task
from shards.writing.options import WriteOptions
from shards.writing.scan import MINIVAL, TRAIN, VAL
from shards.writing.writer import Written, plan, read_report, report_path, write


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0, or 2 with a message on stderr for what the user can mend, 130 after
    Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        with open_engine(arguments.engine, arguments.workers) as engine:
            (_index if arguments.kind == "index" else _write)(arguments, engine)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, finished shards are kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write byte-reproducible WebDataset tars and their index.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", help="where the images come from")
    for name, kind in KINDS.items():
        command = kinds.add_parser(name, help=kind.help, description=f"Source: {kind.help}.")
        command.add_argument("source", type=os.path.abspath, metavar="SOURCE", help=kind.path)
        command.set_defaults(devkit="")
        if name == "ilsvrc-val":
            command.add_argument("devkit", type=os.path.abspath, metavar="DEVKIT", help="ILSVRC2012_devkit_t12.tar.gz")
        command.add_argument(
            "out", type=_path, metavar="OUT", help="directory for shards and index; splits may share it"
        )
        _add_split(command, kind)
        _add_options(command, kind)
        _add_image_options(command)
        _add_engine(command)
    command = kinds.add_parser("index", help="index WebDataset tars where they lie, without rewriting them")
    command.add_argument("directory", type=_path, metavar="DIR", help="directory of tars; the index is written into it")
    add = command.add_argument
    add("--split", default="", metavar="NAME", help="split of all tars (default: told from their names)")
    add("--classes", metavar="LIST", help=f"{_CLASSES} (default: those that the json names)")
    add("--label", default="", metavar="FIELD", help="field of the json that is the label (default: cls, else label)")
    add("--max-bad", type=int, default=0, metavar="N", help="samples that may be left out (default: %(default)s)")
    _add_engine(command)
    return parser


_CLASSES = "1k, 21k-p, or a text file with one class a line: the classes, in order of their labels"


def _path(text: str) -> Path:
    """Absolute: other processes and machines use it."""
    return Path(text).absolute()


def _add_split(command: argparse.ArgumentParser, kind: Kind) -> None:
    if kind.one_split:
        command.add_argument(
            "--split", nargs=1, required=True, metavar="NAME", help="name of the split, such as train or val"
        )
    else:
        command.add_argument(
            "--split", action="append", default=[], metavar="NAME", help="write only this one; may be repeated"
        )


def _add_options(command: argparse.ArgumentParser, kind: Kind) -> None:
    default = WriteOptions()
    add = command.add_argument
    where = f" for {kind.if_named[0]}" if kind.if_named else ""
    add("--classes", metavar="LIST", help=f"{_CLASSES} (default: {kind.classes or 'the sorted names'}{where})")
    add(
        "--shard-size",
        default=default.shard_size,
        metavar="N",
        help="about how many images, or bytes as in 500MB, a shard has (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=default.seed,
        metavar="S",
        help="orders the samples over the shards (default: %(default)s)",
    )
    add(
        "--minival",
        default=default.minival,
        metavar="P%",
        help="share of train, as in 1%%, that becomes the split minival, with as many images of every class",
    )
    add(
        "--max-bad",
        default=default.max_bad,
        metavar="N|P%",
        help="files that may be left out, as a count or a share (default: %(default)s)".replace(
            "%(default)s", default.max_bad.replace("%", "%%")
        ),
    )
    add(
        "--in-order",
        action="store_true",
        help="read the source once from front to back, where random reads are slow "
        "(a gzip archive always is); the shards are the same",
    )
    add("--dry-run", action="store_true", help="print what would be written, the room and the time, and write nothing")


def _add_image_options(command: argparse.ArgumentParser) -> None:
    default = ImageOptions()
    add = command.add_argument
    add(
        "--resize",
        default=default.resize,
        metavar="R",
        help="none, short:N (the shorter side, where larger) or "
        "squash:N (N x N; smaller images are left) (default: %(default)s)",
    )
    add(
        "--quality",
        type=int,
        default=default.quality,
        metavar="Q",
        help="of images that are encoded again (default: %(default)s)",
    )
    add("--restart-markers", action="store_true", help="insert JPEG restart markers, without loss, for faster crops")
    add(
        "--format",
        default=default.format,
        choices=FORMATS,
        help="encode images of another format again (default: %(default)s)",
    )
    add("--verify", action="store_true", help="decode also the images that are copied")


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    command.add_argument(
        "--engine",
        default="local",
        choices=ENGINES,
        help="ray: on the cluster at RAY_ADDRESS, whose "
        "machines see SOURCE and OUT under the same paths (default: %(default)s)",
    )


def _options(arguments: argparse.Namespace) -> WriteOptions:
    images = ImageOptions(
        resize=arguments.resize,
        quality=arguments.quality,
        restart_markers=arguments.restart_markers,
        format=arguments.format,
        verify=arguments.verify,
    )
    with_minival = [MINIVAL] if arguments.minival and arguments.split else []
    return WriteOptions(
        splits=(*arguments.split, *with_minival),
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        minival=arguments.minival,
        max_bad=arguments.max_bad,
        in_order=arguments.in_order,
        images=images,
    )


def _write(arguments: argparse.Namespace, engine: Engine) -> None:
    options = _options(arguments)
    one = KINDS[arguments.kind].one_split
    asked = Asked(arguments.source, arguments.classes, arguments.split[0] if one else "", arguments.devkit)
    source = open_source(arguments.kind, asked, arguments.out)
    if arguments.dry_run:
        begun = plan(source, arguments.out, options)
        print("\n".join(_planned(begun, task, arguments) for task in begun.tasks) or "nothing to write")
        return
    start = time.perf_counter()
    written = write(source, arguments.out, options, engine)
    seconds = time.perf_counter() - start
    images = sum(item.split.num_samples for item in written if not item.already_complete)
    print("\n".join(_described(arguments.out, item) for item in written))
    if isinstance(source, WebDatasetTars) and source.p_rule:
        print(_compared(source, arguments.out))
    if images:
        print(f"{images:,} images in {seconds:.1f} s, {images / seconds:,.0f} images/s")


def _planned(begun: Begun, task: Task, arguments: argparse.Namespace) -> str:
    workers = arguments.workers or len(os.sched_getaffinity(0))
    hours = task.cost.seconds * task.job.num_images / workers / 3600
    free = shutil.disk_usage(arguments.out).free
    return (
        f"{task.job.split}: {task.job.num_images:,} images, {begun.index.num_classes:,} classes, "
        f"{task.job.num_shards:,} shards, about {task.num_bytes / 1e9:,.3f} GB ({free / 1e9:,.1f} GB are free), "
        f"about {hours:,.2f} hours with {workers} processes; {len(begun.rejected):,} files cannot be samples"
    )


def _described(out: Path, written: Written) -> str:
    split, report = written.split, read_report(out, written.split.name)
    return (
        f"{split.name}: {'already complete: ' * written.already_complete}{split.num_samples:,} images, "
        f"{len(split.shards):,} shards, {split.num_bytes:,} bytes; {report['changed']:,} images were changed and "
        f"{report['dropped']:,} files left out: see {report_path(out, split.name)}"
    )


def _compared(source: WebDatasetTars, out: Path) -> str:
    """How the splits that there are compare with ImageNet-21k-P."""
    index = Index.load(out)
    there = [split.name for split in index.splits]
    counts: dict[str, list[int]] = {
        name: np.bincount(index.offsets(name)["label"], minlength=index.num_classes).tolist()
        if name in there
        else [0] * index.num_classes
        for name in (TRAIN, MINIVAL, VAL)
    }
    train = [sum(pair) for pair in zip(counts[TRAIN], counts[MINIVAL], strict=True)]
    return explain_21k_p(source, train, counts[VAL], sum(read_report(out, name)["dropped"] for name in there))


def _index(arguments: argparse.Namespace, engine: Engine) -> None:
    classes = load_classes(arguments.classes) if arguments.classes else ()
    options = ForeignOptions(arguments.split, arguments.label, classes, arguments.max_bad)
    with Progress("indexing") as progress:
        indexed = index_in_place(arguments.directory, options, engine, progress.advance)
    for split in indexed.index.splits:
        print(f"{split.name}: {split.num_samples:,} images, {len(split.shards):,} shards, {split.num_bytes:,} bytes")
    print(
        f"{indexed.index.num_classes:,} classes, {indexed.num_unnamed:,} of them known by their label alone; "
        f"{indexed.num_tars_read:,} tars were read; {indexed.num_left_out:,} samples left out"
    )
    print("".join(f"  {sample}\n" for sample in indexed.left_out), end="")


if __name__ == "__main__":
    sys.exit(main())
