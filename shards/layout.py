"""Which samples of a global batch which rank takes, and in which micro-batches: pure functions of integers."""

from collections.abc import Iterable
from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class Layout:
    """A global batch as [rank][micro-batch][sample], in its own order.

    Parts are equal where the batch divides so. Else ranks take shares that differ by one pair of samples at most, as do
    the micro-batches of a rank, and the first of both take the larger ones. Pairs stay together because mixing partners
    are neighbours; where nothing is mixed uneven parts are of pairs, too. `mixed`: equal parts must be of pairs.
    """

    global_batch: int
    world: int
    accumulation: int = 1
    mixed: bool = False

    @property
    def is_even(self) -> bool:
        """Whether all micro-batches of all ranks are equal."""
        return self.global_batch > 0 and self.global_batch % self._divisor == 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many samples micro-batches have, ascending: one number or two."""
        smallest, largest = self.micro_batches(self.world - 1)[-1], self.micro_batches(0)[0]
        return tuple(sorted({part.stop - part.start for part in (smallest, largest)}))

    def share(self, rank: int) -> slice:
        """The positions in the global batch that a rank takes."""
        return self._part(slice(0, self.global_batch), rank, self.world)

    def micro_batches(self, rank: int) -> list[slice]:
        """The positions of each micro-batch of a rank."""
        share = self.share(rank)
        return [self._part(share, number, self.accumulation) for number in range(self.accumulation)]

    def nearest_worlds(self) -> tuple[int, ...]:
        """The largest world up to this one and the smallest above it that are even; () where none is."""
        per_world, remainder = divmod(self.global_batch, self._divisor // self.world)
        worlds = [count for count in range(1, per_world + 1) if per_world % count == 0 and not remainder]
        below = [count for count in worlds if count <= self.world]
        above = [count for count in worlds if count > self.world]
        return (*below[-1:], *above[:1])

    def describe(self) -> str:
        """The arithmetic, as `16 = 3 ranks x 2 micro-batches x 2 or 4`."""
        sizes = _any_of(self.sizes)
        return f"{self.global_batch} = {self.world} ranks x {self.accumulation} micro-batches x {sizes}"

    def check(self) -> None:
        """UserError unless every micro-batch of every rank has samples, and none is left over."""
        pairs, left_over = divmod(self.global_batch, 2)
        if self.is_even:
            return
        if left_over:
            raise UserError(self._is_odd())
        if pairs < self.world * self.accumulation:
            raise UserError(self._is_small(pairs))

    def check_even(self, why: str, instead: str = "") -> None:
        """UserError, with the reason and another way out, unless all micro-batches are equal."""
        if self.is_even:
            return
        below = self.global_batch // self._divisor * self._divisor
        batches = _any_of(batch for batch in (below, below + self._divisor) if batch > 0)
        worlds = _any_of(self.nearest_worlds())
        raise UserError(
            f"{self._does_not_cut()}: {why}, so it must be a multiple of {self._divisor}. "
            + (f"Run on {worlds} ranks, or" if worlds else f"No number of ranks fits {self.global_batch}:")
            + f" set the global batch to {batches}{instead}."
        )

    @property
    def _divisor(self) -> int:
        """Of the global batches that are cut into equal parts."""
        return self.world * self.accumulation * (2 if self.mixed else 1)

    def _part(self, whole: slice, number: int, parts: int) -> slice:
        """Part `number` of `parts` of a range; the first are larger, as of numpy.array_split."""
        together = 1 if self.is_even else 2
        size, larger = divmod((whole.stop - whole.start) // together, parts)
        start = number * size + min(number, larger)
        stop = start + size + (number < larger)
        return slice(whole.start + start * together, whole.start + stop * together)

    def _does_not_cut(self) -> str:
        return (
            f"a global batch of {self.global_batch} does not cut evenly into {self.world} ranks x {self.accumulation} "
            f"micro-batches{' of pairs (mixing is on)' if self.mixed else ''}"
        )

    def _is_odd(self) -> str:
        batch, least, worlds = self.global_batch, 2 * self.world * self.accumulation, _any_of(self.nearest_worlds())
        return (
            f"{self._does_not_cut()}, and uneven parts are cut in pairs of samples, of which an odd batch leaves a "
            f"sample over. Set the global batch to {_any_of((batch - 1, batch + 1) if batch > least else (least,))}"
            + (f", or run on {worlds} ranks." if worlds else f"; no number of ranks fits {batch}.")
        )

    def _is_small(self, pairs: int) -> str:
        most_ranks, most_micro_batches = pairs // self.accumulation, pairs // self.world
        return (
            f"{self._does_not_cut()}, and its {pairs} pairs of samples are too few for a pair in each of "
            f"{self.world * self.accumulation} micro-batches: set the global batch to "
            f"{2 * self.world * self.accumulation} or more"
            + (f", or run on {most_ranks} ranks at most" if most_ranks else "")
            + (f", or take {most_micro_batches} micro-batches at most" if most_micro_batches else "")
            + "."
        )


def _any_of(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)
