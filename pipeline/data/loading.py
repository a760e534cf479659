"""Workers, and the way of their batches to the device."""

import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.backend.stop import STOP_SIGNALS
from pipeline.data.batch import Batch, Filled, Request
from pipeline.data.samples import Samples
from shards.errors import UserError

T = TypeVar("T")
_PREFETCH = 2  # batches a worker has in work
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Loading:
    """How batches reach a device: worker processes a rank, and where to."""

    workers: int
    device: torch.device


@contextmanager
def load(
    samples: Samples, requests: Iterable[Request], loading: Loading, batch: int, held: int = 1
) -> Iterator[Iterator[Batch]]:
    """The batches of the requests, of at most `batch` samples, in their order, on the device; workers live as long as
    the context. The images of one stay as they are until the `held`-th batch after it is asked for.

    Raises the UserError that a worker met, and one where there is too little shared memory.
    """
    number = _PREFETCH * loading.workers + held
    slots = _Slots(_make_room(number, batch, samples.largest, loading), held, samples.image_size_at)
    loader = DataLoader(
        _Answers(samples, slots.memory),
        sampler=slots.given(requests),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=loading.workers,
        prefetch_factor=_PREFETCH if loading.workers else None,
        multiprocessing_context="forkserver" if loading.workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else each loader draws from the RNG of the model, which a resume must repeat
    )
    answers: Any = iter(loader)  # its type has no _shutdown_workers, which a loader without workers has not either
    move = _prefetched if loading.device.type == "cuda" else _moved
    try:
        yield move(slots.filled(answers), loading.device)
    finally:
        if loading.workers:
            answers._shutdown_workers()


class _Answers(Dataset):
    """A map from (slot, Request) to what is Filled, in a worker; the images go into that slot."""

    def __init__(self, samples: Samples, memory: Tensor) -> None:
        self._samples, self._memory = samples, memory

    def __getitem__(self, numbered: tuple[int, Request]) -> Filled | UserError:
        """An error is handed over like an answer: raised in a worker it would arrive with the worker's traceback."""
        slot, request = numbered
        side = self._samples.image_size_at(request.epoch)
        try:
            return self._samples.fill(request, _images(self._memory[slot], len(request.ids), side).numpy())
        except UserError as error:
            return error


class _Slots:
    """Memory for the images of batches, uint8 [slots, bytes], shared with workers and used again and again.

    There is a slot for each request that the loader has in work, and for each batch that the caller holds. Memory that
    each batch allocated anew would cost as much as a third of the decoding, in page faults on both sides (LOG.md).
    `image_size_at`: side of the images of an epoch.
    """

    def __init__(self, memory: Tensor, held: int, image_size_at: Callable[[int], int]) -> None:
        self.memory, self._held, self._image_size_at = memory, held, image_size_at
        self._free = deque(range(len(memory)))
        self._given = deque[tuple[int, Request]]()

    def given(self, requests: Iterable[Request]) -> Iterator[tuple[int, Request]]:
        """Each request with a slot."""
        for request in requests:
            self._given.append((self._free.popleft(), request))
            yield self._given[-1]

    def filled(self, answers: Iterator[Filled | UserError]) -> Iterator[Batch]:
        """The batches: answers come in the order of their requests. An error among them is raised."""
        held = deque[int]()
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
            slot, request = self._given.popleft()
            held.append(slot)
            ids, side = torch.from_numpy(request.ids), self._image_size_at(request.epoch)
            images = _images(self.memory[slot], len(ids), side).permute(0, 3, 1, 2)
            yield Batch(
                images, torch.from_numpy(answer.labels), ids, request.first, request.step, request.epoch, answer.bad
            )
            if len(held) == self._held:  # before the loader is asked for the next answer, and gives a slot away
                self._free.append(held.popleft())


def _images(slot: Tensor, number: int, side: int) -> Tensor:
    """uint8 [number, side, side, 3]: the first bytes of a slot, which has room for the largest batch of a run."""
    return slot[: number * side * side * 3].view(number, side, side, 3)


def _unchanged(answer: T) -> T:
    """In the place of torch's collation, which would make tensors of arrays, and a file descriptor of each."""
    return answer


def _make_room(number: int, batch: int, side: int, loading: Loading) -> Tensor:
    """uint8 [number, bytes]: memory for so many batches of images; UserError where workers could not share it with the
    trainer."""
    shape = (number, batch * side * side * 3)
    if not loading.workers:
        return torch.empty(shape, dtype=torch.uint8)
    needed, there = math.prod(shape), shutil.disk_usage(_SHARED_MEMORY).free
    if needed > there:
        raise UserError(
            f"{number} batches of {batch} images of {side} x {side} pixels need {needed / 2**20:,.0f} MiB of shared "
            f"memory, and {_SHARED_MEMORY} has {there / 2**20:,.0f} MiB left: give it more (docker run --shm-size), or "
            "take fewer data.workers or smaller micro-batches"
        )
    return torch.empty(shape, dtype=torch.uint8).share_memory_()


def _moved(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    return (batch.to(device) for batch in batches)


def _prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies a batch on a stream of its own, while the caller works on the one before; by way of pinned memory, so that
    the copy waits for nothing, and the batch's own memory may be used again at once."""
    side = torch.cuda.Stream(device)
    copies: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        pinned = batch.pin_memory()
        with torch.cuda.stream(side):
            copies.append((pinned.to(device), side.record_event()))
        if len(copies) > 1:
            yield _arrived(*copies.popleft())
    while copies:
        yield _arrived(*copies.popleft())


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Makes the caller's stream wait for the copy, and the copy's memory stay until that stream is done with it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    for tensor in (batch.images, batch.labels):
        tensor.record_stream(stream)
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


def _begin_worker(worker: int) -> None:
    """A worker computes on one thread, leaves signals to the trainer, and ends when that has ended; torch itself
    watches the server instead."""
    cv2.setNumThreads(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
