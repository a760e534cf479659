"""Shards of images that are read once, front to back: each goes to the spool of its shard, and every spool is shuffled
into its tar and deleted.

A spool is a file of records in the order of arrival: RECORD, then the members and the changes of a sample, or the
place and the reason of an image that was left out (label -1).
"""

import heapq
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.durable import atomic_file, explained, sync_directory
from shards.engine import Advance, Engine
from shards.images import BadImage, ImageOptions
from shards.keyed import Permutation
from shards.sources.base import Rejected
from shards.writing.listing import Image, Listing
from shards.writing.parts import Job, Part, read_part, write_part
from shards.writing.sample import Encoded, encode, fetch

_RECORD = struct.Struct("<QiIQI")  # position in the shuffle, label, bytes of the image, of the members, of the changes
_LEFT_OUT = -1
_BATCH_IMAGES = 64
_BATCH_BYTES = 16 << 20
_BUFFERED_BYTES = 128 << 20
_POSITIONS_AT_ONCE = 1 << 20


class _Place(NamedTuple):
    """Where a sample goes: the spool of its shard, and its position in the shuffle of its split."""

    spool: Path
    position: int


class _Item(NamedTuple):
    place: _Place
    split: str
    image: Image
    class_name: str
    data: bytes | BadImage


_Batch = tuple[ImageOptions, list[_Item]]


def fill_spools(jobs: Sequence[Job], engine: Engine, advance: Advance, dropped: Callable[[Rejected], None]) -> None:
    """Reads what the unfinished shards of `jobs` need, all of one source, in one pass; `dropped` hears of every image
    that is left out, and may raise. Jobs whose spools were completed before are passed over."""
    unread = [job for job in jobs if not _is_complete(job)]
    for job in unread:
        _completed(job).unlink(missing_ok=True)
        for leftover in job.work.glob("*.spool"):
            leftover.unlink()
    spools = _Spools()
    for samples in engine.run(_encode_batch, _batches(unread), advance):
        for place, sample in samples:
            if isinstance(sample, Rejected):
                dropped(sample)
            spools.add(place, sample)
    spools.sync()
    for job in unread:
        sync_directory(job.work)
        with atomic_file(_completed(job)):
            pass


def shuffle_spool(task: tuple[Job, int], advance: Advance) -> Part:
    """Writes shard `number` of a job from its completed spool, and deletes that."""
    job, number = task
    path = _spool(job, number)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as spool:
        part = write_part(job, number, _shuffled(job, spool, advance))
    path.unlink()
    return part


def _spool(job: Job, number: int) -> Path:
    return job.work / f"{number:06d}.spool"


def _completed(job: Job) -> Path:
    """Exists once everything has been read."""
    return job.work / "spools.complete"


def _is_complete(job: Job) -> bool:
    """Whether every shard is finished, or has all that it needs in its spool."""
    numbers = range(job.num_shards)
    return _completed(job).exists() and all(read_part(job, n) or _spool(job, n).exists() for n in numbers)


def _batches(jobs: Sequence[Job]) -> Iterator[_Batch]:
    """What the workers encode, read in the order of the source."""
    items: list[_Item] = []
    num_bytes = 0
    for item in heapq.merge(*map(_items, jobs), key=lambda item: item[0]):
        job, place, image, class_name = item[1:]
        data = _fetch(job, image)
        items.append(_Item(place, job.split, image, class_name, data))
        num_bytes += 0 if isinstance(data, BadImage) else len(data)
        if len(items) == _BATCH_IMAGES or num_bytes >= _BATCH_BYTES:
            yield job.images, items
            items, num_bytes = [], 0
    if items:
        yield jobs[0].images, items


