"""Workers, and the way of their batches to the device."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from pipeline.backend.world import STOP_SIGNALS
from pipeline.data.batch import Batch, Request
from pipeline.data.samples import Samples
from shards.errors import UserError


@dataclass(frozen=True)
class Loading:
    """How batches reach a device: worker processes a rank, and where to."""

    workers: int
    device: torch.device


@contextmanager
def load(samples: Samples, requests: Iterable[Request], loading: Loading) -> Iterator[Iterator[Batch]]:
    """The batches of the requests, in their order, on the device; workers live as long as the context.

    Raises the UserError that a worker met.
    """
    loader = DataLoader(
        samples,
        sampler=requests,
        batch_size=None,
        num_workers=loading.workers,
        multiprocessing_context="forkserver" if loading.workers else None,
        pin_memory=loading.device.type == "cuda",
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else each loader draws from the RNG of the model, which a resume must repeat
    )
    batches: Any = iter(loader)  # its type has no _shutdown_workers, which a loader without workers has not either
    move = _prefetched if loading.device.type == "cuda" else _moved
    try:
        yield move((_checked(batch) for batch in batches), loading.device)
    finally:
        if loading.workers:
            batches._shutdown_workers()


def _checked(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _moved(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    return (batch.to(device) for batch in batches)


def _prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies a batch from pinned memory on a stream of its own, while the caller works on the one before."""
    side = torch.cuda.Stream(device)
    copies: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(side):
            copies.append((batch.to(device), side.record_event()))
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
