"""ReaL: the labels of ImageNet-1k's validation images made anew, several an image or none (Beyer et al., 2020).

Shapes: N samples of this rank, L labels of an image at most, B batch, C classes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backend import World
from pipeline.data.batch import UNREADABLE, Batch
from pipeline.predict.checkpoint import Checkpoint
from pipeline.predict.matching import match
from shards.classes import load_classes
from shards.errors import UserError
from shards.files_reader import FilesReader
from shards.members import MemberReader
from shards.plan import evaluation_share

NUM_IMAGES = 50_000
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")
_NO_LABEL = -1


@dataclass(frozen=True)
class Real:
    """Whether the likeliest class is one of an image's labels. `table` int64 [N, L] of the samples from `start` on,
    filled up with _NO_LABEL; over all ranks `num_samples` images have labels, and `num_left_out` none."""

    table: Tensor
    start: int
    num_samples: int
    num_left_out: int

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, C] -> float [B]."""
        labels = self.table[(batch.ids - self.start).clamp(min=0)].to(logits.device)  # what fills up does not count
        hits = (labels == logits.argmax(dim=1, keepdim=True)).any(dim=1)
        return (hits & (batch.labels != UNREADABLE)).float()


def read_real(path: Path, reader: MemberReader | FilesReader, asked: Checkpoint, world: World) -> Real:
    """The labels that `path`, ReaL's real.json, gives to the samples of this rank; their names say which images they
    are. Every rank calls it.

    Raises UserError where it is not that file, where a sample does not say which image it is, where the checkpoint does
    not have ImageNet-1k's classes, and where none of the images has a label.
    """
    lists = _parse(path)
    positions, _ = match(load_classes("1k"), asked, "ImageNet-1k, which --real is of,")
    start, stop = evaluation_share(len(reader), world.rank, world.size)
    rows = []
    for sample in range(start, stop):
        world.goes_on()  # names may lie in a slow store
        rows.append([positions[label] for label in lists[_number(reader, sample) - 1]])
    with_labels = sum(bool(row) for row in rows)
    num_samples, num_left_out = map(int, world.sum([with_labels, len(rows) - with_labels]))
    if not num_samples:
        raise UserError(f"--real {path}: it has no label for any of the {num_left_out} images; leave it out")
    longest = max(1, max((len(row) for row in rows), default=1))
    filled = [row + [_NO_LABEL] * (longest - len(row)) for row in rows or [[]]]
    return Real(torch.tensor(filled), start, num_samples, num_left_out)


def _parse(path: Path) -> list[list[int]]:
    if not path.is_file():
        raise UserError(f"--real {path}: no such file; real.json is in github.com/google-research/reassessed-imagenet")
    try:
        lists: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"--real {path} is no JSON ({error}): fetch it again") from error
    if not isinstance(lists, list) or len(lists) != NUM_IMAGES:
        found = f"a list of {len(lists)}" if isinstance(lists, list) else f"a {type(lists).__name__}"
        raise UserError(
            f"--real {path} is {found}, and ReaL's is a list of {NUM_IMAGES}: one an image of ImageNet-1k's validation "
            "split, in order of their numbers; give that file"
        )
    for number, labels in enumerate(lists, 1):
        if not (isinstance(labels, list) and all(type(label) is int and 0 <= label < 1000 for label in labels)):
            raise UserError(
                f"--real {path}: item {number} is {json.dumps(labels)[:80]}, and ReaL's are lists of labels from 0 to "
                "999; give that file"
            )
    return lists


def _number(reader: MemberReader | FilesReader, sample: int) -> int:
    """Which of the validation images it is, from 1 on."""
    for text in _names(reader, sample):
        found = _NAME.search(text)
        if found and 1 <= int(found[1]) <= NUM_IMAGES:
            return int(found[1])
    raise UserError(
        f"--real: sample {sample}, {reader.key(sample)!a}, does not say which image of ImageNet-1k's validation split "
        "it is: keys, or the json's filename, must hold names from ILSVRC2012_val_00000001 to ILSVRC2012_val_00050000"
    )


def _names(reader: MemberReader | FilesReader, sample: int) -> Iterator[str]:
    """What may name the image, the cheapest first."""
    if isinstance(reader, FilesReader):
        yield Path(reader.key(sample)).name
        return
    yield reader.key(sample)
    meta = reader.sample(sample).get("json", b"")
    yield meta.decode(errors="replace")
