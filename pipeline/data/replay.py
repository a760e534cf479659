"""What the ranks of a run would be given, and whether it is what was planned."""

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.augment.exact import decode
from pipeline.backend.world import World
from pipeline.data.batch import Batch, Request
from pipeline.data.loading import Loading, load
from pipeline.data.samples import Samples
from pipeline.data.stream import TrainStream
from shards.layout import Layout
from shards.members import MemberReader
from shards.plan import Ids, Plan
from shards.reader import BadSample

_MAX_WRONG = 20
_PIXELS = np.zeros((2, 2, 3), dtype=np.uint8)  # room for an id of 8 bytes


class IdReader(MemberReader):
    """Gives the id of a sample instead of its image, so that the workers themselves say what they delivered."""

    def read(self, sample_id: int, decode: Callable[[bytes], Any]) -> tuple[Any, int]:
        _, label = super().read(sample_id, decode)
        return np.frombuffer(sample_id.to_bytes(_PIXELS.size, "little"), dtype=np.uint8).reshape(_PIXELS.shape), label


@dataclass(frozen=True)
class ReadOnly:
    """A transform that reads an image, decodes it as the exact path does where `decodes`, and keeps nothing of it."""

    decodes: bool
    image_size: ClassVar[int] = len(_PIXELS)
    num_draws: ClassVar[int] = 0

    def __call__(self, data: bytes, draws: np.ndarray) -> np.ndarray:
        if self.decodes:
            decode(data)
        return _PIXELS


class Replay:
    """The steps of an epoch, as all ranks of a world would see them, and what is found on the way.

    Over the steps replayed: `num_planned` samples, `num_quarantined` of them bad, `num_substitutes` that came in their
    place, and `num_delivered` altogether. `bad`: different samples, by id. `wrong`: what is not as planned, in words;
    nothing but a defect of the stream itself can bring it about.
    """

    def __init__(self, reader: IdReader, plan: Plan, layout: Layout) -> None:
        self._reader, self._plan, self._layout = reader, plan, layout
        self._worlds = [World("ddp", rank, layout.world, torch.device("cpu")) for rank in range(layout.world)]
        self.num_steps = self.num_planned = self.num_quarantined = self.num_substitutes = self.num_delivered = 0
        self.bad: dict[int, BadSample] = {}
        self.wrong: list[str] = []

    def run(self, epoch: int, start: int, decodes: bool, workers: int) -> Iterator[tuple[int, int, Ids]]:
        """(step of the epoch, rank, ids that came) of each micro-batch from step `start` on, in that order.

        One loader serves the requests of all ranks. Each would see the same from a loader of its own: a worker maps a
        request to its batch and holds no position. Raises the UserError that a worker met.
        """
        samples = Samples(self._reader, ReadOnly(decodes), self._plan.seed, substitutes=True)
        loading = Loading(workers, torch.device("cpu"))
        streams = [TrainStream(samples, self._plan, world, self._layout, loading) for world in self._worlds]
        batches_before = epoch * self._plan.batches_per_epoch
        requests = self._requests(streams, epoch, start)
        starts = [self._layout.share(rank).start for rank in range(self._layout.world)]
        with closing(self._reader.store), load(samples, requests, loading, self._layout.sizes[-1]) as batches:
            for batch in batches:
                yield batch.step - batches_before, bisect(starts, batch.first) - 1, self.note(batch)

    def _requests(self, streams: Sequence[TrainStream], epoch: int, start: int) -> Iterator[Request]:
        store = self._reader.store
        for position in range(start, self._plan.batches_per_epoch):
            step = epoch * self._plan.batches_per_epoch + position
            requests = [list(stream.requests(step, step + 1)) for stream in streams]
            self.note_step(position, [request.ids for rank in requests for request in rank], epoch)
            if store.fetches_ahead:
                store.ahead(self._reader.shards_of(self._plan.ids(epoch, position)))
            for rank in requests:
                yield from rank

    def note_step(self, position: int, asked_for: Sequence[Ids], epoch: int) -> None:
        """Checks that what the ranks ask for is disjoint, and together the global batch."""
        ids = np.concatenate(asked_for)
        self.num_steps += 1
        self.num_planned += len(ids)
        if len(ids) > len(np.unique(ids)):
            self._found(f"step {position}: {len(ids) - len(np.unique(ids))} of {len(ids)} samples come again in it")
        if not np.array_equal(ids, self._plan.ids(epoch, position)):
            self._found(f"step {position}: what the ranks ask for is not the plan's global batch")

    def note(self, batch: Batch) -> Ids:
        """Checks that what came is what was planned, but for bad samples, whose substitutes came; the ids that came."""
        pixels = batch.images.permute(0, 2, 3, 1).reshape(len(batch.ids), -1)
        planned, came = batch.ids.numpy(), pixels[:, :8].contiguous().view(torch.int64)[:, 0].numpy()
        bad = {replaced.error.sample: replaced.error for replaced in batch.bad}
        substitutes = {(replaced.error.sample, replaced.substitute) for replaced in batch.bad}
        self.bad |= bad
        self.num_delivered += len(came)
        for sample, instead in zip(planned.tolist(), came.tolist(), strict=True):
            self.num_quarantined += sample in bad
            self.num_substitutes += sample != instead
            if (sample in bad or sample != instead) and (sample, instead) not in substitutes:
                self._found(f"sample {instead} came where {sample} was planned, and is not its substitute")
        return came

    def _found(self, text: str) -> None:
        if len(self.wrong) < _MAX_WRONG:
            self.wrong.append(text)
