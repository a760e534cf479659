"""How far a long job is: a bar on a terminal, plain lines in a log."""

import sys
import time

from tqdm import tqdm

_SECONDS_A_LINE = 10.0


class Progress:
    """Counts images on stderr. A context manager; `advance()` once an image."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._count = label, total, 0
        self._start = self._printed = time.monotonic()
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit=" images", disable=self._plain)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._count += 1
        self._bar.update()
        if self._plain and time.monotonic() - self._printed >= _SECONDS_A_LINE:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        rate = self._count / (self._printed - self._start)
        left = (self._total - self._count) / rate
        count = f"{self._count}/{self._total} images"
        print(f"{self._label}: {count}, {rate:.0f} images/s, {left:.0f} s left", file=sys.stderr, flush=True)
