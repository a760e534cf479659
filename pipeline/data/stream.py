"""The stream as the trainer sees it: planned in the main process, decoded in workers, moved to the device."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.backend.world import World
from pipeline.data.batch import PADDING, Batch, Request
from pipeline.data.loading import Loading, load
from pipeline.data.samples import Samples
from shards.errors import UserError
from shards.layout import Layout
from shards.plan import Ids, Plan, WindowShuffle, evaluation_share, mixing_distance
from shards.reader import Reader

_AHEAD = 2**17  # samples of the global sequence; some windows of most plans


@dataclass(frozen=True)
class TrainStream:
    """This rank's part of every global batch of a run: exact, the same for any world, and O(1) to enter anywhere."""

    samples: Samples[Reader]
    plan: Plan
    world: World
    layout: Layout
    loading: Loading

    def requests(self, start: int, stop: int) -> Iterator[Request]:
        """The micro-batches of optimizer steps start .. stop - 1, in order."""
        parts = self.layout.micro_batches(self.world.rank)
        for step in range(start, stop):
            ids = self._global_batch(step)
            for part in parts:
                yield Request(ids[part], part.start, step, step // self.plan.batches_per_epoch)

    def _global_batch(self, step: int) -> Ids:
        return self.plan.ids(*divmod(step, self.plan.batches_per_epoch))

    @contextmanager
    def open(self, start: int, stop: int) -> Iterator[Iterator[list[Batch]]]:
        """An iterator of one optimizer step's micro-batches after another; workers end with the context.

        The images of a step stay as they are until the next step is asked for: their memory is used again.
        """
        largest, accumulation = self.layout.sizes[-1], self.layout.accumulation
        with (
            closing(self.samples.reader.store),
            load(self.samples, self._announced(start, stop), self.loading, largest, accumulation) as batches,
        ):
            # The same iterator `accumulation` times: consecutive batches make a step.
            yield (list(step) for step in zip(*[batches] * accumulation, strict=True))

    def _announced(self, start: int, stop: int) -> Iterator[Request]:
        """The requests; ahead of each step, its shards are announced to a store that fetches whole shards."""
        reader = self.samples.reader
        if not reader.store.fetches_ahead:
            yield from self.requests(start, stop)
            return
        announced, ahead = start, max(1, _AHEAD // self.plan.global_batch)
        share = self.layout.share(self.world.rank)
        for step in range(start, stop):
            until = min(step + ahead, stop)
            reader.store.ahead(
                name for later in range(announced, until) for name in reader.shards_of(self._global_batch(later)[share])
            )
            announced = until
            yield from self.requests(step, step + 1)

    def describe(self) -> str:
        """How epochs are ordered, how well that mixes, and what a node fetches of them."""
        plan, nodes = self.plan, self.world.nodes
        if not isinstance(plan.shuffle, WindowShuffle):
            if self.samples.reader.store.fetches_ahead:
                return (
                    "global shuffle of remote shards: a cache that does not hold the whole split fetches a shard for "
                    "every sample; then give --data.shuffle window, or --data.remote range"
                )
            return "global shuffle" + (f": each of the {nodes} nodes reads all shards" if nodes > 1 else "")
        runs, apart = plan.shuffle.runs, mixing_distance(plan)
        share = f"about 1/{nodes}" if self._nodes_take_whole_runs(runs) else f"more than 1/{nodes} (nodes share runs)"
        return (
            f"window shuffle of {runs} runs, {plan.shuffle.window:,} samples a window: neighbours in storage come "
            f"{apart:,.0f} samples apart in the median (all over the epoch: {0.29 * plan.num_samples:,.0f}); a node "
            f"fetches {share} of the shards an epoch"
        )

    def _nodes_take_whole_runs(self, runs: int) -> bool:
        first_ranks = range(0, self.world.size, self.world.size // self.world.nodes)
        return all(self.layout.share(rank).start % (self.plan.global_batch // runs) == 0 for rank in first_ranks)

    def state(self, done: int) -> dict[str, object]:
        """Where the trainer stands after `done` steps: what is planned next follows from it, on any world."""
        plan = self.plan
        epoch, batches = divmod(done, plan.batches_per_epoch)
        key = {"fingerprint": plan.fingerprint, "seed": plan.seed, "global_batch": plan.global_batch}
        return key | plan.shuffle.state() | {"epoch": epoch, "batches": batches}

    def check_state(self, state: dict[str, object], where: object) -> None:
        """Raises UserError where a state of another index, seed, global batch or shuffle would be continued."""
        own = self.state(0)
        for name in (state | own).keys() - {"epoch", "batches"}:
            if state.get(name) != own.get(name):
                raise UserError(
                    f"{where} was made with the data's {name} {state.get(name)}, but it is {own.get(name)} now: the "
                    "rest of the epoch would repeat some samples and miss others; give the data and recipe it was made "
                    "with, or another --run-dir to start anew"
                )

    def check_disjoint(self) -> None:
        """Raises UserError where two ranks would train on the same samples (a stream sharded twice, or not at all)."""
        ids = next(self.requests(0, 1)).ids.tolist()
        everyone = [sample for rank in self.world.gather(ids) for sample in rank]
        if len(set(everyone)) < len(everyone):
            raise UserError(
                f"the first micro-batches of the {self.world.size} ranks hold {len(everyone)} samples, but only "
                f"{len(set(everyone))} different ones: ranks disagree on rank, world, seed or index, and would train "
                "on the same samples; start all of them with one launcher, on the same data and recipe"
            )


@contextmanager
def evaluation_batches(samples: Samples, batch: int, world: World, loading: Loading) -> Iterator[Iterator[Batch]]:
    """This rank's share of a split, every sample once. All ranks get equally many batches of equal size, as sharded
    models need; what fills them up has the id PADDING. A batch's images stay until the next one is asked for."""
    start, stop = evaluation_share(len(samples.reader), world.rank, world.size)
    largest = -(-len(samples.reader) // world.size)
    ids = np.full(-(-largest // batch) * batch, PADDING, dtype=np.int64)
    ids[: stop - start] = np.arange(start, stop)
    requests = (Request(part, 0, 0, 0) for part in ids.reshape(-1, batch))
    with load(samples, requests, loading, batch) as batches:
        yield batches


def arriving(batches: Iterable[Batch], world: World, work: str) -> Iterator[Batch]:
    """The batches, of which all ranks have equally many; raises Stopped, on all, where one was signalled. `work`: what
    they are for."""
    coming = iter(batches)
    for number in itertools.count(1):
        world.place.at(f"{work}: waiting for batch {number}")
        batch = world.stop.wait_for(partial(next, coming, None))
        world.reach(f"{work}: batch {number}")
        if batch is None:
            return
        yield batch
