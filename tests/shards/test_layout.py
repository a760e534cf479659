"""How a global batch lies on ranks and micro-batches, of any world: contiguous, complete, and equal but for a pair."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.layout import Layout

WORLDS, ACCUMULATIONS, BATCHES = st.integers(1, 64), st.integers(1, 8), st.integers(1, 1024)


@st.composite
def layouts(draw) -> Layout:
    """Any that are served: about half of them uneven."""
    world, accumulation, mixed = draw(WORLDS), draw(ACCUMULATIONS), draw(st.booleans())
    parts = world * accumulation
    pairs = parts + draw(st.integers(0, 200))
    even = parts * draw(st.integers(1, 4)) * (2 if mixed else 1)
    return Layout(even if draw(st.booleans()) else 2 * pairs, world, accumulation, mixed)


def length(part: slice) -> int:
    return part.stop - part.start


def check_cut(whole: slice, parts: list[slice], step: int) -> None:
    """Contiguous, complete and in order; the first are larger, by `step` samples at most."""
    assert [part.start for part in parts] == [whole.start, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == whole.stop
    sizes = [length(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] in (0, step)
    assert sizes[-1] > 0


@given(layouts())
def test_shares_and_micro_batches_differ_by_a_pair_at_most(layout):
    layout.check()
    step = 0 if layout.is_even else 2
    ranks = range(layout.world)
    check_cut(slice(0, layout.global_batch), [layout.share(rank) for rank in ranks], step)
    for rank in ranks:
        check_cut(layout.share(rank), layout.micro_batches(rank), step)
    sizes = {length(part) for rank in ranks for part in layout.micro_batches(rank)}
    assert sizes == set(layout.sizes)
    assert list(layout.sizes) == sorted(layout.sizes)
    assert layout.is_even == (len(sizes) == 1)


@given(layouts())
def test_pairs_stay_together_where_they_are_mixed(layout):
    assume(layout.mixed or not layout.is_even)
    for rank in range(layout.world):
        assert all(part.start % 2 == part.stop % 2 == 0 for part in layout.micro_batches(rank))


@given(WORLDS, ACCUMULATIONS, st.integers(1, 4), st.booleans())
def test_what_divides_is_cut_as_before_there_were_uneven_shares(world, accumulation, samples, mixed):
    """Runs of such worlds go on bitwise."""
    size = samples * (2 if mixed else 1)
    layout = Layout(world * accumulation * size, world, accumulation, mixed)
    layout.check()
    layout.check_even("never said")
    expected = np.arange(layout.global_batch).reshape(world, accumulation, size)
    found = [[np.arange(layout.global_batch)[part] for part in layout.micro_batches(rank)] for rank in range(world)]
    assert np.array_equal(found, expected)


def test_a_lost_node():
    layout = Layout(4096, 56, 2, mixed=True)
    assert [length(layout.share(rank)) for rank in (0, 31, 32, 55)] == [74, 74, 72, 72]
    assert [length(part) for part in layout.micro_batches(0)] == [38, 36]
    assert layout.describe() == "4096 = 56 ranks x 2 micro-batches x 36 or 38"
    assert Layout(4096, 64, 2).describe() == "4096 = 64 ranks x 2 micro-batches x 32"
    assert Layout(12, 4).describe() == "12 = 4 ranks x 1 micro-batches x 3"
    assert Layout(12, 4, mixed=True).describe() == "12 = 4 ranks x 1 micro-batches x 2 or 4"


@given(BATCHES, WORLDS, ACCUMULATIONS, st.booleans())
def test_a_layout_that_is_refused_names_what_would_work(global_batch, world, accumulation, mixed):
    layout, parts = Layout(global_batch, world, accumulation, mixed), world * accumulation
    divides = global_batch % (parts * (2 if mixed else 1)) == 0
    assert layout.is_even == divides
    if divides or (global_batch % 2 == 0 and global_batch >= 2 * parts):
        layout.check()
    else:
        with pytest.raises(UserError, match=rf"^a global batch of {global_batch} does not cut evenly into {world} ran"):
            layout.check()
    if not divides:
        with pytest.raises(UserError, match=rf"ZeRO, so it must be a multiple of {parts * (2 if mixed else 1)}\."):
            layout.check_even("ZeRO")
    for other in layout.nearest_worlds():
        Layout(global_batch, other, accumulation, mixed).check_even("never said")


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (
            (15, 2),
            "a global batch of 15 does not cut evenly into 2 ranks x 1 micro-batches, and uneven parts are cut in "
            "pairs of samples, of which an odd batch leaves a sample over. Set the global batch to 14 or 16, or run "
            "on 1 or 3 ranks.",
        ),
        ((9, 3, 1, True), "a sample over. Set the global batch to 8 or 10; no number of ranks fits 9."),
        ((3, 8), "Set the global batch to 16, or run on 3 ranks."),
        (
            (16, 9, 1, True),
            "a global batch of 16 does not cut evenly into 9 ranks x 1 micro-batches of pairs (mixing is on), and its "
            "8 pairs of samples are too few for a pair in each of 9 micro-batches: set the global batch to 18 or more, "
            "or run on 8 ranks at most.",
        ),
        ((16, 3, 4), "set the global batch to 24 or more, or run on 2 ranks at most, or take 2 micro-batches at most."),
        (
            (2, 4, 2),
            "its 1 pairs of samples are too few for a pair in each of 8 micro-batches: set the global batch to "
            "16 or more.",
        ),
    ],
)
def test_what_ranks_cannot_share(layout, text):
    with pytest.raises(UserError) as error:
        Layout(*layout).check()
    assert str(error.value).endswith(text)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ((64, 56), "a multiple of 56. Run on 32 or 64 ranks, or set the global batch to 56 or 112, or leave it be."),
        ((2, 3), "a multiple of 3. Run on 2 ranks, or set the global batch to 3, or leave it be."),
        ((12, 4, 1, True), "a multiple of 8. Run on 3 or 6 ranks, or set the global batch to 8 or 16, or leave it be."),
        ((9, 3, 1, True), "of 6. No number of ranks fits 9: set the global batch to 6 or 12, or leave it be."),
    ],
)
def test_what_must_be_even(layout, text):
    with pytest.raises(UserError) as error:
        Layout(*layout).check_even("it is ZeRO", ", or leave it be")
    assert ": it is ZeRO, so it must be " in str(error.value)
    assert str(error.value).endswith(text)
