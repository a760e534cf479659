"""Whether a plan keeps its promise: over an epoch every sample once, in batches or in the dropped tail."""

from dataclasses import dataclass

import numpy as np

from shards.keyed import id_hash
from shards.plan import Ids, Plan

_WORDS = 2**64
_CHUNK_IDS = 2**20


@dataclass(frozen=True)
class EpochAudit:
    """What an epoch of a plan holds, in sample ids.

    `num_planned` are in batches, `num_dropped` in the tail. `num_duplicates` come a second time or oftener,
    `num_missing` of the split never come, `num_outside` are of no sample of it. `hash` is that of the planned and the
    dropped ids together (`shards.keyed.id_hash`), `split_hash` that of every id of the split once.
    """

    num_planned: int
    num_dropped: int
    num_duplicates: int
    num_missing: int
    num_outside: int
    hash: int
    split_hash: int

    @property
    def is_exact(self) -> bool:
        return self.hash == self.split_hash and not self.num_duplicates + self.num_missing + self.num_outside


class Seen:
    """Which samples of a split have come, in any order; a byte for each."""

    def __init__(self, num_samples: int) -> None:
        self._seen = np.zeros(num_samples, dtype=np.bool_)
        self.count = self.num_duplicates = self.num_outside = self.hash = 0

    def add(self, ids: Ids) -> None:
        inside = np.sort(ids[(ids >= 0) & (ids < len(self._seen))])
        again = self._seen[inside]
        again[1:] |= inside[1:] == inside[:-1]
        self._seen[inside] = True
        self.count += len(ids)
        self.num_duplicates += int(again.sum())
        self.num_outside += len(ids) - len(inside)
        self.hash = (self.hash + id_hash(ids)) % _WORDS

    @property
    def num_missing(self) -> int:
        return len(self._seen) - int(np.count_nonzero(self._seen))


def audit_epoch(plan: Plan, epoch: int) -> EpochAudit:
    """Draws every batch of the epoch, and its tail. Memory is a byte a sample; 11 million samples take seconds."""
    seen = Seen(plan.num_samples)
    for batch in range(plan.batches_per_epoch):
        seen.add(plan.ids(epoch, batch))
    num_planned = seen.count
    seen.add(plan.tail(epoch))
    return EpochAudit(
        num_planned,
        seen.count - num_planned,
        seen.num_duplicates,
        seen.num_missing,
        seen.num_outside,
        seen.hash,
        split_hash(plan.num_samples),
    )


def split_hash(num_samples: int) -> int:
    """The hash of the ids 0 .. num_samples - 1, which an exact epoch has."""
    starts = range(0, num_samples, _CHUNK_IDS)
    return sum(id_hash(np.arange(start, min(start + _CHUNK_IDS, num_samples))) for start in starts) % _WORDS
