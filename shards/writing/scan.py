"""From what a source finds to the listings of its splits: classes, unique keys, the rule of 21k-P, a minival."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.classes import check_classes
from shards.errors import UserError
from shards.keyed import Permutation
from shards.sources.base import PRule, Rejected, Source, sample_key
from shards.writing.collect import Collector, Found
from shards.writing.listing import Listing, Table, write_head

TRAIN, VAL, MINIVAL = "train", "val", "minival"


@dataclass(frozen=True)
class Minival:
    """A share of train, in (0, 1), that becomes a split of its own: as many of every class, drawn by `seed`."""

    share: float
    seed: int


@dataclass(frozen=True)
class Scanned:
    """The listings of the splits that have a place, the names of all, and the files that cannot be samples."""

    classes: tuple[str, ...]
    listings: Mapping[str, Listing]
    splits: tuple[str, ...]
    rejected: tuple[Rejected, ...]


def scan(
    source: Source, work: Path, place: Callable[[str], Path | None], minival: Minival | None, seen: Callable[[], None]
) -> Scanned:
    """Lists a source, each split in its existing directory `place(split)`, or nowhere where that is None.

    `work` is an empty directory for the while; `seen` is called at every image.
    UserError for a source without images, and for classes that are not those it must have. Memory: some 16 bytes an
    image, and the names of a class.
    """
    collector = Collector(work, seen)
    found = collector.collect(source)
    rejected = list(collector.rejected)
    if not found:
        reasons = "; ".join(f"{file.where}: {file.reason}" for file in rejected[:3])
        raise UserError(f"the source holds no images ({reasons or 'no file has their suffixes'}); is it the right one?")
    classes = _classes(source, found)
    outputs: dict[str, _Output | None] = {}
    for split, images in found.items():
        keys = _Keys(classes)
        cuts = _cuts(split, images.counts, classes, source.p_rule, minival)
        for label, name in enumerate(classes):
            rows, names = _unique(split, name, images, keys, rejected)
            for part, chosen in cuts(label, len(rows)).items():
                if part not in outputs:
                    directory = place(part)
                    outputs[part] = _Output(directory) if directory else None
                if output := outputs[part]:
                    output.append(name, label, rows[chosen], [names[i] for i in chosen])
    listings = {part: output.listing(classes, collector.containers) for part, output in outputs.items() if output}
    return Scanned(classes, listings, tuple(outputs), tuple(rejected))


def _classes(source: Source, found: Mapping[str, Found]) -> tuple[str, ...]:
    """The classes in order of their labels, checked against those that the source must have."""
    present = {split: _kept(split, images.counts, source.p_rule) for split, images in found.items()}
    if source.classes is None:
        return tuple(sorted(set().union(*present.values())))
    for split, names in present.items():
        check_classes(names, source.classes, f"split {split!r}")
    return source.classes


def _kept(split: str, counts: Mapping[str, int], rule: PRule | None) -> set[str]:
    if rule is None or split != TRAIN:
        return set(counts)
    kept = {name for name, count in counts.items() if count >= rule.min_images}
    if not kept:
        raise UserError(
            f"the largest of {len(counts)} classes has {max(counts.values())} images, and ImageNet-21k-P takes classes "
            f"of {rule.min_images} or more; is this the whole archive?"
        )
    return kept


_Cuts = Callable[[int, int], dict[str, NDArray[np.int64]]]  # label, number of images -> the positions by split


def _cuts(
    split: str, counts: Mapping[str, int], classes: Sequence[str], rule: PRule | None, minival: Minival | None
) -> _Cuts:
    if split != TRAIN:
        return lambda label, num: {split: np.arange(num)}
    num_val = rule.num_val if rule else 0
    num_train = sum(counts.get(name, 0) - num_val for name in classes)
    a_class = max(1, round(minival.share * num_train / len(classes))) if minival else 0

    def cut(label: int, num: int) -> dict[str, NDArray[np.int64]]:
        parts = {VAL: np.arange(min(num_val, num))} if num_val else {}
        train = np.arange(num_val, num)
        if minival and len(train) > 1:
            # At most half of a class, so that none loses its training images.
            drawn = Permutation(len(train), minival.seed, MINIVAL, label)(np.arange(min(a_class, len(train) // 2)))
            parts[MINIVAL] = train[np.sort(drawn)]
            train = np.delete(train, drawn)
        return {TRAIN: train, **parts}

    return cut


def _unique(
    split: str, class_name: str, images: Found, keys: "_Keys", rejected: list[Rejected]
) -> tuple[NDArray[np.void], list[bytes]]:
    rows, names = images.of_class(class_name)
    kept = []
    for position, name in enumerate(names):
        key = sample_key(class_name, name.decode())
        if keys.add(class_name, key):
            kept.append(position)
        else:
            reason = f"its key {key!a} is that of another file of the split"
            rejected.append(Rejected(split, ascii(f"{class_name}/{name.decode()}"), reason))
    return rows[kept], [names[position] for position in kept]


class _Keys:
    """The keys seen so far that may be seen again.

    A key begins with its class and "_". So only a class whose name begins so with another's can repeat keys of that
    class, and all other classes can be forgotten once they are done.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        names = set(classes)
        begun_by = {name: {name[:end] for end, letter in enumerate(name) if letter == "_"} & names for name in classes}
        self._related = {name for name, others in begun_by.items() if others}.union(*begun_by.values())
        self._kept: set[str] = set()
        self._class_name, self._seen = "", self._kept

    def add(self, class_name: str, key: str) -> bool:
        """Whether the key is new."""
        if self._class_name != class_name:
            self._class_name, self._seen = class_name, self._kept if class_name in self._related else set()
        new = key not in self._seen
        self._seen.add(key)
        return new


class _Output:
    """The listing of a split being written, class by class."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._digest = hashlib.sha256()
        self._table = Table(directory)

    def append(self, class_name: str, label: int, rows: NDArray[np.void], names: Sequence[bytes]) -> None:
        rows["label"] = label
        self._table.append(rows, names)
        prefix = class_name.encode() + b"/"
        for name, size in zip(names, rows["size"].tolist(), strict=True):
            self._digest.update(b"%s%s\0%d\n" % (prefix, name, size))

    def listing(self, classes: Sequence[str], containers: Sequence[str]) -> Listing:
        write_head(self._directory, classes, containers, self._digest.hexdigest())
        return Listing(self._directory)
