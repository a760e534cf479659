"""The stream's promises 1 to 4 for any size, world and shuffle: permutation, world-free, seek, locality of windows."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backend.world import World
from pipeline.data.batch import Filled
from pipeline.data.loading import Loading, load
from pipeline.data.stream import TrainStream
from shards.audit import audit_epoch
from shards.errors import UserError
from shards.keyed import Permutations, id_hash
from shards.layout import Layout
from shards.plan import GlobalShuffle, Plan, WindowShuffle, default_runs, mixing_distance

FINGERPRINT = "0123456789abcdef"
CPU = torch.device("cpu")
# Of 1,000 samples in shards of 40, global batches of 8 from 4 runs in windows of 20, seed 7: epoch 0, batch 0; epoch 3,
# its last batch.
WINDOWED = [[606, 603, 583, 581, 345, 347, 768, 994], [275, 649, 564, 574, 299, 305, 824, 837]]


def divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]


def cut(num_samples: int, cuts: list[int]) -> tuple[int, ...]:
    """Shard sizes that add up to `num_samples`."""
    ends = sorted({1 + cut % num_samples for cut in cuts} | {num_samples})
    return tuple(np.diff([0, *ends]).tolist())


@st.composite
def shuffles(draw, num_samples: int, global_batch: int):
    if draw(st.booleans()):
        return GlobalShuffle()
    shard_sizes = cut(num_samples, draw(st.lists(st.integers(0, 2**20), max_size=20)))
    runs = draw(st.sampled_from(divisors(global_batch)))
    return WindowShuffle(shard_sizes, runs, draw(st.integers(1, num_samples + 1)))


@st.composite
def plans(draw, global_batch: int | None = None) -> Plan:
    """Any plan, of 1 to some thousand samples."""
    batch = global_batch or draw(st.integers(1, 300))
    num_samples = batch * draw(st.integers(1, 4)) + draw(st.integers(0, batch - 1))
    shuffle = draw(shuffles(num_samples, batch))
    return Plan(num_samples, FINGERPRINT, draw(st.integers(0, 2**40)), batch, shuffle)


EPOCHS = st.integers(0, 1000)


@given(plans(), EPOCHS)
def test_an_epoch_and_its_tail_are_a_permutation(plan, epoch):
    batches = [plan.ids(epoch, batch) for batch in range(plan.batches_per_epoch)]
    assert {len(batch) for batch in batches} == {plan.global_batch}
    tail = plan.tail(epoch)
    assert len(tail) == plan.num_samples % plan.global_batch
    assert np.array_equal(np.sort(np.concatenate([*batches, tail])), np.arange(plan.num_samples))
    audit = audit_epoch(plan, epoch)
    assert audit.is_exact
    assert (audit.num_planned, audit.num_dropped) == (plan.batches_per_epoch * plan.global_batch, len(tail))
    assert audit.hash == id_hash(np.arange(plan.num_samples))


def requests(plan: Plan, rank: int, world: int, accumulation: int, start: int, stop: int) -> list:
    layout = Layout(plan.global_batch, world, accumulation)
    stream = TrainStream(None, plan, World("ddp", rank, world, CPU), layout, None)
    return list(stream.requests(start, stop))


@settings(max_examples=50)
@given(st.integers(1, 32), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.data())
def test_all_ranks_together_ask_for_the_global_batches(world, accumulation, samples, more_pairs, data):
    """On any world, also on one that does not divide the batch: so that the content is the same on any two."""
    parts = world * accumulation
    plan = data.draw(plans(parts * samples if data.draw(st.booleans()) else 2 * (parts + more_pairs)))
    start = data.draw(st.integers(0, 5))
    asked = [requests(plan, rank, world, accumulation, start, start + 2) for rank in range(world)]
    assert {len(ranks) for ranks in asked} == {2 * accumulation}
    for number, step in enumerate(range(start, start + 2)):
        parts = [part for ranks in asked for part in ranks[number * accumulation : (number + 1) * accumulation]]
        epoch, batch = divmod(step, plan.batches_per_epoch)
        assert np.array_equal(np.concatenate([part.ids for part in parts]), plan.ids(epoch, batch))
        assert [part.first for part in parts] == np.cumsum([0, *(len(part.ids) for part in parts[:-1])]).tolist()
        assert {(part.step, part.epoch) for part in parts} == {(step, epoch)}


@given(plans(), st.integers(0, 12), st.data())
def test_seeking_is_dropping(plan, start, data):
    pairs = 0 if plan.global_batch % 2 else plan.global_batch // 2
    world = data.draw(st.sampled_from(divisors(plan.global_batch)) | st.integers(1, max(pairs, 1)))
    rank = data.draw(st.integers(0, world - 1))
    whole = requests(plan, rank, world, 1, 0, start + 2)
    anew = Plan(plan.num_samples, plan.fingerprint, plan.seed, plan.global_batch, plan.shuffle)
    for expected, found in zip(whole[start:], requests(anew, rank, world, 1, start, start + 2), strict=True):
        assert np.array_equal(expected.ids, found.ids)
        assert expected[1:] == found[1:]


class Echo:
    """In the place of samples: gives back what is asked for, the ids as images of a pixel."""

    largest = 1

    def image_size_at(self, epoch) -> int:
        return 1

    def fill(self, request, images) -> Filled:
        images[:] = request.ids[:, None, None, None]
        return Filled(request.ids, ())


@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes")
@pytest.mark.parametrize("workers", [0, 1, 8])
def test_any_number_of_workers_keeps_the_order(workers):
    plan = Plan(100, FINGERPRINT, 0, 24)
    asked = requests(plan, 1, 2, 3, 2, 9)
    with load(Echo(), iter(asked), Loading(workers, CPU), batch=4) as batches:
        came = [(batch.images[:, 0, 0, 0].tolist(), batch.first, batch.step, batch.epoch) for batch in batches]
    assert came == [(ids.tolist(), *rest) for ids, *rest in asked]


# --- the window shuffle


@dataclass(frozen=True)
class Windowed:
    """An epoch of a plan, by runs: `stored` and `played` [runs, samples of a run], as they lie and as they come."""

    plan: Plan
    epoch: int
    stored: np.ndarray
    played: np.ndarray
    windows: list[tuple[int, int]]

    @property
    def share(self) -> int:
        return self.plan.global_batch // self.plan.shuffle.runs


def epoch_of(plan: Plan, epoch: int) -> np.ndarray:
    return np.concatenate([*(plan.ids(epoch, batch) for batch in range(plan.batches_per_epoch)), plan.tail(epoch)])


@st.composite
def windowed(draw) -> Windowed:
    batch = draw(st.integers(1, 64))
    num_samples = batch * draw(st.integers(1, 20)) + draw(st.integers(0, batch - 1))
    sizes = cut(num_samples, draw(st.lists(st.integers(0, 2**20), max_size=20)))
    shuffle = WindowShuffle(sizes, draw(st.sampled_from(divisors(batch))), draw(st.integers(1, num_samples)))
    seed, epoch = draw(st.integers(0, 99)), draw(EPOCHS)
    plan = Plan(num_samples, FINGERPRINT, seed, batch, shuffle)
    length = num_samples // shuffle.runs
    # One run in windows of one sample: the shards as they are permuted, each front to back.
    lying = Plan(num_samples, FINGERPRINT, seed, num_samples, WindowShuffle(sizes, 1, 1)).ids(epoch, 0)
    stored = lying[: shuffle.runs * length].reshape(shuffle.runs, length)
    share, batches = batch // shuffle.runs, plan.batches_per_epoch
    in_batches = [plan.ids(epoch, number).reshape(shuffle.runs, share) for number in range(batches)]
    rest = plan.tail(epoch)[: shuffle.runs * (length - batches * share)].reshape(shuffle.runs, -1)
    count = max(1, round(length / shuffle.window))
    windows = [(number * length // count, (number + 1) * length // count) for number in range(count)]
    return Windowed(plan, epoch, stored, np.concatenate([*in_batches, rest], axis=1), windows)


@given(st.integers(1, 400), st.lists(st.integers(0, 2**20), max_size=20), st.integers(0, 99), EPOCHS)
def test_shards_are_permuted_whole(num_samples, cuts, seed, epoch):
    sizes = cut(num_samples, cuts)
    order = Plan(num_samples, FINGERPRINT, seed, num_samples, WindowShuffle(sizes, 1, 1)).ids(epoch, 0)
    ends = np.cumsum(sizes)
    shards = {int(end - size): list(range(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True)}
    while len(order):
        shard = shards.pop(int(order[0]))
        assert order[: len(shard)].tolist() == shard
        order = order[len(shard) :]
    assert not shards


@given(windowed())
def test_samples_stay_in_their_run_and_window(found):
    for first, end in found.windows:
        assert np.array_equal(np.sort(found.played[:, first:end], axis=1), np.sort(found.stored[:, first:end], axis=1))


@given(windowed(), st.data())
def test_a_part_of_a_batch_comes_from_few_shards(found, data):
    """Consecutive samples of a run: of the shards under the windows that they lie in."""
    batch = data.draw(st.integers(0, found.plan.batches_per_epoch - 1))
    start, stop = batch * found.share, (batch + 1) * found.share
    touched = [(first, end) for first, end in found.windows if first < stop and end > start]
    span = touched[-1][1] - touched[0][0]
    sizes = found.plan.shuffle.shard_sizes
    shards = np.searchsorted(np.cumsum(sizes), found.played[:, start:stop], side="right")
    most = 1 + -(-(span - 1) // min(sizes))
    assert all(len(set(run)) <= most for run in shards.tolist())


@given(windowed(), st.data())
def test_a_rank_reads_its_own_runs(found, data):
    world = data.draw(st.sampled_from(divisors(found.plan.shuffle.runs)))
    rank = data.draw(st.integers(0, world - 1))
    share = Layout(found.plan.global_batch, world).share(rank)
    ids = [found.plan.ids(found.epoch, batch)[share] for batch in range(found.plan.batches_per_epoch)]
    own = found.stored.reshape(world, -1)[rank]
    assert np.isin(np.concatenate(ids), own).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_windows_are_shuffled_each_in_its_own_way(size):
    """All orders of the few samples of a window are about equally likely over the windows of one epoch."""
    num_samples = 2400 * size
    plan = Plan(num_samples, FINGERPRINT, 0, num_samples, WindowShuffle((num_samples,), 1, size))
    windows = plan.ids(0, 0).reshape(-1, size)
    counts = Counter(tuple(np.argsort(window)) for window in windows)
    orders = int(np.prod(np.arange(1, size + 1)))
    assert len(counts) == orders
    assert max(abs(count - 2400 / orders) for count in counts.values()) <= 5 * np.sqrt(2400 / orders)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 50), st.integers(0, 99))
def test_many_permutations_are_as_many_bijections(smaller, largest, key):
    sizes = np.array([largest - size % (largest // 2 + 1) for size in smaller])
    domains = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    items = Permutations(largest, key)(domains, sizes[domains], positions)
    for domain, size in enumerate(sizes):
        assert np.array_equal(np.sort(items[domains == domain]), np.arange(size))


def test_a_window_plan_is_the_committed_one():
    """A change of these ids breaks the resuming of every run there is."""
    plan = Plan(1000, FINGERPRINT, 7, 8, WindowShuffle((40,) * 25, 4, 20))
    assert [plan.ids(0, 0).tolist(), plan.ids(3, 124).tolist()] == WINDOWED


def test_epochs_seeds_and_datasets_are_windowed_differently():
    shuffle = WindowShuffle((50,) * 10, 4, 30)
    plans = [Plan(500, name, seed, 100, shuffle) for name, seed in ((FINGERPRINT, 0), (FINGERPRINT, 1), ("f" * 16, 0))]
    orders = {tuple(plan.ids(epoch, 0).tolist()) for plan in plans for epoch in (0, 1)}
    assert len(orders) == 6


@given(st.integers(1, 5000))
def test_default_runs_are_the_largest_divisor_to_64(global_batch):
    assert default_runs(global_batch) == [runs for runs in divisors(global_batch) if runs <= 64][-1]


@pytest.mark.parametrize(
    ("runs", "window", "text"),
    [
        (5, 10, "a window shuffle of 5 runs: a global batch of 32 takes as many samples of each; give a divisor of 32, "
                "or 0 for 32$"),
        (0, 10, "a window shuffle of 0 runs"),
        (-4, 10, "a window shuffle of -4 runs"),
        (64, 10, "a window shuffle of 64 runs"),
        (4, 0, "a window of 0 samples: at least 1 is needed; thousands mix well$"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be(runs, window, text):
    with pytest.raises(UserError, match=text):
        Plan(100, FINGERPRINT, 0, 32, WindowShuffle((60, 40), runs, window))


def test_shards_of_another_split():
    with pytest.raises(ValueError, match="shards of 99 samples in a plan of 100"):
        Plan(100, FINGERPRINT, 0, 32, WindowShuffle((60, 39), 4, 10))


# --- how well it mixes


def test_the_mixing_distance_is_that_of_neighbours():
    plan = Plan(600, FINGERPRINT, 0, 200, WindowShuffle((100,) * 6, 4, 40))
    order = np.concatenate([plan.ids(2, batch) for batch in range(3)]).tolist()
    apart = [abs(order.index(sample) - order.index(sample + 1)) for sample in range(599)]
    assert mixing_distance(plan, 2) == np.median(apart)


def test_mixing_distances():
    sizes = (1000,) * 100
    still, small, large = (WindowShuffle(sizes, runs, window) for runs, window in ((1, 1), (8, 200), (8, 2000)))
    distances = [
        mixing_distance(Plan(100_000, FINGERPRINT, 0, 800, how)) for how in (still, small, large, GlobalShuffle())
    ]
    assert distances[0] == 1
    assert distances == sorted(distances)
    assert distances[1] < 0.1 * distances[3] < distances[2] < distances[3]
    assert distances[3] == pytest.approx(29_000, rel=0.03)
    assert np.isnan(mixing_distance(Plan(1, FINGERPRINT, 0, 1)))


# --- the audit finds what is not exact


@dataclass(frozen=True)
class Replaced:
    """A shuffle, some of whose positions get another id."""

    changes: tuple[tuple[int, int], ...]

    def check(self, plan: Plan) -> None:
        pass

    def order(self, plan: Plan, epoch: int):
        order = np.arange(plan.num_samples)
        for position, sample in self.changes:
            order[position] = sample
        return lambda positions: order[positions]


@settings(max_examples=200)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(-2, 45)), max_size=4), st.data())
def test_an_audit_counts_what_is_wrong(num_samples, changes, data):
    inside = tuple((position % num_samples, sample) for position, sample in changes)
    plan = Plan(num_samples, FINGERPRINT, 0, data.draw(st.integers(1, num_samples)), Replaced(inside))
    counts = Counter(epoch_of(plan, 0).tolist())
    audit = audit_epoch(plan, 0)
    in_split = {sample: count for sample, count in counts.items() if 0 <= sample < num_samples}
    assert audit.num_duplicates == sum(in_split.values()) - len(in_split)
    assert audit.num_missing == num_samples - len(in_split)
    assert audit.num_outside == num_samples - sum(in_split.values())
    exact = set(counts) == set(range(num_samples))
    assert audit.is_exact == (audit.hash == audit.split_hash) == exact
