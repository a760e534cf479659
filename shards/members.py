"""Sample ids to whole samples as WebDataset's readers give them: the image, and the members around it."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.index import Index
from shards.reader import MAX_SAMPLE_BYTES, Reader, Row
from shards.store import Store, StoreError
from shards.tars.samples import META, split_name
from shards.tars.ustar import BLOCK
from shards.tars.walk import Member, walk


class MemberReader(Reader):
    """A Reader that also gives all fields of a sample, from tars of ours and of others.

    The index knows where images lie. A sample's members lie side by side, so all of them are between the image before
    it and the image after it; that is read at once.
    """

    def __init__(self, index: Index, split: str, store: Store | None = None) -> None:
        super().__init__(index, split, store)
        self._num_bytes = {shard.name: shard.num_bytes for shard in index.split(split).shards}

    def sample(self, sample_id: int) -> dict[str, Any]:
        """`__key__`, `__url__` (where the shard lies), and the bytes of each field under its extension, in lower case.

        BadSample where they cannot be read or the shard is not the indexed one, StoreError where the store does not
        answer, IndexError outside [0, len).
        """
        name, row = self._locate(sample_id)
        try:
            start, stop, end = self._span(sample_id, name)
            data = self.store.read(name, start, stop - start)
            members = _side_by_side(_fields(data, end - start), row.offset - start, row.size)
            sample: dict[str, Any] = {"__key__": split_name(members[0].name)[0], "__url__": self.store.where(name)}
            for member in members:
                field = split_name(member.name)[1]
                if field in sample:
                    raise ValueError(f"two members are its {field}")
                sample[field] = data[member.offset : member.offset + member.size]
        except StoreError:
            raise
        except Exception as error:  # offsets that are nonsense bring about any
            raise self._bad_sample(sample_id, error) from error
        return sample

    def key(self, sample_id: int) -> str:
        """The sample's key; "" where it cannot be read. Unlike a Reader's it is whole where the name is long or is not
        ASCII: headers of its own state such a name, before the image's."""
        name, row = self._locate(sample_id)
        try:
            start, end = self._span(sample_id, name)[0], row.offset
            before = self.store.read(name, start, end - start)
            found = [member for member in _walk(before, _padded_end(row) - start) if member.offset == len(before)]
            return split_name(found[0].name)[0]
        except StoreError:
            raise
        except Exception:  # what cannot be walked may still have a header before its image
            return super().key(sample_id)

    def _span(self, sample_id: int, name: str) -> tuple[int, int, int]:
        """Where the image before ends, where the content of the one after it begins, and where that ends."""
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        is_first = sample_id == (self._ends[number - 1] if number else 0)
        start = 0 if is_first else _padded_end(self._row(sample_id - 1))
        if sample_id + 1 == self._ends[number]:
            stop = end = self._num_bytes[name]
        else:
            after = self._row(sample_id + 1)
            stop, end = after.offset, _padded_end(after)
        if not 0 < stop - start <= MAX_SAMPLE_BYTES:
            raise ValueError(f"its members lie within {stop - start} bytes, and {MAX_SAMPLE_BYTES} are the most")
        return start, stop, end


def _walk(data: bytes, end: int) -> Iterator[Member]:
    """The members of a part of a tar. It may stop behind the header of one whose content ends at `end`."""
    try:
        for member in walk(io.BytesIO(data), end):
            yield member
            if member.offset + member.size > len(data):
                return
    except UserError as error:  # whose bytes count from the part, and whose remedy is for whole tars
        raise ValueError("the headers around it are damaged, or the shard is not the indexed one") from error


def _fields(data: bytes, end: int) -> Iterator[Member]:
    """Those of the members that are wholly there, and a field of a sample."""
    for member in _walk(data, end):
        is_whole = member.kind == "file" and member.offset + member.size <= len(data)
        if is_whole and not META.match(member.name) and all(split_name(member.name)):
            yield member


def _side_by_side(members: Iterator[Member], offset: int, size: int) -> list[Member]:
    """Those side by side that share the key of the image at `offset`."""
    for _, group in itertools.groupby(members, lambda member: split_name(member.name)[0]):
        found = list(group)
        if any((member.offset, member.size) == (offset, size) for member in found):
            return found
    raise ValueError(f"no file of {size} bytes begins where the index has it: the shard is not the indexed one")


def _padded_end(row: Row) -> int:
    return -(-(row.offset + row.size) // BLOCK) * BLOCK
