"""The stream as the trainer sees it: planned in the main process, decoded in workers, moved to the device.

Shapes: B samples of a micro-batch, H and W pixels.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import ERASING_DRAWS, Mixing, erase, erasing_boxes, normalise, one_hot
from pipeline.backend.world import STOP_SIGNALS, World
from shards.errors import UserError
from shards.plan import Plan, evaluation_share, micro_batches, rank_slice, uniforms
from shards.reader import BadSample, Reader

TRANSFORM_STREAM = 0
ERASING_STREAM = 1
PADDING = -1


class Transform(Protocol):
    """Bytes of an image and its uniform draws -> uint8 [3, H, W]."""

    @property
    def num_draws(self) -> int: ...

    def __call__(self, data: bytes, draws: np.ndarray) -> np.ndarray: ...


class Request(NamedTuple):
    """What a worker is asked for: the samples `ids`, which stand at `first` in the global batch of `step`."""

    ids: np.ndarray
    first: int
    step: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, H, W], labels int64 [B], ids int64 [B] (PADDING where evaluation fills up), and the
    micro-batch's first position in the global batch, its optimizer step over the whole run, and its epoch."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    first: int
    step: int
    epoch: int

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "labels")}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "Batch":
        return dataclasses.replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Samples(Dataset):
    """A map from a Request to its Batch; it holds no position."""

    def __init__(self, reader: Reader, transform: Transform, seed: int) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed

    def __getitem__(self, request: Request) -> "Batch | BadSample":
        """A bad sample is handed over like a batch: raised in a worker it would arrive with the worker's traceback."""
        try:
            return self._batch(request)
        except BadSample as error:
            return error

    def _batch(self, request: Request) -> Batch:
        known = np.where(request.ids == PADDING, 0, request.ids)
        draws = uniforms(self.seed, request.epoch, known, TRANSFORM_STREAM, self.transform.num_draws)
        samples = [self._sample(int(sample), row) for sample, row in zip(known, draws, strict=True)]
        images, labels = zip(*samples, strict=True)
        return Batch(
            torch.from_numpy(np.stack(images)),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(request.ids),
            request.first,
            request.step,
            request.epoch,
        )

    def _sample(self, sample: int, draws: np.ndarray) -> tuple[np.ndarray, int]:
        return self.reader.read(sample, lambda data: self.transform(data, draws))


@dataclass(frozen=True)
class Loading:
    """How batches reach a device: worker processes a rank, and where to."""

    workers: int
    device: torch.device


@dataclass(frozen=True)
class TrainStream:
    """This rank's part of every global batch of a run: exact, the same for any world, and O(1) to enter anywhere."""

    samples: Samples
    plan: Plan
    world: World
    accumulation: int
    loading: Loading

    def requests(self, start: int, stop: int) -> Iterator[Request]:
        """The micro-batches of optimizer steps start .. stop - 1, in order."""
        for step in range(start, stop):
            epoch, position = divmod(step, self.plan.batches_per_epoch)
            ids = rank_slice(self.plan.ids(epoch, position), self.world.rank, self.world.size)
            first = self.world.rank * len(ids)
            for micro_batch in micro_batches(ids, self.accumulation):
                yield Request(micro_batch, first, step, epoch)
                first += len(micro_batch)

    @contextmanager
    def open(self, start: int, stop: int) -> Iterator[Iterator[list[Batch]]]:
        """An iterator of one optimizer step's micro-batches after another; workers end with the context."""
        with _load(self.samples, self.requests(start, stop), self.loading) as batches:
            # The same iterator `accumulation` times: consecutive batches make a step.
            yield (list(step) for step in zip(*[batches] * self.accumulation, strict=True))

    def state(self, done: int) -> dict[str, object]:
        """Where the trainer stands after `done` steps: what is planned next follows from it, on any world."""
        plan = self.plan
        epoch, batches = divmod(done, plan.batches_per_epoch)
        key = {"fingerprint": plan.fingerprint, "seed": plan.seed, "global_batch": plan.global_batch}
        return key | {"epoch": epoch, "batches": batches}

    def check_state(self, state: dict[str, object], where: object) -> None:
        """Raises UserError where a state of another index, seed or global batch would be continued."""
        own = self.state(0)
        for name in ("fingerprint", "seed", "global_batch"):
            if state[name] != own[name]:
                raise UserError(
                    f"{where} was made with the data's {name} {state[name]}, but it is {own[name]} now: the rest of "
                    "the epoch would repeat some samples and miss others; give the data and recipe it was made with, "
                    "or another --run-dir to start anew"
                )

    def check_disjoint(self) -> None:
        """Raises UserError where two ranks would train on the same samples (a stream sharded twice, or not at all)."""
        ids = next(self.requests(0, 1)).ids.tolist()
        everyone = [sample for rank in self.world.gather(ids) for sample in rank]  # type: ignore[attr-defined]
        if len(set(everyone)) < len(everyone):
            raise UserError(
                f"the first micro-batches of the {self.world.size} ranks hold {len(everyone)} samples, but only "
                f"{len(set(everyone))} different ones: ranks disagree on rank, world, seed or index, and would train "
                "on the same samples; start all of them with one launcher, on the same data and recipe"
            )


