"""How far a long job is: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import NamedTuple

from tqdm import tqdm

_SECONDS_A_LINE = 10.0
_UNITS = (("s", 1), ("min", 60), ("h", 3600))
_MOST_OF_A_UNIT = 100


class Rates(NamedTuple):
    """Images and bytes a second."""

    images: float
    num_bytes: float


class Progress:
    """Counts images and bytes on stderr. A context manager; `advance()` once an image, or for several at once.

    `total_images` is None where nobody knows. `total_bytes` are those that this run will go through. `initial` images
    were done by an earlier run: they count as done, but not as quickly done.
    """

    def __init__(
        self, label: str, total_images: int | None = None, total_bytes: int | None = None, initial: int = 0
    ) -> None:
        self._label, self._total_images, self._total_bytes = label, total_images, total_bytes
        self._images = self._initial = initial
        self._num_bytes = 0
        self._start = self._printed = time.monotonic()
        self._printed_images = -1
        self._plain = not sys.stderr.isatty()
        # Without smoothing its rate is that since the start: shards come in bursts.
        self._bar = tqdm(
            total=total_images, desc=label, unit=" images", initial=initial, smoothing=0, disable=self._plain
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._plain and self._printed_images != self._images:
            self._print_line()

    @property
    def rates(self) -> Rates:
        """Those of this run, since its start."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return Rates((self._images - self._initial) / seconds, self._num_bytes / seconds)

    def advance(self, images: int = 1, num_bytes: int = 0) -> None:
        self._images += images
        self._num_bytes += num_bytes
        if not self._plain:
            self._bar.set_postfix_str(", ".join((*self._gigabytes(), *self._megabytes_a_second())), refresh=False)
            self._bar.update(images)
        elif time.monotonic() - self._printed >= _SECONDS_A_LINE:
            self._print_line()

    def _print_line(self) -> None:
        self._printed, self._printed_images = time.monotonic(), self._images
        count = (
            f"{self._images} images" if self._total_images is None else f"{self._images}/{self._total_images} images"
        )
        rate = f"{self.rates.images:.0f} images/s"
        parts = (count, *self._gigabytes(), rate, *self._megabytes_a_second(), *self._left())
        print(f"{self._label}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def _gigabytes(self) -> list[str]:
        return [f"{self._num_bytes / 1e9:.1f}/{self._total_bytes / 1e9:.1f} GB"] if self._total_bytes else []

    def _megabytes_a_second(self) -> list[str]:
        return [f"{self.rates.num_bytes / 1e6:.0f} MB/s"] if self._num_bytes else []

    def _left(self) -> list[str]:
        """By images, or by bytes where only those have a total; nothing where nobody can tell."""
        images_a_second, bytes_a_second = self.rates
        if self._total_images is not None and images_a_second:
            seconds = (self._total_images - self._images) / images_a_second
        elif self._total_bytes is not None and bytes_a_second:
            seconds = (self._total_bytes - self._num_bytes) / bytes_a_second
        else:
            return []
        return [f"{_duration(max(0.0, seconds))} left"]


def _duration(seconds: float) -> str:
    """In the first unit that makes it a number of two digits."""
    unit, size = next((pair for pair in _UNITS if seconds / pair[1] < _MOST_OF_A_UNIT), _UNITS[-1])
    return f"{seconds / size:.0f} {unit}"
