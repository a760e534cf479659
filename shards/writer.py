"""Samples to byte-reproducible WebDataset tars: the same samples, seed and shard size give the same files.

Shards appear one by one, each whole; the offsets and the manifest come last, so an unfinished split never loads.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import ustar
from shards.durable import atomic_file, explained, locked, sync_directory
from shards.errors import UserError
from shards.images import BadImage, ImageHeader, read_header
from shards.index import MANIFEST, OFFSETS_DTYPE, Index, Shard, Split, manifest_bytes, offsets_name
from shards.plan import Permutation
from shards.progress import Progress
from shards.sources import Sample, listing_sha256

_MAX_BAD = 20
_MAX_LISTED = 5
_MAX_IMAGE_BYTES = 2**32 - 1  # the offsets' size field


@dataclass(frozen=True)
class WriteOptions:
    """`shard_size`: images a shard at most; `seed` orders the samples over the shards. UserError for bad values."""

    split: str
    shard_size: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.split):
            raise UserError(f"{self.split!r} cannot name a split: use letters, digits, '_' and '-', as in train")
        if self.shard_size < 1:
            raise UserError(f"a shard size of {self.shard_size} images: it must be at least 1")


@dataclass(frozen=True)
class Written:
    """The finished split; `already_complete` where it was there before and nothing was written."""

    split: Split
    already_complete: bool


class BadImages(UserError):
    """The images of a shard that cannot be written, one description each, in `images`."""

    def __init__(self, images: Sequence[str]) -> None:
        super().__init__("\n".join(images))
        self.images = tuple(images)


def write_split(classes: tuple[str, ...], samples: Sequence[Sample], out: Path, options: WriteOptions) -> Written:
    """Writes a split into OUT, beside those it may hold; one with the same source and options is left as it is.

    UserError for unreadable images (listed together), a full disk, another writer in OUT, a finished split of that
    name from another source or with other options, and class lists that differ between splits.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    made_from = _made_from(classes, samples, options)
    with locked(out):
        index = Index.load(out) if (out / MANIFEST).exists() else Index(out, classes, ())
        _check_classes(index, classes, options.split)
        finished = _finished(index, options.split, made_from)
        if finished:
            _marker(out, options.split).unlink(missing_ok=True)
            return Written(finished, already_complete=True)
        _begin(out, options.split)
        split = _write_files(classes, samples, out, options, made_from)
        _publish(index, split)
    return Written(split, already_complete=False)


@dataclass(frozen=True)
class _Part:
    """A finished shard, and the offsets of its samples."""

    shard: Shard
    offsets: NDArray[np.void]


def _write_shard(path: Path, samples: Sequence[Sample], classes: Sequence[str], done: Callable[[], None]) -> _Part:
    """Writes one shard and calls `done` after each sample. BadImages names every image of it that is none."""
    rows, bad = [], []
    with atomic_file(path) as file:
        for sample in samples:
            try:
                data, header = _load(sample)
            except BadImage as error:
                bad.append(f"{sample.path}: {error}")
            else:
                rows.append((file.num_bytes + ustar.BLOCK, len(data), sample.label))
                for member in _members(sample, data, header, classes[sample.label]):
                    file.write(member)
            done()
        if bad:
            raise BadImages(bad)
        file.write(ustar.END)
    shard = Shard(path.name, len(samples), file.num_bytes, file.sha256)
    return _Part(shard, np.array(rows, dtype=OFFSETS_DTYPE))


def _load(sample: Sample) -> tuple[bytes, ImageHeader]:
    try:
        data = sample.read()
    except OSError as error:
        raise BadImage(f"it cannot be read ({error.strerror})") from error
    if len(data) > _MAX_IMAGE_BYTES:
        raise BadImage(f"it has {len(data)} bytes, more than {_MAX_IMAGE_BYTES}")
    return data, read_header(data)


def _members(sample: Sample, data: bytes, header: ImageHeader, class_name: str) -> Iterator[bytes]:
    meta = {"filename": sample.filename, "height": header.height, "width": header.width, "wnid": class_name}
    # The image first: its offset and its header give the reader the bytes and the key.
    yield ustar.member(f"{sample.key}.{header.field}", data)
    yield ustar.member(f"{sample.key}.cls", str(sample.label).encode())
    yield ustar.member(f"{sample.key}.json", json.dumps(meta, sort_keys=True).encode())


