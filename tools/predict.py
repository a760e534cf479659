"""What trained weights make of images: `python tools/predict.py CHECKPOINT IMAGE...`, with --features their features.

CHECKPOINT is a finished run's directory, a file of its weights/, a checkpoint of DDP or FSDP2 (checkpoints/step-N), a
directory that tools/export.py wrote, `timm:NAME`, or a safetensors file of a model of timm's with `--model NAME`. IMAGE
is a file, a folder (with the folders in it), or `-` for paths on standard input, one a line.

Exit code 0: done; 1: done, but for images that could not be read, which are named; 2: it cannot be done, and why.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.data.loading import Loading, serve_workers
from pipeline.predict import load_checkpoint
from pipeline.predict.answers import Answer, answered, check_classifier, opened
from pipeline.predict.feature_files import check_output, write_features
from pipeline.predict.find import check_device
from pipeline.predict.names import readable
from pipeline.predict.pictures import find_images
from shards.classes import load_classes
from shards.errors import UserError
from shards.files_reader import FilesReader
from shards.progress import Progress
from shards.reader import BadSample
from shards.text import one_line

FEW = 256  # images that are done before workers would have started
WORKERS = 2
SHOWN = 40  # characters of a class's name in the table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code, 130 after Ctrl-C, 141 where stdout is closed."""
    try:
        return _run(_parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the lines has had enough; what is buffered goes nowhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a run, its weights or checkpoint, an export, timm:NAME, or a file")
    add("images", nargs="+", metavar="IMAGE", help="files, folders, - for paths on standard input")
    add(
        "--model",
        default="",
        metavar="NAME",
        help="of timm's registry: CHECKPOINT is a safetensors file of its weights",
    )
    add("--classes", metavar="LIST", help="names of the classes: 1k, 21k-p, or a text file with one a line")
    add("--top-k", type=int, default=1, metavar="K", help="the K likeliest classes (default: 1)")
    add("--json", action="store_true", help="a JSON object a line, in the order of the images")
    add(
        "--features",
        type=Path,
        metavar="FILE",
        help="write features to FILE.npz or FILE.safetensors, in place of classes",
    )
    add("--batch", type=int, default=32, metavar="B", help="images of a forward pass (default: 32)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help=f"processes that decode (default: {WORKERS}; of {FEW} images or fewer 0)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where there is one")
    return parser


def _run(options: argparse.Namespace) -> int:
    _check(options)
    files = _files(options.images)
    classes = None if options.classes is None else load_classes(options.classes)
    asked = load_checkpoint(options.checkpoint, options.model, classes)
    loading = _loading(options, len(files))
    asked.model.to(loading.device)
    if not options.features:
        check_classifier(asked)
    bad: list[BadSample] = []
    progress = Progress("predicting", len(files)) if len(files) > FEW else nullcontext()
    with progress as shown, opened(asked, files, options.batch, loading) as batches:
        watched = _watched(batches, shown, bad)
        if options.features:
            heads = write_features(asked, watched, files.paths, options.features)
        else:
            _print_answers(files.paths, answered(asked, watched, options.top_k), options.json)
    if options.features:
        widths = ", ".join(f"{tensor.shape[1]} of head {name}" for name, tensor in heads.items())
        print(f"{options.features}: features of {len(files) - len(bad)} images: {widths}")
    if bad:
        print(f"{len(bad)} of {len(files)} images could not be read", file=sys.stderr)
    return 1 if bad else 0


def _check(options: argparse.Namespace) -> None:
    for name, least in {"top_k": 1, "batch": 1, "workers": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be {least} or more")
    check_device(options.device)
    if options.features:
        check_output(options.features)


def _files(paths: Sequence[str]) -> FilesReader:
    given = [path for name in paths for path in (_standard_input() if name == "-" else [name])]
    found = find_images(given)
    return FilesReader("the images", found, np.zeros(len(found), dtype=np.int64))


def _standard_input() -> Iterator[str]:
    for line in sys.stdin:
        if path := line.rstrip("\r\n"):
            yield path


def _loading(options: argparse.Namespace, num_images: int) -> Loading:
    workers = options.workers if options.workers is not None else WORKERS if num_images > FEW else 0
    if workers:
        serve_workers()
    return Loading(workers, torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"))


def _watched(batches: Iterable[Batch], progress: Progress | None, bad: list[BadSample]) -> Iterator[Batch]:
    """The batches; what could not be read of them is named, and goes into `bad`."""
    for batch in batches:
        for error, _ in batch.bad:
            print(f"{one_line(error.key)}: cannot be read: {one_line(error.reason)}", file=sys.stderr)
            bad.append(error)
        yield batch
        if progress:
            progress.advance(len(batch.ids))


def _print_answers(paths: Sequence[str], given: Iterable[Answer | BadSample], as_json: bool) -> None:
    """As they come."""
    for path, answer in zip(paths, given, strict=True):
        if as_json:
            print(_json_line(path, answer))
        elif not isinstance(answer, BadSample):
            print(_table_rows(path, answer))
    sys.stdout.flush()


def _json_line(path: str, answer: Answer | BadSample) -> str:
    return json.dumps({"image": path} | ({"error": answer.reason} if isinstance(answer, BadSample) else answer))


def _table_rows(path: str, answer: Answer) -> str:
    """A row a class: the probability, its name, and in the first the image."""
    rows = [_row(found) for found in answer.get("top", [answer])]
    return "\n".join([f"{rows[0]}  {one_line(path)}", *(row.rstrip() for row in rows[1:])])


def _row(answer: Answer) -> str:
    name, words = answer["pred_class"], readable(answer["pred_class"])
    shown = one_line(f"{name} {words}" if words else name)
    return f"{answer['pred_score']:7.2%}  {shown[:SHOWN]:{SHOWN}}"


if __name__ == "__main__":
    sys.exit(main())
