"""Work in a thread of its own, while its caller goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Behind:
    """At most one piece of work at a time."""

    def __init__(self) -> None:
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Raises whatever the work before it raised, once that has ended."""
        self.wait()
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running = executor.submit(work)
        executor.shutdown(wait=False)  # the thread ends with its work

    def ends_within(self, seconds: float) -> bool:
        """Whether nothing runs any more, waiting for so long at most."""
        return self._running is None or not wait([self._running], seconds).not_done

    def wait(self) -> None:
        """Returns when nothing runs; raises what the work raised, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
