"""Index in place: `index.json` and offsets beside WebDataset tars that others wrote, which stay as they are."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.durable import explained, locked
from shards.engine import Advance, Engine
from shards.errors import UserError
from shards.files import has_sha256
from shards.index import MANIFEST, Index, Shard, Split, offsets_name, write_manifest, write_offsets
from shards.tars.contents import MAX_LISTED, TarIndex, TarTask, index_tar, read_record, two_names
from shards.writing.parts import work_directory

IN_PLACE = "indexed in place"  # the key by which `made_from` tells such a split
_LEFT_OUT = "left out of "
_WORK = ".indexing"
_SPLIT_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
# Labels tell how many classes there are; no label may tell of billions.
_MAX_CLASSES = 100_000


@dataclass(frozen=True)
class ForeignOptions:
    """`split`: that of every tar; "": their names tell. `label`: the field of json that is the label; "": cls, else
    `label` of json. `classes`, in order of their labels; (): those that json names. `max_bad`: how many samples may be
    left out. UserError for bad values."""

    split: str = ""
    label: str = ""
    classes: tuple[str, ...] = ()
    max_bad: int = 0

    def __post_init__(self) -> None:
        if self.split and not re.fullmatch(_SPLIT_NAME, self.split):
            raise UserError(f"{self.split!r} cannot name a split: use letters, digits, '_' and '-', as in train")
        if self.max_bad < 0:
            raise UserError(f"{self.max_bad} samples left out at most: it must be 0 or more")


@dataclass(frozen=True)
class Indexed:
    """The index, and what became of the tars. `left_out` describes the first samples that the index does not hold, of
    the tars read now; `num_left_out` counts those of all. `num_unnamed` classes are known by their label alone."""

    index: Index
    num_tars_read: int
    left_out: tuple[str, ...]
    num_left_out: int
    num_unnamed: int


def index_in_place(directory: Path, options: ForeignOptions, engine: Engine, advance: Advance) -> Indexed:
    """Indexes the tars of a directory that no split of make_shards holds; those splits stay.

    Tars are read once, several at a time; those that the index holds with their present size, under the same options,
    are not read again, nor those that an interrupted run has read. Memory does not grow with the number of samples.
    UserError for a directory without tars, names that tell no split, damaged tars, samples left out beyond the
    budget, labels that are two classes, classes other than those of splits that are there, and a full disk.
    """
    root = directory.absolute()
    tars = tars_in(root)
    with locked(root), explained(root):
        (root / _WORK).mkdir(exist_ok=True)
        indexing = _Indexing(root, options)
        tasks = indexing.plan(tars)
        for found in engine.run(index_tar, tasks, advance):
            indexing.add(found)
        if not indexing.is_current():
            indexing.publish()
        shutil.rmtree(root / _WORK)
    return indexing.result(len(tasks))


def split_of(name: str) -> str:
    """The split that a tar's name tells: imagenet1k-train-0000.tar and train-00000-of-00256.tar are of train.

    UserError where it tells none.
    """
    match = re.fullmatch(r"(?:.*-)?([A-Za-z0-9_]+)-\d+\.tar", re.sub(r"-of-\d+\.tar$", ".tar", name))
    if not match or not re.fullmatch(_SPLIT_NAME, match[1]):
        raise UserError(f"the name of {name!a} tells no split, as train-0000.tar would; give it with --split NAME")
    return match[1]


def tars_in(directory: Path) -> list[Path]:
    """The tars of a directory, by name; UserError where there is none."""
    if not directory.is_dir():
        raise UserError(f"the directory {directory} does not exist; give the one that holds the tars")
    # A link to nothing is taken for a tar, so that its absence is noticed.
    tars = sorted(path for path in directory.glob("*.tar") if not path.is_dir() and not path.name.startswith("."))
    if not tars:
        raise UserError(f"{directory} holds no .tar files; give the directory in which they lie, not one above it")
    return tars


@dataclass(frozen=True, eq=False)
class _Part:
    """What is known of a tar; `rows` are those of the index that there is, or the file of those found now."""

    shard: Shard
    rows: NDArray[np.void] | Path
    num_labels: int
    num_left_out: int

    @property
    def is_old(self) -> bool:
        return not isinstance(self.rows, Path)

    def load(self) -> NDArray[np.void]:
        return np.load(self.rows, allow_pickle=False) if isinstance(self.rows, Path) else self.rows


class _Indexing:
    """The index that there is, and the one that it becomes."""

    def __init__(self, root: Path, options: ForeignOptions) -> None:
        self._root, self._options = root, options
        self._old = Index.read(root) if (root / MANIFEST).exists() else Index(root, (), ())
        self._own = [split for split in self._old.splits if IN_PLACE not in split.made_from]
        self._known = _known_classes(self._old, self._own, options)
        classes = "those of the other splits" if self._own else "given" if self._known else "found"
        self._how = f"label: {options.label or 'cls or json'}; classes: {classes}"
        self._names = dict(enumerate(self._known))
        self._tars: dict[str, list[str]] = {}  # by split
        self._parts: dict[str, _Part] = {}  # by tar
        self._left_out: list[str] = []

    def plan(self, tars: Sequence[Path]) -> list[TarTask]:
        """The tars that must be read; of the others, all is known."""
        own = {shard.name for split in self._own for shard in split.shards}
        indexed = self._indexed()
        tasks = []
        for path in (path for path in tars if path.name not in own):
            self._tars.setdefault(self._split_of(path.name), []).append(path.name)
            part = indexed.get(path.name)
            if part and part.shard.num_bytes == path.stat().st_size:
                self._parts[path.name] = part
            else:
                num_classes = len(self._known) or _MAX_CLASSES
                tasks.append(TarTask(path, self._root / _WORK, self._options.label, num_classes))
        if self._parts:
            self._names.update((label, name) for label, name in enumerate(self._old.classes) if name != str(label))
        return [task for task in tasks if not self._has_record(task)]

    def _has_record(self, task: TarTask) -> bool:
        """Whether an interrupted run has read the tar; then takes what it found."""
        record = read_record(task)
        if record:
            self.add(record)
        return record is not None

    def add(self, found: TarIndex) -> None:
        """Takes what a pass found; UserError for a label of two names, and for too many samples left out."""
        for label, name in found.names.items():
            if self._names.setdefault(int(label), name) != name:
                raise two_names(int(label), self._names[int(label)], name, found.shard.name)
        rows = self._root / _WORK / f"{found.shard.name}.npy"
        self._parts[found.shard.name] = _Part(found.shard, rows, found.num_labels, found.num_left_out)
        self._left_out = [*self._left_out, *found.left_out][:MAX_LISTED]
        if len(self._left_out) == MAX_LISTED:
            self._check_budget()

    def is_current(self) -> bool:
        """Whether the index that there is says it all."""
        there = {split.name: [shard.name for shard in split.shards] for split in self._old.splits}
        tars = self._tars | {split.name: there[split.name] for split in self._own}
        return tars == there and all(part.is_old for part in self._parts.values())

    def publish(self) -> None:
        """Writes the offsets, then the manifest; removes the offsets of splits whose tars are gone."""
        self._check_budget()
        splits = [*self._own, *(self._split(name, tars) for name, tars in self._tars.items())]
        write_manifest(Index(self._root, self._classes(), tuple(splits)))
        for name in {split.name for split in self._old.splits} - {split.name for split in splits}:
            (self._root / offsets_name(name)).unlink(missing_ok=True)

    def result(self, num_read: int) -> Indexed:
        index = Index.load(self._root)
        num_unnamed = sum(name == str(label) for label, name in enumerate(index.classes))
        return Indexed(index, num_read, tuple(self._left_out), self._num_left_out, num_unnamed)

    @property
    def _num_left_out(self) -> int:
        return sum(part.num_left_out for part in self._parts.values())

    def _indexed(self) -> dict[str, _Part]:
        """What the index holds of tars that were indexed under the same options."""
        if self._known and self._known != self._old.classes:
            return {}
        parts = {}
        for split in self._old.splits:
            num_left_out = {shard.name: int(split.made_from.get(_LEFT_OUT + shard.name, 0)) for shard in split.shards}
            if split.made_from.get(IN_PLACE) != self._how or sum(num_left_out.values()) > self._options.max_bad:
                continue
            if not has_sha256(self._root / split.offsets_name, split.offsets_sha256):
                continue  # a run was killed before it wrote the manifest
            offsets, start = self._old.offsets(split.name), 0
            for shard in split.shards:
                rows = offsets[start : start + shard.num_samples]
                parts[shard.name] = _Part(shard, rows, int(rows["label"].max()) + 1, num_left_out[shard.name])
                start += shard.num_samples
        return parts

    def _split_of(self, tar: str) -> str:
        split = self._options.split or split_of(tar)
        if split in [own.name for own in self._own]:
            raise UserError(
                f"{tar} would be a shard of split {split!r}, which make_shards wrote without it; "
                "move the tar away, or name another split with --split NAME"
            )
        if work_directory(self._root, split).exists():
            raise UserError(
                f"split {split!r} in {self._root} is unfinished: run the make_shards command that began it again, "
                f"or, if {tar} is not of it, remove {work_directory(self._root, split)}"
            )
        return split

    def _check_budget(self) -> None:
        if self._num_left_out > self._options.max_bad:
            listed = "\n  ".join(self._left_out)
            raise UserError(
                f"{self._num_left_out} or more samples cannot be indexed, and {self._options.max_bad} may be left out; "
                f"mend the tars, or allow more with --max-bad; the first of them:\n  {listed}"
            )

    def _classes(self) -> tuple[str, ...]:
        num_classes = len(self._known) or max(
            self._parts[tar].num_labels for tars in self._tars.values() for tar in tars
        )
        classes = tuple(self._names.get(label, str(label)) for label in range(num_classes))
        labels: dict[str, int] = {}
        for label, name in enumerate(classes):
            if labels.setdefault(name, label) != label:
                raise UserError(
                    f"labels {labels[name]} and {label} are both class {name!a}: the tars are of datasets with "
                    "different labels; index each dataset in a directory of its own"
                )
        return classes

    def _split(self, name: str, tars: Sequence[str]) -> Split:
        parts = [self._parts[tar] for tar in tars]
        num_samples = sum(part.shard.num_samples for part in parts)
        sha256 = write_offsets(self._root / offsets_name(name), num_samples, (part.load() for part in parts))
        left_out = {_LEFT_OUT + part.shard.name: part.num_left_out for part in parts if part.num_left_out}
        return Split(name, tuple(part.shard for part in parts), sha256, {IN_PLACE: self._how, **left_out})


def _known_classes(old: Index, own: Sequence[Split], options: ForeignOptions) -> tuple[str, ...]:
    """The classes that labels must be of; () where the tars tell them."""
    if not own:
        return options.classes
    if options.classes not in ((), old.classes):
        raise UserError(
            f"the {len(options.classes)} classes given are not, in this order, the {len(old.classes)} of the splits "
            f"that make_shards wrote to {old.root}; leave them out, or index the tars in a directory of their own"
        )
    return old.classes
