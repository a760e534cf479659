"""Parquet files as the Hugging Face hub holds them: <split>-<i>-of-<n>.parquet, columns image {bytes, path} and label.

They are read in place, at the cost of a row group (100 images on the hub) an image in random order: `RowGroups`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from shards.classes import check_classes, some
from shards.errors import UserError
from shards.sources.base import Entry, Rejected
from shards.sources.rowgroups import RowGroups, label_names, read_rows

_FILE = re.compile(r"(\w+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")
_SPLITS = {"validation": "val"}
# The hub's names end in the class, ImageNet's own do not: n01440764_10026_n01440764, ILSVRC2012_val_00000001_n01751748.
_HUB_STEM = re.compile(r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})_(n\d{8})")
_WNID = re.compile(r"n\d{8}")
_MAX_UNNAMED = 100_000
_FIRST_ROWS = 256


@dataclass(frozen=True)
class Parquet:
    """`path` is the folder of the files, or holds it as `data`; a split is what the names of its files begin with.

    "validation" becomes "val"; a split that begins with rows without labels (-1, as the test split of imagenet-1k) is
    left out. Label i of the files is `classes[i]`; without `classes` what their ClassLabel names, or else i in five
    digits. Shards number the classes as `classes` does, without it in sorted order: their labels may differ from those
    of the files, their class names do not.
    """

    path: str
    classes: tuple[str, ...] | None = None

    in_order = False
    p_rule = None

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for files that are missing, damaged, of other columns or huge row groups, and for wrong classes."""
        splits = {name: files for name, files in _find(self.path).items() if _has_labels(files[0])}
        if not splits:
            raise UserError(f"no split in {self.path!a} has labels; give a data set that has some")
        for name, files in splits.items():
            _check_complete(name, files)
        names = _class_names([file for files in splits.values() for file in files], self.classes)
        for name, files in splits.items():
            labels = _Labels(name, names)
            for file in files:
                yield from labels.scan(file)

    def fetcher(self) -> RowGroups:
        return RowGroups()


# --- the set of files


class _File(NamedTuple):
    path: str
    number: int
    total: int


def _find(path: str) -> dict[str, list[_File]]:
    """The files of each split, in order."""
    root = os.path.abspath(path)
    for folder in (root, os.path.join(root, "data")):
        splits: dict[str, list[_File]] = {}
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if match := _FILE.fullmatch(name):
                file = _File(os.path.join(folder, name), int(match[2]), int(match[3]))
                splits.setdefault(_SPLITS.get(match[1], match[1]), []).append(file)
        if splits:
            return splits
    raise UserError(
        f"neither {root!a} nor its folder data holds files <split>-<5 digits>-of-<5 digits>.parquet, as the Hugging "
        "Face hub names them; give the folder of a downloaded data set"
    )


def _check_complete(split: str, files: Sequence[_File]) -> None:
    total, numbers = files[0].total, {file.number for file in files}
    if len(numbers) < len(files) or max(numbers) >= total or any(file.total != total for file in files):
        names = some([os.path.basename(file.path) for file in files])
        raise UserError(f"the files of split {split!a} are not of one set ({names}); keep those of one")
    missing = set(range(total)) - numbers
    if missing:
        prefix = os.path.basename(files[0].path).partition("-")[0]
        names = some([f"{prefix}-{number:05d}-of-{total:05d}.parquet" for number in missing])
        raise UserError(f"{len(missing)} of the {total} files of split {split!a} are missing: {names}; download them")


def _has_labels(first: _File) -> bool:
    labels = [label for _, label, _ in islice(read_rows(first.path), _FIRST_ROWS)]
    return not labels or any(map(_is_label, labels))


def _is_label(label: int | None) -> bool:
    return label is not None and label >= 0


# --- classes and names


def _class_names(files: Sequence[_File], classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of the labels 0, 1, ...; None where nobody gives any."""
    named = {names: file.path for file in files for names in [label_names(file.path)]}
    if len(named) > 1:
        first, second, *_ = named.values()
        raise UserError(f"{first!a} and {second!a} name their labels differently; keep the files of one data set")
    names = next(iter(named))
    if names is None or classes is None:
        return classes or names
    if set(names) == set(classes):
        return names
    # Names in words, as those of imagenet-1k, say no more than how many there are.
    if len(names) != len(classes) or all(map(_WNID.fullmatch, names)):
        check_classes(names, classes, ascii(files[0].path))
    return classes


class _Labels:
    """Turns the rows of a split's files, given in order, into entries."""

    def __init__(self, split: str, names: tuple[str, ...] | None) -> None:
        self._split, self._names, self._num_rows = split, names, 0

    def scan(self, file: _File) -> Iterator[Entry | Rejected]:
        for row, (offset, label, name) in enumerate(read_rows(file.path)):
            where = f"row {row} of {file.path!a}"
            if label is None or label < 0:
                yield Rejected(self._split, where, f"it has no label ({label})")
            else:
                class_name = self._class_name(label, where)
                own = self._own_name(os.path.basename(os.fsdecode(name or b"")), class_name, where)
                yield Entry(self._split, class_name, own, file.path, offset, 0)
            self._num_rows += 1

    def _class_name(self, label: int, where: str) -> str:
        limit = len(self._names) if self._names else _MAX_UNNAMED
        if label >= limit:
            raise UserError(f"{where} has label {label}, but there are {limit} classes; give --classes with all names")
        return self._names[label] if self._names else f"{label:05d}"

    def _own_name(self, name: str, class_name: str, where: str) -> str:
        """The file's name as ImageNet has it; a number where there is none."""
        if not name:
            return f"{self._split}_{self._num_rows:08d}.jpg"
        stem, suffix = os.path.splitext(name)
        match = _HUB_STEM.fullmatch(stem)
        if not match or not match[1].startswith((match[2], "ILSVRC")):
            return name
        if _WNID.fullmatch(class_name) and class_name != match[2]:
            raise UserError(
                f"{where} is named {name}, of class {match[2]}, and its label stands for {class_name}: the labels are "
                "not positions in this class list; give --classes a file with the classes in the order of the labels"
            )
        return match[1] + suffix
