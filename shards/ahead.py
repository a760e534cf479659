"""Threads that fetch files before they are read."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from shards.remote import Pause

_THREADS = 4
_STOP_SECONDS = 1.0


class Stopped(Exception):
    """Raised inside a fetch that is no longer wanted."""


class Ahead:
    """Calls `begin` with each name asked for, in order, one at a time, and what it returns side by side.

    What they raise is dropped, for the reader will meet it. They wait with the `Pause` that `begin` gets; it raises
    Stopped once `stop` was called. Threads are daemons: they end with the process, whatever they wait for. `owner` is
    the process that has them: a forked child has none.
    """

    def __init__(self, begin: Callable[[str, Pause], Callable[[], None] | None]) -> None:
        self.owner = os.getpid()
        self._begin = begin
        self._turn = threading.Lock()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._queued: set[str] = set()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def ask(self, names: Iterable[str]) -> None:
        """Puts names that are not waiting yet at the end of the queue."""
        for name in names:
            if name not in self._queued:
                self._queued.add(name)
                self._queue.put(name)

    def stop(self) -> None:
        """Drops what is queued and interrupts what is being fetched; a request under way is left to time out."""
        self._stopped.set()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while not self._stopped.is_set():
            with suppress(Exception):
                self._fetch_next()

    def _fetch_next(self) -> None:
        with self._turn:
            name = self._queue.get()
            if name is None:
                return
            self._queued.discard(name)  # it may be asked for again from now on
            finish = self._begin(name, self._pause)
        if finish is not None:
            finish()

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped
