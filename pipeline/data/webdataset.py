"""The exact stream as a source of the webdataset library: its decoders and filters work on what comes from here."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from shards.errors import UserError
from shards.layout import Layout
from shards.members import MemberReader
from shards.plan import Ids, Plan


class WebDatasetSource(IterableDataset):
    """The samples of rank `rank` of `world`, an epoch at a time, in the order of the plan: the first stage of a
    `wds.DataPipeline`.

        source = WebDatasetSource(MemberReader(index, "train", store), plan, rank, world)
        pipeline = wds.DataPipeline(source, wds.decode("pil"), wds.to_tuple("jpg", "cls"))
        loader = torch.utils.data.DataLoader(pipeline, batch_size=plan.global_batch // world, num_workers=4)

    Worker i of n takes whole micro-batches, every n-th from the i-th on. So batches of global_batch / world /
    accumulation samples come in the plan's order, as a DataLoader takes turns over its workers; filters that drop
    samples or batch otherwise undo that, and the library's `split_by_node` and `split_by_worker` must stay out. What
    was planned is read: a bad sample raises BadSample. UserError where the global batch does not cut evenly.
    """

    def __init__(self, reader: MemberReader, plan: Plan, rank: int = 0, world: int = 1, accumulation: int = 1) -> None:
        super().__init__()
        layout = Layout(plan.global_batch, world, accumulation)
        layout.check_even("a webdataset pipeline makes batches of one size")
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} of {world}: ranks are 0 to {world - 1}")
        self.reader, self.plan = reader, plan
        self._parts = layout.micro_batches(rank)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # persistent workers see it change

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration goes through; it stays until it is set."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples as of `MemberReader.sample`."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for ids in self.micro_batches(number, count):
            yield from map(self.reader.sample, ids.tolist())

    def micro_batches(self, worker: int = 0, num_workers: int = 1) -> Iterator[Ids]:
        """The ids [global_batch / world / accumulation] of each micro-batch of a worker, in its order."""
        epoch = self.epoch
        for number in range(worker, self.plan.batches_per_epoch * len(self._parts), num_workers):
            batch, part = divmod(number, len(self._parts))
            yield self.plan.ids(epoch, batch)[self._parts[part]]
