"""Runs tasks on the machines of a Ray cluster that is up already. They need this package in their Python, and the
source and OUT under the same paths as here. Ray repeats the tasks of a machine that it loses.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import Any

from shards.engine import Advance, Engine, Outcome, Result, Task, attempt
from shards.errors import UserError

_TASKS_A_CPU = 2
_CONNECT_SECONDS = 5.0
_REMEDY = (
    "start one with `ray start --head`, on other machines with `ray start --address=HOST:PORT`, and set "
    "RAY_ADDRESS=HOST:PORT where it is not on this machine"
)


@contextmanager
def open_cluster(limit: int | None) -> Iterator[Engine]:
    """The cluster that RAY_ADDRESS names, or else that of this machine, which goes on when the context ends; `limit`
    bounds the tasks that it is handed. UserError where Ray is not installed or no cluster answers."""
    ray = _import_ray()
    _connect(ray)
    engine = _Cluster(ray, limit)
    try:
        yield engine
    finally:
        engine.cancel()
        ray.shutdown()


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}): pip install 'vittm-pipeline[ray]'") from error
    return ray


def _connect(ray: ModuleType) -> None:
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _check_answers(address)
    try:
        ray.init(address="auto", namespace="vittm-pipeline", log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster can be used: {error}; {_REMEDY}") from error


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): {_REMEDY}") from error


class _Cluster:
    def __init__(self, ray: ModuleType, limit: int | None) -> None:
        self._ray = ray
        self._limit = limit
        self._pending: list[Any] = []  # what stands for the results of tasks

    def run(
        self, function: Callable[[Task, Advance], Result], tasks: Iterable[Task], advance: Advance
    ) -> Iterator[Result]:
        """As Engine.run; `advance` is called when a task ends."""
        remote = self._ray.remote(num_cpus=1)(_attempt)
        waiting = iter(tasks)
        try:
            while True:
                free = max(0, self._num_at_a_time() - len(self._pending))
                for task in islice(waiting, free):
                    self._pending.append(remote.remote(function, task))
                if not self._pending:
                    return
                done, self._pending = self._ray.wait(self._pending)
                outcome, images, num_bytes = self._get(done[0])
                advance(images, num_bytes)
                yield outcome.get()
        finally:
            self.cancel()

    def _num_at_a_time(self) -> int:
        return self._limit or max(1, _TASKS_A_CPU * int(self._ray.cluster_resources().get("CPU", 0)))

    def _get(self, reference: Any) -> tuple[Outcome, int, int]:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            reason = lines[-1 if isinstance(error, self._ray.exceptions.RayTaskError) else 0].rstrip(".")
            raise UserError(
                f"Ray could not run a task: {reason}. All of its machines need this version of vittm-pipeline, the "
                "paths of this one, and memory for a task a CPU. Run again; finished shards are kept."
            ) from error

    def cancel(self) -> None:
        """Ends the tasks under way."""
        while self._pending:
            self._ray.cancel(self._pending.pop(), force=True)


def _attempt(function: Callable[[Task, Advance], Any], task: Task) -> tuple[Outcome, int, int]:
    """The outcome of a task, and the images and bytes that it got through."""
    reports: list[tuple[int, int]] = []
    outcome = attempt(function, task, lambda *report: reports.append(report))
    return outcome, sum(images for images, _ in reports), sum(num_bytes for _, num_bytes in reports)
