"""Which samples make up which global batch: pure functions of integers, without I/O, memory or state.

Shapes: B global batch, N samples of the split.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

_ROUNDS = 8
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A keyed bijection on [0, num_items) that stores nothing but its key.

    A balanced Feistel network (Luby and Rackoff, 1988) on the next even number of bits; an item that falls outside is
    encrypted again until it falls inside (cycle walking: Black and Rogaway, 2002), fewer than four times on average.
    """

    def __init__(self, num_items: int, *key: int | str) -> None:
        if num_items < 1:
            raise ValueError(f"a permutation of {num_items} items: at least 1 is needed")
        self.num_items = num_items
        self._half_bits = np.uint64(max(1, ((num_items - 1).bit_length() + 1) // 2))
        self._round_keys = _keys(_ROUNDS, num_items, *key)

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Items at `positions` (an array, of any shape but ()); ValueError for a position outside [0, num_items)."""
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_items:
            raise ValueError(f"positions {positions.min()} to {positions.max()} are not all in [0, {self.num_items})")
        items = self._encrypt(positions.astype(np.uint64))
        while (outside := items >= self.num_items).any():
            items[outside] = self._encrypt(items[outside])
        return items.astype(np.int64)

    def _encrypt(self, items: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half = self._half_bits
        left, right = items >> half, items & ((np.uint64(1) << half) - np.uint64(1))
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half))
        return (left << half) | right


@dataclass(frozen=True)
class Plan:
    """The global batches of every epoch of a split.

    An epoch is a permutation of the split, keyed by (fingerprint, seed, epoch) and cut into batches of `global_batch`;
    the tail below one global batch is dropped. Raises UserError where an epoch would have no batch.
    """

    num_samples: int
    fingerprint: str
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if not 1 <= self.global_batch <= self.num_samples:
            raise UserError(
                f"a global batch of {self.global_batch} cannot be drawn from a split of {self.num_samples} samples: "
                f"an epoch would have no batch. Set the global batch between 1 and {self.num_samples}, or add samples."
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    def ids(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """Sample ids [B] of global batch `batch` of the epoch; costs O(B) wherever it lies. IndexError past the end."""
        if not 0 <= batch < self.batches_per_epoch:
            raise IndexError(f"batch {batch} of an epoch of {self.batches_per_epoch} batches")
        return self._ids(epoch, batch * self.global_batch, (batch + 1) * self.global_batch)

    def tail(self, epoch: int) -> NDArray[np.int64]:
        """Sample ids [N mod B] that the epoch drops."""
        return self._ids(epoch, self.batches_per_epoch * self.global_batch, self.num_samples)

    def _ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        permutation = Permutation(self.num_samples, self.fingerprint, self.seed, epoch)
        return permutation(np.arange(start, stop))


def rank_slice(ids: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The contiguous slice [B / world] of a global batch [B] that rank `rank` reads."""
    return ids.reshape(world, -1)[rank]


def micro_batches(ids: NDArray[np.int64], accumulation: int) -> NDArray[np.int64]:
    """A rank's slice [b] as micro-batches [accumulation, b / accumulation]."""
    return ids.reshape(accumulation, -1)


def nearest_worlds(global_batch: int, world: int, accumulation: int, even: bool) -> tuple[int, ...]:
    """The largest world up to `world` and the smallest above it that cut the global batch evenly; () where none does.

    `even`: every micro-batch of a rank must hold an even number of samples.
    """
    per_world, remainder = divmod(global_batch, accumulation * (2 if even else 1))
    if remainder:
        return ()
    worlds = [count for count in range(1, per_world + 1) if per_world % count == 0]
    below = [count for count in worlds if count <= world]
    above = [count for count in worlds if count > world]
    return (*below[-1:], *above[:1])


def check_layout(global_batch: int, world: int, accumulation: int, pairs: bool) -> None:
    """UserError unless the global batch cuts into world x accumulation equal micro-batches, even ones if `pairs`.

    `pairs`: mixing is on, whose partners are neighbours inside a micro-batch.
    """
    unit = world * accumulation * (2 if pairs else 1)
    if global_batch > 0 and global_batch % unit == 0:
        return
    below = global_batch // unit * unit
    batches = " or ".join(str(batch) for batch in (below, below + unit) if batch > 0)
    worlds = " or ".join(str(count) for count in nearest_worlds(global_batch, world, accumulation, pairs))
    raise UserError(
        f"a global batch of {global_batch} does not cut evenly into {world} ranks x {accumulation} micro-batches"
        f"{' of pairs (mixing is on)' if pairs else ''}: it must be a multiple of {unit}. "
        f"Set the global batch to {batches}"
        + (f", or run on {worlds} ranks." if worlds else f"; no number of ranks fits {global_batch}.")
    )


def evaluation_share(num_samples: int, rank: int, world: int) -> tuple[int, int]:
    """The range [start, stop) of sample ids that a rank evaluates; the sizes of two ranks differ by at most one."""
    return num_samples * rank // world, num_samples * (rank + 1) // world


def uniforms(seed: int, epoch: int, ids: NDArray[np.integer], stream: int, count: int) -> NDArray[np.float64]:
    """Draws in [0, 1), [len(ids), count], that depend on (seed, epoch, sample id, stream) and on nothing else.

    Each sample has a SplitMix64 sequence of its own; `stream` separates the uses of one sample.
    """
    state = _mix(_keys(1, "uniforms", seed, epoch, stream) ^ _mix(ids.astype(np.uint64) + _GOLDEN_GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN_GAMMA
    return (_mix(state[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _keys(count: int, *parts: int | str) -> NDArray[np.uint64]:
    text = ":".join(str(part) for part in parts)
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), dtype="<u8")


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
