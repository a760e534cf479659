"""Sample ids to decoded samples, by positional reads; every way a sample can be bad becomes a BadSample here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards.errors import UserError
from shards.files import OpenFiles
from shards.index import Index
from shards.tars import ustar

T = TypeVar("T")


class BadSample(UserError):
    """A sample that cannot be read or decoded, or has no valid label; the message says which, why and what to do.

    It is made from its message alone, so that it crosses the process boundary of a DataLoader worker.
    """


class Reader:
    """Random access to the samples of a split. One a process and thread; it may be pickled, and used after a fork."""

    def __init__(self, index: Index, split: str) -> None:
        self._index, self._name = index, split
        shards = index.split(split).shards
        self._paths = [index.root / shard.name for shard in shards]
        self._ends = np.cumsum([shard.num_samples for shard in shards])
        self._offsets = index.offsets(split)
        self._files = OpenFiles()

    def __reduce__(self) -> tuple[Any, ...]:
        # The offsets are mapped again, not copied.
        return Reader, (self._index, self._name)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, sample_id: int, decode: Callable[[bytes], T]) -> tuple[T, int]:
        """`decode` of the image's bytes, and its label. BadSample where that fails; IndexError outside [0, len)."""
        path, row = self._locate(sample_id)
        label = int(row["label"])
        try:
            data = self._files.read(path, int(row["offset"]), int(row["size"]))
            if not 0 <= label < self._index.num_classes:
                raise ValueError(f"label {label} is not in [0, {self._index.num_classes})")
            return decode(data), label
        except Exception as error:  # a decoder may raise anything
            raise self._bad_sample(sample_id, error) from error

    def key(self, sample_id: int) -> str:
        """The sample's key, from the tar header before its image. BadSample where it cannot be read."""
        path, row = self._locate(sample_id)
        try:
            header = self._files.read(path, int(row["offset"]) - ustar.BLOCK, ustar.BLOCK)
        except (OSError, OverflowError) as error:  # the latter from offsets that are nonsense
            raise BadSample(f"{path}: the header of sample {sample_id} cannot be read ({error})") from error
        directory, slash, name = ustar.member_name(header).rpartition("/")
        return directory + slash + name.split(".", 1)[0]

    def _locate(self, sample_id: int) -> tuple[Path, np.void]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of split {self._name!r}, which has {len(self)}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return self._paths[shard], self._offsets[sample_id]

    def _bad_sample(self, sample_id: int, error: Exception) -> BadSample:
        path, _ = self._locate(sample_id)
        try:
            key = repr(self.key(sample_id))
        except BadSample:
            key = "unreadable"
        return BadSample(
            f"bad sample in {path}: key {key}, sample {sample_id} of split {self._name!r}: "
            f"{type(error).__name__}: {error}. Copy the shard again, or rewrite the split with tools/make_shards.py."
        )
