"""What one pass over a shard tells: its hash, its structure, and whether index, samples and tar agree."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from shards.checking.duplicates import ROW, digest
from shards.checking.findings import Findings
from shards.checking.sample import Problem, check_class, check_image, check_texts, label_of
from shards.engine import Advance
from shards.errors import UserError
from shards.files import HashedReader
from shards.index import Shard
from shards.tars.samples import TarSample, Unfit, samples_of

# Of each check the first so many findings of a shard are kept; all are counted.
MAX_LISTED = 100
_MAX_KEY = 200
_BUFFER_BYTES = 1 << 20

Row = tuple[int, int, int]  # offset, size and label of an image, as the index has them


@dataclass(frozen=True, eq=False)
class ShardTask:
    """`place` numbers the shard; `rows` are its own of the index, None where that cannot be read.

    `decode` are the positions to decode in it, None for all. `by_us`: whether make_shards wrote it, or only indexed it.
    """

    place: int
    path: Path
    shard: Shard
    rows: NDArray[np.void] | None
    classes: tuple[str, ...]
    decode: frozenset[int] | None
    by_us: bool


@dataclass(frozen=True, eq=False)
class ShardResult:
    """`images` and `keys`: rows of `duplicates.ROW`, one an image and one a key."""

    place: int
    findings: Findings
    images: NDArray[np.void]
    keys: NDArray[np.void]
    num_bytes: int
    num_decoded: int


def check_shard(task: ShardTask, advance: Advance) -> ShardResult:
    """Reads a shard once, from front to back. What is wrong is in the result's findings; nothing is raised."""
    check = _Check(task, advance)
    try:
        with open(task.path, "rb", buffering=_BUFFER_BYTES) as file:
            check.run(file)
    except FileNotFoundError:
        check.found("missing", "", "the index names this shard, and there is no such file")
    except OSError as error:
        check.found("tar", "", f"it cannot be read ({error.strerror or error})")
    return check.result()


class _Check:
    """A pass over a shard."""

    def __init__(self, task: ShardTask, advance: Advance) -> None:
        self._task, self._advance = task, advance
        # The rows of the index that were not met yet, by where the image begins, and their numbers.
        rows = [] if task.rows is None else task.rows.tolist()
        self._rows = {row[0]: (number, row) for number, row in enumerate(rows)}
        self._last_row = -1
        self._findings = Findings(MAX_LISTED)
        self._images: list[tuple[int, ...]] = []
        self._keys: list[tuple[int, ...]] = []
        self._num_bytes = self._num_decoded = 0

    def found(self, check: str, key: str, reason: str) -> None:
        self._findings.add(check, self._task.shard.name, key[:_MAX_KEY], reason)

    def result(self) -> ShardResult:
        images, keys = (np.array(rows, ROW) for rows in (self._images, self._keys))
        return ShardResult(self._task.place, self._findings, images, keys, self._num_bytes, self._num_decoded)

    def run(self, file: BinaryIO) -> None:
        hashed = HashedReader(file)
        try:
            for sample in samples_of(cast(BinaryIO, hashed), os.fstat(file.fileno()).st_size):
                for check, reason in self._sample_problems(sample, file):
                    self.found(check, sample.key, reason)
                self._count(hashed, 1)
            self._check_rest()
        except UserError as error:  # a damaged tar
            self.found("tar", "", f"{error} ({len(self._images)} images before that were checked)")
        self._check_file(hashed)

    def _check_rest(self) -> None:
        num_samples = self._task.shard.num_samples
        if self._rows:
            reason = f"the index has {len(self._rows)} images that were not found, the first at byte {min(self._rows)}"
            self.found("index", "", reason)
        elif len(self._images) != num_samples:
            self.found("index", "", f"it holds {len(self._images)} images, and the index counts {num_samples}")

    def _count(self, hashed: HashedReader, images: int) -> None:
        self._advance(images, hashed.tell() - self._num_bytes)
        self._num_bytes = hashed.tell()

    def _check_file(self, hashed: HashedReader) -> None:
        sha256, shard = hashed.sha256(), self._task.shard
        self._count(hashed, 0)
        if self._num_bytes != shard.num_bytes:
            self.found("size", "", f"it has {self._num_bytes} bytes, and the index says {shard.num_bytes}")
        elif sha256 != shard.sha256:
            self.found("hash", "", f"its SHA-256 is {sha256}, and the index says {shard.sha256}")

    def _sample_problems(self, sample: TarSample, file: BinaryIO) -> Iterator[Problem]:
        try:
            member = sample.image()[1]
        except Unfit as error:
            yield "sample" if self._task.by_us else "left out", str(error)
            return
        number, row = self._rows.pop(member.offset, (self._last_row, None))
        if row is None and self._task.rows is not None and not self._task.by_us:
            yield "left out", "the index does not hold it"
            return
        # The pass has gone on to the next sample, but these bytes are still in the page cache.
        data = os.pread(file.fileno(), member.size, member.offset)
        decode = self._task.decode is None or len(self._images) in self._task.decode
        self._num_decoded += decode
        header, problems = check_image(sample, data, decode)
        yield from problems
        label = label_of(sample, len(self._task.classes))
        if self._task.by_us:
            yield from check_texts(sample, header, self._task.classes, label)
        elif row:
            label = row[2]  # which field holds it, only the indexing knew
            yield from check_class(sample, self._task.classes, label)
        if self._task.rows is not None:
            yield from self._row_problems(number, row, (member.offset, member.size, label))
        place = (self._task.place, label, member.offset)
        self._images.append((*digest(data), *place))
        self._keys.append((*digest(sample.key.encode()), *place))
        self._last_row = number

    def _row_problems(self, number: int, row: Row | None, there: Row) -> Iterator[Problem]:
        if row is None:
            yield "index", f"the index has no image at byte {there[0]}"
        elif row != there:
            yield "index", f"the index has (offset, size, label) {row}, and the tar {there}"
        elif number < self._last_row:
            yield "index", "in the index, other samples come before it than in the tar"