def _made_from(classes: Sequence[str], samples: Sequence[Sample], options: WriteOptions) -> dict[str, str | int]:
    return {
        "images": len(samples),
        "source listing": listing_sha256(classes, samples),
        "shard size": options.shard_size,
        "seed": options.seed,
    }


def _check_classes(index: Index, classes: Sequence[str], split: str) -> None:
    missing = sorted(set(index.classes) - set(classes))
    extra = sorted(set(classes) - set(index.classes))
    if missing or extra:
        raise UserError(
            f"the classes of {split!r} differ from those of the splits in {index.root}: missing {_some(missing)}; "
            f"extra {_some(extra)}. All splits of one OUT share their class folders: mend SOURCE or choose another OUT."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (f", ... ({len(names)})" if len(names) > _MAX_LISTED else "") or "none"


def _finished(index: Index, name: str, made_from: Mapping[str, str | int]) -> Split | None:
    split = next((split for split in index.splits if split.name == name), None)
    if split is None or split.made_from == made_from:
        return split
    changes = [
        f"{what}: {split.made_from.get(what)} there, {value} asked"
        for what, value in made_from.items()
        if split.made_from.get(what) != value
    ]
    raise UserError(
        f"split {name!r} in {index.root} is finished, and was made from another source or with other options "
        f"({'; '.join(changes)}). Repeat those, or choose another OUT."
    )


def _marker(out: Path, split: str) -> Path:
    """While it exists, the split's shards in OUT are those of an unfinished run of this writer."""
    return out / f"{split}.unfinished"


def _begin(out: Path, split: str) -> None:
    """Removes what a killed run left of the split; refuses to overwrite shards that this writer did not begin."""
    shards = [path for path in out.iterdir() if re.fullmatch(rf"{split}-\d{{6,}}\.tar", path.name)]
    if shards and not _marker(out, split).exists():
        raise UserError(
            f"{out} holds {shards[0].name}, which is in no index here and would be overwritten; "
            "move it away or choose another OUT"
        )
    with atomic_file(_marker(out, split)):
        pass
    sync_directory(out)
    temporary = rf"({split}-\d{{6,}}\.tar|{split}\.offsets\.npy|index\.json)\.\d+\.tmp"
    for leftover in (*shards, *(path for path in out.iterdir() if re.fullmatch(temporary, path.name))):
        leftover.unlink()


def _write_files(
    classes: Sequence[str],
    samples: Sequence[Sample],
    out: Path,
    options: WriteOptions,
    made_from: Mapping[str, str | int],
) -> Split:
    with Progress(options.split, len(samples)) as progress:
        parts = _write_shards(_paths_and_samples(samples, out, options), classes, progress)
    with atomic_file(out / offsets_name(options.split)) as file:
        np.save(file, np.concatenate([part.offsets for part in parts]), allow_pickle=False)
    return Split(options.split, tuple(part.shard for part in parts), file.sha256, made_from)


def _paths_and_samples(
    samples: Sequence[Sample], out: Path, options: WriteOptions
) -> Iterator[tuple[Path, list[Sample]]]:
    """The samples of each shard: a permutation of all, cut into runs whose lengths differ by at most one."""
    order = Permutation(len(samples), options.seed)(np.arange(len(samples)))
    num_shards = -(-len(samples) // options.shard_size)
    for number, run in enumerate(np.array_split(order, num_shards)):
        yield out / f"{options.split}-{number:06d}.tar", [samples[position] for position in run]


def _write_shards(
    shards: Iterator[tuple[Path, list[Sample]]], classes: Sequence[str], progress: Progress
) -> list[_Part]:
    parts: list[_Part] = []
    bad: list[str] = []
    for path, samples in shards:
        try:
            parts.append(_write_shard(path, samples, classes, progress.advance))
        except BadImages as error:
            bad.extend(error.images)
        if len(bad) >= _MAX_BAD:
            break
    if bad:
        listed = "\n  ".join(bad[:_MAX_BAD])
        more = f" (the first {_MAX_BAD}; there may be more)" if len(bad) >= _MAX_BAD else ""
        raise UserError(f"unreadable images{more}; replace or remove them, then run again:\n  {listed}")
    return parts


def _publish(index: Index, split: Split) -> None:
    sync_directory(index.root)
    with atomic_file(index.root / MANIFEST) as file:
        file.write(manifest_bytes(index.classes, (*index.splits, split)))
    sync_directory(index.root)
    _marker(index.root, split.name).unlink()
