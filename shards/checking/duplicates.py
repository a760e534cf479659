"""Equal images, and equal keys, among millions: digests of 128 bits, sorted on disk part by part, in bounded memory."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.checking.findings import ACROSS, IN_OTHER, OTHER_CLASS, WITHIN, Findings
from shards.durable import explained
from shards.engine import Advance
from shards.errors import UserError
from shards.files import OpenFiles
from shards.tars import ustar

# What has the digest (`high`, `low`): the sample of class `label` whose image begins at `offset` of shard `place`.
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4"), ("label", "<i4"), ("offset", "<u8")])
_PART_BITS = 6
_MAX_COPIES = 4  # that a finding names


class Place(NamedTuple):
    """A shard; `other` is whether it lies in the directory that is compared with."""

    path: Path
    split: str
    other: bool


def digest(data: bytes) -> tuple[int, int]:
    """BLAKE2b of 128 bits, as (high, low): two of 14 million unequal images agree with probability 3e-25."""
    value = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")


@dataclass(frozen=True, eq=False)
class DigestTask:
    """The images of shard number `place`, by its rows of the index."""

    place: int
    path: Path
    rows: NDArray[np.void]


def digest_shard(task: DigestTask, advance: Advance) -> NDArray[np.void]:
    """ROW of each image of a shard; UserError where one cannot be read."""
    files, found = OpenFiles(), []
    try:
        for offset, size, label in task.rows.tolist():
            found.append((*digest(files.read(task.path, offset, size)), task.place, label, offset))
            advance(1, size)
    except (OSError, OverflowError) as error:  # the latter from offsets that are nonsense
        raise UserError(f"{task.path} cannot be compared with ({error}); check its directory first") from error
    finally:
        files.close()
    return np.array(found, ROW)


class Spill:
    """Rows of ROW in files of a new directory, by the first bits of their digests: 32 bytes a row.

    UserError where the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._paths = [directory / str(part) for part in range(1 << _PART_BITS)]
        with explained(directory):
            directory.mkdir()

    def add(self, rows: NDArray[np.void]) -> None:
        parts = (rows["high"] >> np.uint64(64 - _PART_BITS)).astype(np.int64)
        ends = np.cumsum(np.bincount(parts, minlength=len(self._paths)))
        ordered = np.split(rows[np.argsort(parts, kind="stable")], ends[:-1])
        with explained(self._directory):
            for path, mine in zip(self._paths, ordered, strict=True):
                if len(mine):
                    with open(path, "ab") as file:
                        file.write(mine.tobytes())

    def groups(self) -> Iterator[NDArray[np.void]]:
        """The rows of each digest that two or more have, by place and offset; digests in growing order."""
        for path in filter(Path.exists, self._paths):
            rows = np.fromfile(path, ROW)
            rows = rows[np.lexsort([rows[name] for name in ("offset", "place", "low", "high")])]
            changes = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
            edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(rows)]])
            for number in np.flatnonzero(np.diff(edges) > 1):
                yield rows[edges[number] : edges[number + 1]]


class Namer:
    """What findings call the samples of rows. `classes` are the names of labels."""

    def __init__(self, places: Sequence[Place], classes: Sequence[str]) -> None:
        self.places, self._classes = places, classes
        self._files = OpenFiles()

    def key(self, row: np.void) -> str:
        """From the header before the image."""
        header = self._files.read(self.places[row["place"]].path, int(row["offset"]) - ustar.BLOCK, ustar.BLOCK)
        directory, slash, name = ustar.member_name(header).rpartition("/")
        return directory + slash + name.split(".", 1)[0]

    def shard(self, row: np.void) -> str:
        return self.places[row["place"]].path.name

    def copies(self, rows: NDArray[np.void]) -> str:
        named = [self._copy(row) for row in rows[:_MAX_COPIES]]
        more = len(rows) - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "")

    def _copy(self, row: np.void) -> str:
        place, label = self.places[row["place"]], int(row["label"])
        where = place.path if place.other else place.path.name
        class_name = ascii(self._classes[label]) if 0 <= label < len(self._classes) else "none"
        return f"{self.key(row)!a} of class {class_name} in {where}"


def find_duplicates(images: Spill, namer: Namer, findings: Findings) -> None:
    """One finding for each image of ours that comes more than once."""
    for group in images.groups():
        places = [namer.places[place] for place in group["place"]]
        others = sum(place.other for place in places)
        if others == len(group):
            continue
        check = IN_OTHER if others else WITHIN if len({place.split for place in places}) == 1 else ACROSS
        if len(np.unique(group["label"])) > 1:
            check += OTHER_CLASS
        if findings.are_full(check):
            findings.counts[check] += 1
        else:  # ours come first, since their places do
            reason = f"the same image as {namer.copies(group[1:])}"
            findings.add(check, namer.shard(group[0]), namer.key(group[0]), reason)


def find_repeated_keys(keys: Spill, namer: Namer, findings: Findings) -> None:
    """One finding for each sample whose key came before in another shard of its split."""
    for group in keys.groups():
        first: dict[str, np.void] = {}
        for row in group:
            split = namer.places[row["place"]].split
            if split in first:
                reason = f"the same key is in {namer.shard(first[split])}"
                findings.add("key", namer.shard(row), namer.key(row), reason)
            else:
                first[split] = row
