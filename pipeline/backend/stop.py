"""Signals that ask a run to stop in order."""

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """Raised on all ranks together: one of them was signalled to stop."""


class _Interrupted(BaseException):
    """Ends a wait; no library's `except Exception` may hold it up."""


class StopFlag:
    """Raised by STOP_SIGNALS; a second one does not interrupt the orderly exit."""

    def __init__(self) -> None:
        self.raised = False
        self._interrupts = False
        self._seen = False
        self._pipe: tuple[int, int] | None = None

    def listen(self) -> None:
        """From now on; in the main thread."""
        if self._pipe is None:
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)

    def arrived(self) -> bool:
        """Whether there was a signal, in any one thread other than the main one, which may be held up in a library, so
        that `raised` has not been set yet."""
        with contextlib.suppress(BlockingIOError):
            self._seen = self._seen or (self._pipe is not None and bool(set(os.read(self._pipe[0], 512)) & _NUMBERS))
        return self._seen

    def wait_for(self, work: Callable[[], T]) -> T | None:
        """What `work` gives; None where a signal comes before it does. Then, what it waited for is not to be used any
        more. In the main thread."""
        try:
            self._interrupts = True
            found = None if self.raised else work()
            self._interrupts = False  # Python runs handlers as a call returns, and then not before the next one
            return found
        except _Interrupted:
            return None
        finally:
            self._interrupts = False

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        if self._interrupts:
            self._interrupts = False
            raise _Interrupted


_NUMBERS = {int(number) for number in STOP_SIGNALS}
