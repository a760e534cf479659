"""The speed of a run, what it is spent on, and what of it was of use."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Images a second, the share of the time spent waiting for data, and the seconds that training stood still for
    checkpoints, since it was last read. Of images and data, evaluations and checkpoints are left out.

    `kept_seconds`: what all steps took, waits for data included, whose changes are in the weights now.
    """

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.kept_seconds = 0.0
        self.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for one step's data."""
        self._began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - self._began
        self._steps += 1

    def stepped(self, kept: bool) -> None:
        """At the end of the step whose data was waited for last."""
        self.kept_seconds += (time.perf_counter() - self._began) * kept

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
        self._began = self._since