def _items(job: Job) -> Iterator[tuple[tuple[int, int], Job, _Place, Image, str]]:
    """The images of a job's unfinished shards, first where each lies (container, offset), by which they are sorted."""
    listing = Listing(job.work)
    positions = _positions(job)
    finished = {number for number in range(job.num_shards) if read_part(job, number)}
    for row in map(int, np.lexsort((listing.rows["offset"], listing.rows["container"]))):
        position = int(positions[row])
        number = job.shard_of(position)
        if number not in finished:
            image = listing[row]
            where = (int(listing.rows["container"][row]), image.offset)
            yield where, job, _Place(_spool(job, number), position), image, listing.classes[image.label]


def _positions(job: Job) -> NDArray[np.int64]:
    """The position in the shuffle of each row of the listing."""
    positions = np.empty(job.num_images, np.int64)
    shuffle = Permutation(job.num_images, job.seed)
    for start in range(0, job.num_images, _POSITIONS_AT_ONCE):
        run = np.arange(start, min(start + _POSITIONS_AT_ONCE, job.num_images))
        positions[shuffle(run)] = run
    return positions


def _fetch(job: Job, image: Image) -> bytes | BadImage:
    try:
        return fetch(job.source, image)
    except BadImage as error:
        return error


def _encode_batch(batch: _Batch, advance: Advance) -> list[tuple[_Place, Encoded | Rejected]]:
    options, items = batch
    samples: list[tuple[_Place, Encoded | Rejected]] = []
    for item in items:
        try:
            if isinstance(item.data, BadImage):
                raise item.data
            samples.append((item.place, encode(item.image, item.class_name, item.data, options)))
            advance(1, len(item.data))
        except BadImage as error:
            where = ascii(f"{item.class_name}/{item.image.name}")
            samples.append((item.place, Rejected(item.split, where, str(error))))
            advance(1, 0)
    return samples


class _Spools:
    """Appends records to many spools, through a buffer that all share: no spool stays open."""

    def __init__(self) -> None:
        self._buffers: dict[Path, list[bytes]] = {}
        self._num_bytes = 0
        self._written: set[Path] = set()

    def add(self, place: _Place, sample: Encoded | Rejected) -> None:
        record = _record(place.position, sample)
        self._buffers.setdefault(place.spool, []).extend(record)
        self._num_bytes += sum(map(len, record))
        if self._num_bytes >= _BUFFERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        for path, records in self._buffers.items():
            with explained(path), open(path, "ab") as file:
                file.writelines(records)
        self._written.update(self._buffers)
        self._buffers.clear()
        self._num_bytes = 0

    def sync(self) -> None:
        """Everything that was added is on disk."""
        self._flush()
        for path in self._written:
            with explained(path), open(path, "ab") as file:
                os.fsync(file.fileno())


def _record(position: int, sample: Encoded | Rejected) -> tuple[bytes, ...]:
    if isinstance(sample, Rejected):
        label, image_bytes, members, changes = _LEFT_OUT, 0, sample.where.encode(), sample.reason.encode()
    else:
        label, image_bytes, members = sample.label, sample.image_bytes, sample.members
        changes = sample.changes.encode()
    return _RECORD.pack(position, label, image_bytes, len(members), len(changes)), members, changes


def _shuffled(job: Job, spool: mmap.mmap, advance: Advance) -> Iterator[Encoded | Rejected]:
    """The samples of a spool in the order of the shuffle."""
    for _, start in sorted(_starts(spool)):
        _, label, image_bytes, num_members, num_changes = _RECORD.unpack_from(spool, start)
        middle = start + _RECORD.size + num_members
        members, changes = spool[start + _RECORD.size : middle], spool[middle : middle + num_changes].decode()
        if label == _LEFT_OUT:
            yield Rejected(job.split, members.decode(), changes)
        else:
            yield Encoded(label, image_bytes, members, changes)
        advance(1, image_bytes)


def _starts(spool: mmap.mmap) -> Iterable[tuple[int, int]]:
    """The position and the first byte of every record."""
    start = 0
    while start < len(spool):
        position, _, _, num_members, num_changes = _RECORD.unpack_from(spool, start)
        yield position, start
        start += _RECORD.size + num_members + num_changes
