"""Runs tasks on processes of this machine, or on the machines of a Ray cluster (shards/ray_engine.py).

A task must be repeatable: what it writes appears whole or not at all. Functions are module-level, and paths in tasks
absolute: a worker has a working directory of its own.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol, TypeVar

from shards.errors import UserError

ENGINES = ("local", "ray")
Advance = Callable[[int, int], None]  # (images, bytes) done since the last call
Task = TypeVar("Task")
Result = TypeVar("Result")

_SECONDS_A_REPORT = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Engine(Protocol):
    def run(
        self, function: Callable[[Task, Advance], Result], tasks: Iterable[Task], advance: Advance
    ) -> Iterator[Result]:
        """Results as they finish, in any order. Tasks are taken as workers become free, so that they may be lazy and
        hold data. What a task raises is raised here; UserError where a worker dies. Either ends the tasks under way,
        and so does closing the iterator. One run at a time."""
        ...


@contextmanager
def open_engine(name: str, workers: int | None = None) -> Iterator[Engine]:
    """The engine "local" or "ray"; its workers end with the context, at once where it is left by an exception.

    `workers`: how many tasks run at a time. 1 runs them in this process, and None is every CPU that this process may
    use; with Ray it bounds the tasks handed to the cluster, and None is twice its CPUs. UserError for bad values.
    """
    if name not in ENGINES:
        raise UserError(f"{name!r} is no engine: choose {' or '.join(ENGINES)}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: it must be at least 1")
    if name == "ray":
        from shards.ray_engine import open_cluster

        with open_cluster(workers) as engine:
            yield engine
    else:
        with _open_local(workers or len(os.sched_getaffinity(0))) as engine:
            yield engine


@dataclass(frozen=True)
class Outcome:
    """What came of a task in another process: its result, or what it raised."""

    result: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


def attempt(function: Callable[[Task, Advance], Any], task: Task, advance: Advance) -> Outcome:
    """Runs a task in a worker. An error other than a UserError carries the worker's traceback as a note."""
    try:
        return Outcome(function(task, advance))
    except UserError as error:
        return Outcome(error=error)
    except Exception as error:
        note = f"in process {os.getpid()} of {socket.gethostname()}:\n{traceback.format_exc()}"
        portable = _portable(error)
        portable.add_note(note)
        return Outcome(error=portable)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it would not survive the way to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class _InProcess:
    """One worker, which is this process."""

    def run(
        self, function: Callable[[Task, Advance], Result], tasks: Iterable[Task], advance: Advance
    ) -> Iterator[Result]:
        for task in tasks:
            yield function(task, advance)


@contextmanager
def _open_local(workers: int) -> Iterator[Engine]:
    if workers == 1:
        yield _InProcess()
        return
    engine = _Processes(workers)
    try:
        yield engine
    finally:
        engine.close()


class _Processes:
    """Workers that each have a pipe of their own and one task at a time: the loss of one cannot block another, and its
    exit code tells what killed it. (A process pool of concurrent.futures shares its pipes, and has no exit codes.)"""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._workers: list[_Worker] = []

    def run(
        self, function: Callable[[Task, Advance], Result], tasks: Iterable[Task], advance: Advance
    ) -> Iterator[Result]:
        busy: list[_Worker] = []
        try:
            self._start(function.__module__)
            for task in tasks:  # the next one is made while the workers are busy
                while len(busy) == self._num_workers:
                    yield from _results(busy, advance)
                free = next(worker for worker in self._workers if worker not in busy)
                free.send((function, task))
                busy.append(free)
            while busy:
                yield from _results(busy, advance)
        except BaseException:  # also where the results are no longer wanted
            self.close()
            raise

    def _start(self, module: str) -> None:
        """Starts the workers unless they run, from a server that has imported `module` once for all of them."""
        if self._workers:
            return
        multiprocessing.get_context("forkserver").set_forkserver_preload([module])
        with _signals_blocked():
            for _ in range(self._num_workers):
                self._workers.append(_Worker())

    def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        while self._workers:
            self._workers.pop().end()


def _results(busy: "list[_Worker]", advance: Advance) -> Iterator[Any]:
    """Waits until a worker has something to say. What has become idle is no longer in `busy`."""
    for worker in connection.wait(busy):  # type: ignore[arg-type]
        assert isinstance(worker, _Worker)
        message = worker.receive()
        if isinstance(message, Outcome):
            busy.remove(worker)
            yield message.get()
        else:
            advance(*message)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Until its end signals wait, and processes made meanwhile leave them to this one: Ctrl-C reaches them all."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Worker:
    """A process, which inherits no lock, descriptor or thread of this one, and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        try:
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        except (OSError, EOFError) as error:
            raise UserError(f"cannot start a worker process: {error}; run again with fewer --workers") from error
        theirs.close()

    def fileno(self) -> int:
        return self._pipe.fileno()

    def send(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise UserError(self._death()) from None

    def receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(self._death()) from None

    def _death(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            cause, remedy = f"killed by signal {-code}: out of memory?", "run again with fewer --workers"
        elif code < 0:
            cause, remedy = f"killed by signal {-code}: {signal.strsignal(-code)}", "run again"
        else:
            cause, remedy = f"exit code {code}", "run again"
        return f"a worker process died ({cause}); {remedy}; finished shards are kept"

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def _serve(pipe: connection.Connection) -> None:
    """The life of a worker: it leaves signals to its parent, answers it, and ends with it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # the parent has closed the pipe, or ended
        while True:
            function, task = pipe.recv()
            report = _Report(pipe)
            outcome = attempt(function, task, report.advance)
            report.send()
            pipe.send(outcome)


def _end_with_parent() -> None:
    """Even in the middle of a task: what it writes would get in the way of the parent's next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Report:
    """The progress of a task, gathered so that `advance` is cheap."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe
        self._images = self._num_bytes = 0
        self._sent = time.monotonic()

    def advance(self, images: int, num_bytes: int) -> None:
        self._images += images
        self._num_bytes += num_bytes
        if time.monotonic() - self._sent >= _SECONDS_A_REPORT:
            self.send()

    def send(self) -> None:
        if self._images or self._num_bytes:
            self._pipe.send((self._images, self._num_bytes))
        self._images = self._num_bytes = 0
        self._sent = time.monotonic()
