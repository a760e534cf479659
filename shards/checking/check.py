"""Whether a directory of shards is what its index says: every byte is read once, and what is wrong is told."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.checking.duplicates import (
    DigestTask,
    Namer,
    Place,
    Spill,
    digest_shard,
    find_duplicates,
    find_repeated_keys,
)
from shards.checking.findings import Findings, Report, SplitCounts
from shards.checking.sample import NO_LABEL
from shards.checking.shard import ShardResult, ShardTask, check_shard
from shards.classes import check_classes, load_classes, some
from shards.engine import Advance, Engine
from shards.errors import UserError
from shards.files import has_sha256
from shards.index import MANIFEST, Index, Split
from shards.keyed import Permutation
from shards.progress import Progress
from shards.tars.in_place import IN_PLACE

_SEED = 0
# Of duplicates, and of all else that is found outside of a shard's own pass, the first so many of each are kept.
_MAX_LISTED = 10_000
_LEFTOVERS = r".*\.tmp|.*\.unfinished|\.indexing|\.scan"


@dataclass(frozen=True)
class CheckOptions:
    """`splits`: (): all. `decode`: how many images of a split are decoded, drawn by a fixed seed; None: all.

    `against`: a directory of shards whose images should not be in this one. `classes`: the list that the classes must
    be, as for `load_classes`; "": any. UserError for bad values.
    """

    splits: tuple[str, ...] = ()
    decode: int | None = 1000
    against: Path | None = None
    classes: str = ""
    fail_on_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.decode is not None and self.decode < 0:
            raise UserError(f"{self.decode} images to decode: give a number from 0 on, or None for all")


def check_directory(directory: Path, options: CheckOptions, engine: Engine) -> Report:
    """Reads every shard of the chosen splits once, and compares it with the index.

    Memory does not grow with the number of images; the system's temporary directory takes 64 bytes of each, and 32 of
    each in `against`. UserError for a directory without a manifest that can be read, unknown splits, a class list that
    cannot be read, an `against` that is not whole, and a full disk.
    """
    root = directory.absolute()
    index = read_manifest(root)
    splits = tuple(index.split(name) for name in options.splits) or index.splits
    other = _load_other(root, options.against)
    findings = Findings(_MAX_LISTED)
    _check_classes(index, options.classes, findings)
    _check_strays(index, findings)
    counts = {split.name: _Counts(index) for split in splits}
    images, num_bytes = _totals((*splits, *other.splits))
    with tempfile.TemporaryDirectory() as scratch, Progress("checking", images, num_bytes) as progress:
        samples = _Samples(Path(scratch), index, splits, other)
        by_place: dict[int, Findings] = {}
        for result in engine.run(check_shard, _tasks(index, splits, options.decode, findings), progress.advance):
            by_place[result.place] = result.findings
            counts[samples.places[result.place].split].add(result)
            samples.add(result)
        for place in sorted(by_place):
            findings.extend(by_place[place])
        samples.compare(engine, progress.advance, findings)
    for name, tally in counts.items():
        tally.check(name, findings)
    return Report(
        directory=str(directory),
        against=str(options.against or ""),
        splits={name: tally.result() for name, tally in counts.items()},
        counts=findings.counts,
        findings=tuple(findings.listed),
        fail_on_duplicates=options.fail_on_duplicates,
        rates=progress.rates,
    )


def read_manifest(root: Path) -> Index:
    """The manifest alone: the files that it names may be missing or damaged. UserError where it is itself."""
    try:
        return Index.read(root)
    except UserError as error:
        if not root.is_dir():
            raise
        raise UserError(f"{error}; or, where all tars are there, rebuild it from them with --repair-index") from error


class _Counts:
    """What was read of a split."""

    def __init__(self, index: Index) -> None:
        self._classes = index.classes
        self._shards = self._images = self._bytes = self._decoded = 0
        self._images_a_class = np.zeros(index.num_classes, np.int64)

    def add(self, result: ShardResult) -> None:
        labels = result.images["label"]
        labels = labels[(labels >= 0) & (labels < len(self._classes))]
        self._images_a_class += np.bincount(labels, minlength=len(self._classes))
        self._images += len(result.images)
        self._shards += 1
        self._bytes += result.num_bytes
        self._decoded += result.num_decoded

    def check(self, split: str, findings: Findings) -> None:
        if empty := [self._classes[label] for label in np.flatnonzero(self._images_a_class == 0)]:
            findings.add("empty classes", split, "", f"{len(empty)} classes have no image: {some(empty)}")

    def result(self) -> SplitCounts:
        counts = self._images_a_class if len(self._classes) else np.zeros(1, np.int64)
        return SplitCounts(
            shards=self._shards,
            images=self._images,
            bytes=self._bytes,
            decoded=self._decoded,
            fewest_images_a_class=int(counts.min()),
            median_images_a_class=float(np.median(counts)),
            most_images_a_class=int(counts.max()),
            classes_without_images=int((counts == 0).sum()),
        )


class _Samples:
    """The digests of all images and keys, on disk. `places` are the shards, by number: ours, then those of `other`."""

    def __init__(self, scratch: Path, index: Index, splits: Sequence[Split], other: Index) -> None:
        self._images, self._keys = Spill(scratch / "images"), Spill(scratch / "keys")
        self._other = other
        self.places = [
            *(Place(index.root / shard.name, split.name, False) for split in splits for shard in split.shards),
            *(Place(other.root / shard.name, split.name, True) for split in other.splits for shard in split.shards),
        ]
        self._labels = {name: label for label, name in enumerate(index.classes)}
        theirs = [self._labels.setdefault(name, len(self._labels)) for name in other.classes]
        self._others_labels = np.array(theirs, np.int64)

    def add(self, result: ShardResult) -> None:
        self._images.add(result.images)
        self._keys.add(result.keys)

    def compare(self, engine: Engine, advance: Advance, findings: Findings) -> None:
        for rows in engine.run(digest_shard, self._tasks(), advance):
            labels = rows["label"]
            is_class = (labels >= 0) & (labels < len(self._others_labels))
            rows["label"] = np.where(is_class, self._others_labels.take(labels, mode="clip"), NO_LABEL)
            self._images.add(rows)
        namer = Namer(self.places, list(self._labels))
        find_repeated_keys(self._keys, namer, findings)
        find_duplicates(self._images, namer, findings)

    def _tasks(self) -> Iterator[DigestTask]:
        place = sum(not place.other for place in self.places)
        for split in self._other.splits:
            for rows in _by_shard(split, self._other.offsets(split.name)):
                yield DigestTask(place, self.places[place].path, rows)
                place += 1


def _load_other(root: Path, against: Path | None) -> Index:
    if against is None:
        return Index(root, (), ())
    if against.absolute().resolve() == root.resolve():
        raise UserError(f"--against {against} is the directory itself, whose images are compared anyway; give another")
    return Index.load(against.absolute())


def _totals(splits: Sequence[Split]) -> tuple[int, int]:
    return sum(split.num_samples for split in splits), sum(split.num_bytes for split in splits)


def _check_classes(index: Index, classes: str, findings: Findings) -> None:
    if not classes:
        return
    expected = load_classes(classes)
    try:
        check_classes(index.classes, expected, str(index.root))
    except UserError as error:
        findings.add("classes", MANIFEST, "", str(error))
    else:
        if index.classes != expected:
            findings.add("classes", MANIFEST, "", f"its classes are those of {classes}, in another order")


def _check_strays(index: Index, findings: Findings) -> None:
    shards = {shard.name for split in index.splits for shard in split.shards}
    offsets = {split.offsets_name for split in index.splits}
    for name in sorted(path.name for path in index.root.iterdir()):
        tar = name.removesuffix(".idx")
        if re.fullmatch(_LEFTOVERS, name):
            findings.add("stray", name, "", "a killed or running make_shards left it; let that finish, or remove it")
        elif tar.endswith(".tar") and tar not in shards:
            findings.add("stray", name, "", "the index does not name it; move it away, or --repair-index")
        elif name.endswith(".offsets.npy") and name not in offsets:
            findings.add("stray", name, "", "the index has no such split; remove it")


def _tasks(index: Index, splits: Sequence[Split], num_decoded: int | None, findings: Findings) -> Iterator[ShardTask]:
    place = 0
    for split in splits:
        rows = _rows(index, split, findings)
        by_shard = _by_shard(split, rows) if rows is not None else [None] * len(split.shards)
        decoded = _decoded(split, num_decoded)
        for shard, shard_rows, positions in zip(split.shards, by_shard, decoded, strict=True):
            by_us = IN_PLACE not in split.made_from
            yield ShardTask(place, index.root / shard.name, shard, shard_rows, index.classes, positions, by_us)
            place += 1


def _rows(index: Index, split: Split, findings: Findings) -> NDArray[np.void] | None:
    """The split's offsets, None where they cannot be read."""
    try:
        rows = index.offsets(split.name)
    except UserError as error:
        findings.add("offsets", split.offsets_name, "", str(error))
        return None
    if not has_sha256(index.root / split.offsets_name, split.offsets_sha256):
        findings.add("offsets", split.offsets_name, "", "it has not the SHA-256 that the index says; --repair-index")
    return rows


def _by_shard(split: Split, rows: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
    start = 0
    for shard in split.shards:
        yield np.array(rows[start : start + shard.num_samples])
        start += shard.num_samples


def _decoded(split: Split, number: int | None) -> Iterator[frozenset[int] | None]:
    """For each shard the positions that are decoded; None: all."""
    if number is None or split.num_samples < 1:
        yield from [None] * len(split.shards)
        return
    chosen = np.sort(Permutation(split.num_samples, _SEED, "decode")(np.arange(min(number, split.num_samples))))
    ends = np.cumsum([shard.num_samples for shard in split.shards])
    by_shard = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    for shard, end, inside in zip(split.shards, ends, by_shard, strict=True):
        yield frozenset((inside - (end - shard.num_samples)).tolist())
