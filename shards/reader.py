"""Sample ids to decoded samples, by positional reads; every way a sample can be bad becomes a BadSample here."""

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from shards.errors import UserError
from shards.index import Index
from shards.store import LocalStore, Store, StoreError
from shards.tars import ustar

T = TypeVar("T")
MAX_SAMPLE_BYTES = 1 << 28  # an index from elsewhere must not make a worker allocate gigabytes


class BadSample(UserError):
    """A sample that cannot be read or decoded, or has no valid label.

    `shard`: where the tar lies. `key`: "" where it cannot be read. `reason`: what the reader or decoder said. It
    crosses process boundaries whole.
    """

    def __init__(self, shard: str, key: str, sample: int, split: str, reason: str) -> None:
        self.shard, self.key, self.sample, self.split, self.reason = shard, key, sample, split, reason
        named = repr(key) if key else "unreadable"
        super().__init__(
            f"bad sample in {shard}: key {named}, sample {sample} of split {split!r}: {reason}. "
            "Copy the shard again, or rewrite the split with tools/make_shards.py."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return BadSample, (self.shard, self.key, self.sample, self.split, self.reason)


class Row(NamedTuple):
    """One of the offsets' rows."""

    offset: int
    size: int
    label: int


class Reader:
    """Random access to the samples of a split. One a process and thread; it may be pickled, and used after a fork."""

    def __init__(self, index: Index, split: str, store: Store | None = None) -> None:
        self.index, self.split = index, split
        self.store = store or LocalStore(index.root)
        shards = index.split(split).shards
        self._names = [shard.name for shard in shards]
        self._ends = np.cumsum([shard.num_samples for shard in shards])  # ids
        self._ends_list = self._ends.tolist()
        self._offsets = np.asarray(index.offsets(split))  # still mapped; a memmap is slow to take an item from

    def __reduce__(self) -> tuple[Any, ...]:
        # The offsets are mapped again, not copied.
        return type(self), (self.index, self.split, self.store)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, sample_id: int, decode: Callable[[bytes], T]) -> tuple[T, int]:
        """`decode` of the image's bytes, and its label.

        BadSample where that fails, StoreError where the store does not answer, IndexError outside [0, len).
        """
        name, row = self._locate(sample_id)
        try:
            data = self._image(name, row)
            if not 0 <= row.label < self.index.num_classes:
                raise ValueError(f"label {row.label} is not in [0, {self.index.num_classes})")
            return decode(data), row.label
        except StoreError:
            raise
        except Exception as error:  # a decoder may raise anything
            raise self._bad_sample(sample_id, error) from error

    def key(self, sample_id: int) -> str:
        """The sample's key, from the tar header before its image; "" where it cannot be read."""
        name, row = self._locate(sample_id)
        try:
            header = self.store.read(name, row.offset - ustar.BLOCK, ustar.BLOCK)
            _check_header(header, row)
        except (OSError, ValueError, OverflowError):  # the last from offsets that are nonsense
            return ""
        directory, slash, file = ustar.member_name(header).rpartition("/")
        return directory + slash + file.split(".", 1)[0]

    def shards_of(self, sample_ids: np.ndarray) -> list[str]:
        """The names of the shards that hold the samples, each once, in the order of their first."""
        numbers = np.searchsorted(self._ends, sample_ids, side="right")
        return [self._names[number] for number in dict.fromkeys(numbers.tolist())]

    def _image(self, name: str, row: Row) -> bytes:
        """A member's data, read with its header: an offset into another tar than the indexed one is found out."""
        if row.size > MAX_SAMPLE_BYTES:
            raise ValueError(f"the index gives it {row.size} bytes, and {MAX_SAMPLE_BYTES} are the most")
        member = self.store.read(name, row.offset - ustar.BLOCK, ustar.BLOCK + row.size)
        _check_header(member, row)
        return member[ustar.BLOCK :]

    def _locate(self, sample_id: int) -> tuple[str, Row]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of split {self.split!r}, which has {len(self)}")
        return self._names[bisect.bisect_right(self._ends_list, sample_id)], self._row(sample_id)

    def _row(self, sample_id: int) -> Row:
        return Row(*self._offsets.item(sample_id))

    def _bad_sample(self, sample_id: int, error: Exception) -> BadSample:
        name, _ = self._locate(sample_id)
        reason = f"{type(error).__name__}: {error}"
        return BadSample(self.store.where(name), self.key(sample_id), sample_id, self.split, reason)


def _check_header(header: bytes, row: Row) -> None:
    try:
        found = ustar.member_size(header)
    except ValueError:
        found = -1
    if found != row.size:
        raise ValueError(f"no file of {row.size} bytes begins at offset {row.offset}: the shard is not the indexed one")
