"""What one pass over a tar of any origin tells: its hash, where its images lie, their labels and class names."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from shards.durable import atomic_file
from shards.engine import Advance
from shards.errors import UserError
from shards.files import HashedReader
from shards.index import OFFSETS_DTYPE, Shard
from shards.tars.samples import TarSample, Unfit, samples_of, shown

MAX_LISTED = 20  # samples left out, that are described
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TarTask:
    """`work`: the directory for what is found. `label`: as for `TarSample.label`; labels are below `num_classes`."""

    path: Path
    work: Path
    label: str
    num_classes: int

    @property
    def rows_path(self) -> Path:
        """Rows of OFFSETS_DTYPE, an array in NumPy's format."""
        return self.work / f"{self.path.name}.npy"

    @property
    def record_path(self) -> Path:
        return self.work / f"{self.path.name}.json"


@dataclass(frozen=True)
class TarIndex:
    """`names`: class names by label, as text. `num_labels`: one more than the largest. `left_out`: the first samples
    that cannot be indexed, and why. `task`: the options and the tar's time of change, by which it is known again."""

    shard: Shard
    names: Mapping[str, str]
    num_labels: int
    left_out: tuple[str, ...]
    num_left_out: int
    task: str


def index_tar(task: TarTask, advance: Advance) -> TarIndex:
    """Reads a tar once, from front to back, and writes the rows, then the record, of its samples.

    UserError for a tar that cannot be read, is damaged or has no sample that can be indexed, and for a label with two
    class names.
    """
    try:
        with open(task.path, "rb", buffering=0) as raw:
            status = os.fstat(raw.fileno())
            file = HashedReader(raw)
            found = _Samples(task)
            before = 0
            for sample in samples_of(cast(BinaryIO, file), status.st_size):
                found.add(sample)
                advance(1, file.tell() - before)
                before = file.tell()
            sha256 = file.sha256()
            advance(0, status.st_size - before)
    except OSError as error:
        raise UserError(f"cannot read {task.path} ({error.strerror}); check its permissions and its disk") from error
    shard = Shard(task.path.name, len(found.rows), status.st_size, sha256)
    return found.write(shard, _identity(task, status))


def read_record(task: TarTask) -> TarIndex | None:
    """What an earlier run wrote of the same tar with the same options, if it did."""
    try:
        record = json.loads(task.record_path.read_bytes())
    except FileNotFoundError:
        return None
    record["shard"] = Shard(**record["shard"])
    record["left_out"] = tuple(record["left_out"])
    return TarIndex(**record) if record["task"] == _identity(task, os.stat(task.path)) else None


def two_names(label: int, first: str, second: str, where: str) -> UserError:
    """The error for a label that is two classes."""
    return UserError(
        f"label {label} is class {first!a}, and in {where} it is class {second!a}: labels of different datasets are "
        "mixed, or a class list is not in the order of the labels. Index each dataset in a directory of its own, with "
        "its own classes; where tars were replaced by those of another, remove index.json first"
    )


def _identity(task: TarTask, status: os.stat_result) -> str:
    return f"{status.st_size} bytes of {status.st_mtime_ns}; label {task.label!a} below {task.num_classes}"


class _Samples:
    """The samples of a tar, as they are found."""

    def __init__(self, task: TarTask) -> None:
        self._task = task
        self._names: dict[int, str] = {}
        self._left_out: list[str] = []
        self._num_left_out = 0
        self.rows: list[tuple[int, int, int]] = []

    def add(self, sample: TarSample) -> None:
        try:
            self.rows.append(self._row(sample))
        except Unfit as error:
            self._num_left_out += 1
            if len(self._left_out) < MAX_LISTED:
                self._left_out.append(f"{self._task.path.name}: {shown(sample.key)}: {error}")

    def _row(self, sample: TarSample) -> tuple[int, int, int]:
        _, image = sample.image()
        label, name = sample.label(self._task.label), sample.class_name()
        if label >= self._task.num_classes:
            raise Unfit(f"its label {label} is not in [0, {self._task.num_classes})")
        if name and self._names.setdefault(label, name) != name:
            raise two_names(label, self._names[label], name, f"{self._task.path}, sample {shown(sample.key)}")
        return image.offset, image.size, label

    def write(self, shard: Shard, identity: str) -> TarIndex:
        if not self.rows:
            raise UserError(
                f"{self._task.path} has no sample that can be indexed"
                + "".join(f"\n  {left_out}" for left_out in self._left_out)
                + "\nIs it a WebDataset tar of labelled images? Else move it away."
            )
        rows = np.array(self.rows, OFFSETS_DTYPE)
        names = {str(label): name for label, name in self._names.items()}
        found = TarIndex(
            shard, names, int(rows["label"].max()) + 1, tuple(self._left_out), self._num_left_out, identity
        )
        with atomic_file(self._task.rows_path) as file:
            np.save(file, rows, allow_pickle=False)
        with atomic_file(self._task.record_path) as file:
            file.write(json.dumps(asdict(found)).encode())
        return found
