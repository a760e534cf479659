"""How often trained weights are right: `python tools/evaluate.py CHECKPOINT DATA`, alone or under a launcher:

    accelerate launch --config_file ds_configs/ddp_gpu8.yaml tools/evaluate.py CHECKPOINT DATA

CHECKPOINT is a finished run's directory or a checkpoint of DDP or FSDP2 on the way, checkpoints/step-N (both the raw
and the averaged weights), a file of a run's weights/, a directory that tools/export.py wrote, `timm:NAME`, or a
safetensors file of a model of timm's with `--model NAME`. DATA is a directory of shards or its URL, or a directory of
class folders. Classes are matched by their names; names that are numbers ("0" to "999", as in ImageNet-V2) are labels.
Scores are of all the checkpoint's classes, also where the data has only some of them.

Exit code of a rank 0: done, 75: stopped by a signal, 2: it cannot be done, and why, 1: a defect.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

from pipeline.backend import World
from pipeline.data.batch import PADDING, Batch
from pipeline.data.loading import serve_workers
from pipeline.launch import launch
from pipeline.predict.checkpoint import Checkpoint
from pipeline.predict.evaluation import REAL, Scores, Settings, evaluate, open_images
from pipeline.predict.find import check_device, load_variants
from pipeline.recipe import Runtime
from shards.classes import load_classes
from shards.errors import UserError
from shards.plan import evaluation_share
from shards.progress import Progress
from shards.store import StoreOptions
from shards.text import one_line

PRECISIONS = ("fp32", "bf16", "bf16-pure", "fp16")
_MAX_LISTED = 20
_COLUMNS = {"top1": "top-1", "top5": "top-5", "loss": "loss", REAL: "ReaL top-1"}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line, and exits with its code."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # As a dry run, which is not watched and leaves nothing behind.
    launch(lambda world: _evaluate(options, world), Runtime(device=options.device), Path(), dry=True)


def _parser() -> argparse.ArgumentParser:
    store = StoreOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a run, its weights or checkpoint, an export, timm:NAME, or a file")
    add("data", metavar="DATA", help="shards, by their directory or URL, or a directory of class folders")
    add(
        "--model",
        default="",
        metavar="NAME",
        help="of timm's registry: CHECKPOINT is a file of its weights",
    )
    add("--classes", metavar="LIST", help="names of the checkpoint's classes: 1k, 21k-p, or a text file, one a line")
    add("--split", default="", metavar="NAME", help="of shards (default: the one that the run evaluated on, else val)")
    add("--real", type=Path, metavar="FILE", help="ReaL's real.json: also how often the class is one of its labels")
    add("--batch", type=int, metavar="B", help="images of a forward pass (default: as the run had it, else 256)")
    add("--workers", type=int, default=2, metavar="N", help="processes a rank that decode (default: 2)")
    add("--precision", choices=PRECISIONS, help="arithmetic (default: as the run had it, else fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where there is one")
    add("--remote", choices=("cache", "range"), default=store.remote, help="whole shards of a URL, or a range a sample")
    add("--cache", default=store.cache, metavar="DIR", help="where shards of a URL are kept")
    add("--cache-size", default=store.cache_size, metavar="SIZE", help="most bytes of them")
    add("--json", action="store_true", help="one JSON object, by the names that metrics.jsonl has")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, least in {"batch": 1, "workers": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: it must be {least} or more")
    check_device(options.device)


def _evaluate(options: argparse.Namespace, world: World) -> str:
    """The outcome; rank 0 prints the scores."""
    if options.workers:
        serve_workers()
    classes = None if options.classes is None else load_classes(options.classes)
    variants = load_variants(options.checkpoint, options.model, classes)
    asked = next(iter(variants.values()))
    store = StoreOptions(options.remote, options.cache, options.cache_size)
    images = open_images(options.data, options.split, asked, store)
    start, stop = evaluation_share(len(images.reader), world.rank, world.size)
    progress = partial(Progress, "evaluating", stop - start) if world.is_main else nullcontext
    scores = evaluate(variants, images, _settings(options, asked), world, lambda batches: _watched(batches, progress))
    if scores is None:
        return "requeue"
    if world.is_main:
        _print(options, images.where, variants, scores)
    return "done"


def _settings(options: argparse.Namespace, asked: Checkpoint) -> Settings:
    given = {"batch": options.batch, "precision": options.precision, "real": options.real}
    defaults = Settings.of(asked.recipe, options.workers)
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _watched(batches: Iterable[Batch], progress: Callable[[], AbstractContextManager]) -> Iterator[Batch]:
    with progress() as shown:
        for batch in batches:
            yield batch
            if shown:
                shown.advance(int((batch.ids != PADDING).sum()))


def _print(options: argparse.Namespace, where: str, variants: Mapping[str, Checkpoint], scores: Scores) -> None:
    for error in scores.bad[:_MAX_LISTED]:
        print(one_line(f"unreadable, counted as wrong: {error.shard}: {error.key}: {error.reason}"), file=sys.stderr)
    if options.json:
        print(json.dumps(_facts(options, where, variants, scores)))
    else:
        print("\n".join(_table(where, variants, scores)))


def _facts(options: argparse.Namespace, where: str, variants: Mapping[str, Checkpoint], scores: Scores) -> dict:
    asked, real = next(iter(variants.values())), scores.real
    facts = {
        "weights": {prefix: checkpoint.name for prefix, checkpoint in variants.items()},
        "data": options.data,
        "samples": scores.num_samples,
        "classes": scores.classes,
        "checkpoint_classes": asked.num_classes,
        "matched_by": scores.matched,
    }
    facts |= {"real_images": real.num_samples, "real_left_out": real.num_left_out} if real else {}
    return facts | scores.values


def _table(where: str, variants: Mapping[str, Checkpoint], scores: Scores) -> Iterator[str]:
    asked, real = next(iter(variants.values())), scores.real
    for prefix, checkpoint in variants.items():
        yield one_line(f"{prefix.rstrip('_') or 'weights'}: {checkpoint.name}")
    yield one_line(
        f"data: {where}: {scores.num_samples:,} images, {scores.values['unreadable']:.0f} of them unreadable"
    )
    named = f", which {asked.named} names" if asked.classes and scores.matched == "name" else ""
    some = "all" if scores.classes == asked.num_classes else f"{scores.classes:,} of"
    yield f"classes: {some} the checkpoint's {asked.num_classes:,}{named}, matched by {scores.matched}"
    if real:
        yield f"ReaL: {real.num_samples:,} images have labels, {real.num_left_out:,} have none and are left out"
    columns = {name: title for name, title in _COLUMNS.items() if name != REAL or real}
    heads = [name.removesuffix("_top5") for name in scores.values if name.endswith("_top5")]
    yield f"{'':16}" + "".join(f"{title:>12}" for title in columns.values())
    for head in heads:
        yield f"{head.replace('_', ' '):16}" + "".join(_cell(name, scores.values[f"{head}_{name}"]) for name in columns)


def _cell(name: str, value: float) -> str:
    return f"{value:12.4f}" if name == "loss" else f"{value:12.2%}"


if __name__ == "__main__":
    main()
