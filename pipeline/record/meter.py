"""The speed of a run, and what it is spent on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Images a second, the share of the time spent waiting for data, and the seconds that training stood still for
    checkpoints, since it was last read. Of images and data, evaluations and checkpoints are left out."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for one step's data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def saved(self, seconds: float) -> None:
        """So long a checkpoint made the training stand still."""
        self._since += seconds
        self._saved += seconds

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        values = {
            "images_per_second": self._steps * self.global_batch / seconds,
            "data_wait": self._waited / seconds,
            "save_seconds": self._saved,
        }
        self.restart()
        return values

    def restart(self) -> None:
        self._since, self._waited, self._saved, self._steps = time.perf_counter(), 0.0, 0.0, 0
