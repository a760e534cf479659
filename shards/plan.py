"""Which samples make up which global batch: pure functions of integers, without I/O.

Shapes: B global batch, N samples of the split, G runs of a window shuffle.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.keyed import Permutation, Permutations

Ids = NDArray[np.int64]
Order = Callable[[Ids], Ids]
"""Positions in an epoch (its batches one after the other, then its tail) -> sample ids."""

_MAX_RUNS = 64
_MIXING_SAMPLES = 2**19


class Shuffle(Protocol):
    """How an epoch is ordered."""

    def check(self, plan: "Plan") -> None:
        """UserError where the plan's batches cannot be drawn so."""

    def order(self, plan: "Plan", epoch: int) -> Order:
        """The order of an epoch: a bijection on [0, N)."""

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps of it; a run goes on only with the same."""


@dataclass(frozen=True)
class GlobalShuffle:
    """A true permutation of the split, for storage with random access: no memory, no state."""

    def check(self, plan: "Plan") -> None:
        pass

    def order(self, plan: "Plan", epoch: int) -> Order:
        return Permutation(plan.num_samples, plan.fingerprint, plan.seed, epoch)

    def state(self) -> dict[str, object]:
        return {"shuffle": "global"}


@dataclass(frozen=True, eq=False)
class WindowShuffle:
    """Shards in a permuted order, cut into `runs` of N // runs samples; each run is shuffled inside windows.

    A global batch is B / runs consecutive samples of each run, so that the ranks of a node, which take neighbouring
    parts of it, read neighbouring runs: few shards at a time, front to back. The windows of a run are equal to within a
    sample, and hold about `window`; what no run gets (N mod runs) is the end of the tail.
    """

    shard_sizes: tuple[int, ...] = field(repr=False)
    runs: int
    window: int

    def check(self, plan: "Plan") -> None:
        if self.runs < 1 or plan.global_batch % self.runs:
            raise UserError(
                f"a window shuffle of {self.runs} runs: a global batch of {plan.global_batch} takes as many samples of "
                f"each; give a divisor of {plan.global_batch}, or 0 for {default_runs(plan.global_batch)}"
            )
        if self.window < 1:
            raise UserError(f"a window of {self.window} samples: at least 1 is needed; thousands mix well")
        if sum(self.shard_sizes) != plan.num_samples:
            raise ValueError(f"shards of {sum(self.shard_sizes)} samples in a plan of {plan.num_samples}")

    def order(self, plan: "Plan", epoch: int) -> Order:
        sizes = np.array(self.shard_sizes, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        shards = Permutation(len(sizes), plan.fingerprint, plan.seed, epoch, "shards")(np.arange(len(sizes)))
        ends = np.cumsum(sizes[shards])
        shifts = starts[shards] - (ends - sizes[shards])
        run_length = plan.num_samples // self.runs
        num_windows = max(1, round(run_length / self.window))
        shuffled = Permutations(-(-run_length // num_windows), plan.fingerprint, plan.seed, epoch, "windows")

        def ids(positions: Ids) -> Ids:
            runs, offsets = self._in_runs(plan, positions)
            windows = ((offsets + 1) * num_windows - 1) // run_length
            first = windows * run_length // num_windows
            lengths = (windows + 1) * run_length // num_windows - first
            within = runs < self.runs  # else in the remainder, which stays as it is
            numbers = (runs * num_windows + windows)[within]
            offsets[within] = first[within] + shuffled(numbers, lengths[within], (offsets - first)[within])
            placed = runs * run_length + offsets
            return placed + shifts[np.searchsorted(ends, placed, side="right")]

        return ids

    def _in_runs(self, plan: "Plan", positions: Ids) -> tuple[Ids, Ids]:
        """The run of each position of the epoch, and the position in it; the remainder is run G."""
        share, batches = plan.global_batch // self.runs, plan.batches_per_epoch
        batch, place = np.divmod(positions, plan.global_batch)
        planned = place // share, batch * share + place % share
        left = plan.num_samples // self.runs - batches * share  # of each run, for the tail
        past = positions - batches * plan.global_batch
        in_tail = np.minimum(past // max(left, 1), self.runs) if left else np.full_like(past, self.runs)
        dropped = in_tail, np.where(in_tail < self.runs, batches * share + past % max(left, 1), past - self.runs * left)
        return np.where(past < 0, planned[0], dropped[0]), np.where(past < 0, planned[1], dropped[1])

    def state(self) -> dict[str, object]:
        return {"shuffle": "window", "runs": self.runs, "window": self.window}


def default_runs(global_batch: int) -> int:
    """The largest divisor of the global batch up to 64."""
    return max(runs for runs in range(1, _MAX_RUNS + 1) if global_batch % runs == 0)


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
    shuffle: Shuffle = GlobalShuffle()

    def __post_init__(self) -> None:
        if not 1 <= self.global_batch <= self.num_samples:
            raise UserError(
                f"a global batch of {self.global_batch} cannot be drawn from a split of {self.num_samples} samples: "
                f"an epoch would have no batch. Set the global batch between 1 and {self.num_samples}, or add samples."
            )
        self.shuffle.check(self)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    def ids(self, epoch: int, batch: int) -> Ids:
        """Sample ids [B] of global batch `batch` of the epoch; costs O(B) wherever it lies. IndexError past the end."""
        if not 0 <= batch < self.batches_per_epoch:
            raise IndexError(f"batch {batch} of an epoch of {self.batches_per_epoch} batches")
        return self._ids(epoch, batch * self.global_batch, (batch + 1) * self.global_batch)

    def tail(self, epoch: int) -> Ids:
        """Sample ids [N mod B] that the epoch drops."""
        return self._ids(epoch, self.batches_per_epoch * self.global_batch, self.num_samples)

    def _ids(self, epoch: int, start: int, stop: int) -> Ids:
        return _order(self, epoch)(np.arange(start, stop))


@functools.lru_cache(maxsize=4)
def _order(plan: Plan, epoch: int) -> Order:
    return plan.shuffle.order(plan, epoch)


def mixing_distance(plan: Plan, epoch: int = 0) -> float:
    """How many samples apart, in the median, neighbours in storage come in the epoch; about 0.29 N where all is random.

    Measured over the batches of an epoch; of a window shuffle over its first half million samples, or, where these are
    more, its first four windows. nan where they hold no neighbours.
    """
    span = plan.num_samples
    if isinstance(plan.shuffle, WindowShuffle):
        span = min(span, max(_MIXING_SAMPLES, 4 * plan.shuffle.runs * plan.shuffle.window))
    batches = range(max(1, span // plan.global_batch))
    ids = np.concatenate([plan.ids(epoch, batch) for batch in batches])
    order = np.argsort(ids)
    neighbours = np.diff(ids[order]) == 1
    return float(np.median(np.abs(np.diff(order))[neighbours])) if neighbours.any() else float("nan")


def evaluation_share(num_samples: int, rank: int, world: int) -> tuple[int, int]:
    """The range [start, stop) of sample ids that a rank evaluates; the sizes of two ranks differ by at most one."""
    return num_samples * rank // world, num_samples * (rank + 1) // world
