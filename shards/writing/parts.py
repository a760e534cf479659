"""Finished shards of an unfinished split: each is a tar in OUT, and a record in the split's work directory."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shards.durable import atomic_file
from shards.errors import UserError
from shards.images import ImageOptions
from shards.index import OFFSETS_DTYPE, Shard
from shards.sources.base import Rejected, Source
from shards.tars import ustar
from shards.writing.sample import Encoded


@dataclass(frozen=True)
class Job:
    """What the shards of a split share. It crosses to other processes, and to machines that see the same paths."""

    out: Path
    split: str
    source: Source
    listing_sha256: str
    num_images: int
    num_shards: int
    seed: int
    images: ImageOptions

    @property
    def work(self) -> Path:
        return work_directory(self.out, self.split)

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}.tar"

    def bounds(self, number: int) -> tuple[int, int]:
        """The run of positions of a shard: lengths differ by one at most."""
        a_shard, longer = divmod(self.num_images, self.num_shards)
        return number * a_shard + min(number, longer), (number + 1) * a_shard + min(number + 1, longer)

    def shard_of(self, position: int) -> int:
        """The shard whose run holds a position."""
        a_shard, longer = divmod(self.num_images, self.num_shards)
        in_longer = longer * (a_shard + 1)
        return position // (a_shard + 1) if position < in_longer else longer + (position - in_longer) // a_shard


@dataclass(frozen=True)
class Part:
    """A finished shard, the images that were left out of it, and how many were changed: in all, and in which way."""

    shard: Shard
    dropped: tuple[Rejected, ...]
    num_changed: int
    changes: Mapping[str, int]


def work_directory(out: Path, split: str) -> Path:
    """While it exists, the split's shards in OUT are those of an unfinished run of this writer."""
    return out / f"{split}.unfinished"


def write_part(job: Job, number: int, samples: Iterable[Encoded | Rejected]) -> Part:
    """Writes a shard, then what is known of it: from then on the shard is never written again."""
    if not job.work.is_dir():
        raise UserError(f"{job.work} is not there; OUT must be the same path, on a shared disk, on every machine")
    rows: list[tuple[int, int, int]] = []
    dropped: list[Rejected] = []
    num_changed = 0
    changes: Counter[str] = Counter()
    with atomic_file(job.out / job.shard_name(number)) as file:
        for sample in samples:
            if isinstance(sample, Rejected):
                dropped.append(sample)
                continue
            rows.append((file.num_bytes + ustar.BLOCK, sample.image_bytes, sample.label))
            file.write(sample.members)
            num_changed += bool(sample.changes)
            changes.update(_kinds(sample.changes))
        file.write(ustar.END)
    shard = Shard(job.shard_name(number), len(rows), file.num_bytes, file.sha256)
    part = Part(shard, tuple(dropped), num_changed, dict(changes))
    with atomic_file(offsets_path(job.work, number)) as file:
        np.save(file, np.array(rows, OFFSETS_DTYPE), allow_pickle=False)
    with atomic_file(_path(job.work, number)) as file:
        file.write(json.dumps(asdict(part)).encode())
    return part


def read_part(job: Job, number: int) -> Part | None:
    """A shard that was finished before, if it is there; it is whole, since its record came last."""
    try:
        record = json.loads(_path(job.work, number).read_bytes())
        size = (job.out / job.shard_name(number)).stat().st_size
    except FileNotFoundError:
        return None
    dropped = tuple(Rejected(*item) for item in record["dropped"])
    part = Part(Shard(**record["shard"]), dropped, record["num_changed"], record["changes"])
    return part if size == part.shard.num_bytes else None


def forget_losses(job: Job, number: int) -> None:
    """Where images were left out of a shard: makes the next run write it again, and read for it what it needs."""
    part = read_part(job, number)
    if part and part.dropped:
        _path(job.work, number).unlink()


def offsets_path(work: Path, number: int) -> Path:
    """Rows of OFFSETS_DTYPE of a finished shard."""
    return work / f"{number:06d}.npy"


def _kinds(changes: str) -> list[str]:
    """The changes without their numbers, so that they can be counted."""
    return [re.sub(r" from \d+x\d+", "", change) for change in changes.split("; ") if change]


def _path(work: Path, number: int) -> Path:
    return work / f"{number:06d}.json"