@contextmanager
def evaluation_batches(samples: Samples, batch: int, world: World, loading: Loading) -> Iterator[Iterator[Batch]]:
    """This rank's share of a split, every sample once. All ranks get equally many batches of equal size, as sharded
    models need; what fills them up has the id PADDING."""
    start, stop = evaluation_share(len(samples.reader), world.rank, world.size)
    largest = -(-len(samples.reader) // world.size)
    ids = np.full(-(-largest // batch) * batch, PADDING, dtype=np.int64)
    ids[: stop - start] = np.arange(start, stop)
    requests = (Request(part, 0, 0, 0) for part in ids.reshape(-1, batch))
    with _load(samples, requests, loading) as batches:
        yield batches


@contextmanager
def _load(samples: Samples, requests: Iterable[Request], loading: Loading) -> Iterator[Iterator[Batch]]:
    loader = DataLoader(
        samples,
        sampler=requests,
        batch_size=None,
        num_workers=loading.workers,
        multiprocessing_context="forkserver" if loading.workers else None,
        pin_memory=loading.device.type == "cuda",
        worker_init_fn=_depend_on_trainer,
        generator=torch.Generator(),  # else each loader draws from the RNG of the model, which a resume must repeat
    )
    batches: Any = iter(loader)  # its type has no _shutdown_workers, which a loader without workers has not either
    try:
        yield (_checked(batch).to(loading.device) for batch in batches)
    finally:
        if loading.workers:
            batches._shutdown_workers()


def _checked(batch: Batch | BadSample) -> Batch:
    if isinstance(batch, BadSample):
        raise batch
    return batch


def serve_workers() -> None:
    """Starts the process that workers are forked from; it imports what they need while the caller goes on.

    Workers forked from the trainer itself can hang: its process group's threads may hold an interpreter lock at that
    moment (seen in CPython 3.11, in PyOS_AfterFork_Child). STOP_SIGNALS stay blocked in the server and its children:
    a signal to the process group must not take the workers from a trainer that is about to save.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipeline.chain"])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _depend_on_trainer(worker: int) -> None:
    """A worker leaves signals to the trainer, and ends when that has ended; torch itself watches the server instead."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


@dataclass(frozen=True)
class DeviceAugment:
    """uint8 batch -> normalised, erased and mixed images float [B, 3, H, W], targets float [B, C], on its device."""

    num_classes: int
    seed: int
    erasing: float
    mixing: Mixing

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        height, width = batch.images.shape[-2:]
        images = normalise(batch.images)
        if self.erasing:
            draws = torch.from_numpy(uniforms(self.seed, batch.epoch, batch.ids.numpy(), ERASING_STREAM, ERASING_DRAWS))
            boxes = erasing_boxes(draws.to(images.device), self.erasing, height, width)
            images = erase(images, boxes)
        mix = self.mixing.draw(self.seed, batch.step, height, width)
        return mix.apply(images, one_hot(batch.labels, self.num_classes))
