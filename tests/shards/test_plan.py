"""The stream's promises 1 to 3, on integers alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.keyed import Permutation, uniforms
from shards.plan import Plan, evaluation_share

FINGERPRINT = "0123456789abcdef"
PLANNED = [[890, 346, 364, 309, 389, 459, 761, 398], [711, 76, 807, 237, 308, 245, 29, 425]]
DRAWN = [
    [0.3986484199785826, 0.14391342733672507, 0.9111869787238701],
    [0.30670976708206044, 0.5175465696094683, 0.49032275727011],
]
SIZES = st.integers(1, 2000)
KEYS = st.integers(0, 2**63)
WORLDS = st.integers(1, 64)


@given(SIZES, KEYS)
def test_permutation_is_a_bijection(num_items, key):
    items = Permutation(num_items, key)(np.arange(num_items))
    assert np.array_equal(np.sort(items), np.arange(num_items))


@given(SIZES, KEYS, st.data())
def test_permutation_of_some_positions_is_that_of_all(num_items, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, num_items - 1), min_size=1)))
    permutation = Permutation(num_items, key)
    assert np.array_equal(permutation(positions), permutation(np.arange(num_items))[positions])


@pytest.mark.parametrize("num_items", [1, 2, 3, 4])
def test_permutations_of_few_items_are_about_equally_likely(num_items):
    orders = 1 if num_items == 1 else np.prod(np.arange(1, num_items + 1))
    counts = Counter(tuple(Permutation(num_items, key)(np.arange(num_items))) for key in range(2400))
    assert len(counts) == orders
    assert max(abs(count - 2400 / orders) for count in counts.values()) <= 5 * np.sqrt(2400 / orders)


def test_permutation_forgets_the_order():
    items = Permutation(100_000, 5)(np.arange(100_000))
    assert abs(np.corrcoef(items, np.arange(100_000))[0, 1]) < 0.01
    assert abs(np.corrcoef(items[1:], items[:-1])[0, 1]) < 0.01


def test_permutation_refuses_positions_outside():
    with pytest.raises(ValueError, match=r"positions 0 to 3 are not all in \[0, 3\)"):
        Permutation(3, 1)(np.arange(4))
    with pytest.raises(ValueError, match="a permutation of 0 items"):
        Permutation(0, 1)


def test_plan_is_the_committed_one():
    """A change of these ids breaks the resuming of every run there is."""
    plan = Plan(1000, FINGERPRINT, seed=7, global_batch=8)
    assert plan.ids(0, 0).tolist() == PLANNED[0]
    assert plan.ids(3, 124).tolist() == PLANNED[1]


@given(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9), st.data())
def test_an_epoch_and_its_tail_hold_every_sample_once(num_samples, seed, epoch, data):
    plan = Plan(num_samples, FINGERPRINT, seed, global_batch=data.draw(st.integers(1, num_samples)))
    batches = [plan.ids(epoch, batch) for batch in range(plan.batches_per_epoch)]
    assert all(len(batch) == plan.global_batch for batch in batches)
    tail = plan.tail(epoch)
    assert len(tail) == num_samples % plan.global_batch
    assert np.array_equal(np.sort(np.concatenate([*batches, tail])), np.arange(num_samples))


def test_epochs_seeds_and_datasets_are_shuffled_differently():
    plans = [Plan(500, FINGERPRINT, 0, 500), Plan(500, FINGERPRINT, 1, 500), Plan(500, "f" * 16, 0, 500)]
    orders = {tuple(plan.ids(epoch, 0)) for plan in plans for epoch in (0, 1)}
    assert len(orders) == 6


def test_eleven_million_samples_are_exact_in_the_middle():
    plan = Plan(11_060_223, FINGERPRINT, 0, 4096)
    assert plan.batches_per_epoch == 2700
    near = np.concatenate([plan.ids(17, batch) for batch in range(1340, 1360)])
    assert len(np.unique(near)) == len(near)
    assert near.min() >= 0
    assert near.max() < 11_060_223
    everything = Permutation(11_060_223, FINGERPRINT, 0, 17)
    assert np.array_equal(plan.ids(17, 1350), everything(np.arange(1350 * 4096, 1351 * 4096)))
    assert len(plan.tail(17)) == 11_060_223 - 2700 * 4096


def test_an_epoch_without_batches_is_an_error():
    text = "a global batch of 64 cannot be drawn from a split of 63 samples.*between 1 and 63"
    with pytest.raises(UserError, match=text):
        Plan(63, FINGERPRINT, 0, 64)
    with pytest.raises(UserError, match="a global batch of 0"):
        Plan(63, FINGERPRINT, 0, 0)
    with pytest.raises(IndexError, match="batch 2 of an epoch of 2 batches"):
        Plan(63, FINGERPRINT, 0, 30).ids(0, 2)


@given(st.integers(0, 3000), WORLDS)
def test_evaluation_shares_cover_the_split_evenly(num_samples, world):
    shares = [evaluation_share(num_samples, rank, world) for rank in range(world)]
    assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
    assert shares[-1][1] == num_samples
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


def test_uniforms_are_the_committed_ones():
    draws = uniforms(7, 1, np.array([0, 11_060_222]), stream=2, count=3)
    assert draws.tolist() == DRAWN


def test_uniforms_depend_on_the_sample_and_not_on_its_neighbours():
    ids = np.array([5, 0, 9, 5])
    draws = uniforms(1, 2, ids, 0, 4)
    assert draws.shape == (4, 4)
    assert np.array_equal(draws[0], draws[3])
    assert np.array_equal(draws[2:3], uniforms(1, 2, ids[2:3], 0, 4))
    assert np.array_equal(draws[:, :2], uniforms(1, 2, ids, 0, 2))
    assert uniforms(1, 2, ids[:0], 0, 4).shape == (0, 4)


def test_uniforms_look_uniform_and_independent():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = np.concatenate([uniforms(seed, epoch, np.arange(40_000), stream, 2) for seed, epoch, stream in keys], 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.006
    assert np.abs(draws.var(0) - 1 / 12).max() < 0.002
    assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.02
    assert np.abs(np.corrcoef(draws[1:].T, draws[:-1].T)[:8, 8:]).max() < 0.02
    assert np.ptp(np.histogram(draws, 20)[0]) < 1200
