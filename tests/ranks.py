"""Real rank processes for the tests: forked from a server that has imported torch once, so that one costs 0.1 s.

They run a recipe file or a function just as a launcher's child would, with RANK and its kin in the environment.
"""

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PRELOADED = ["pipeline.chain", "pipeline.backend.ddp", "pipeline.backend.fsdp", "pipeline.backend.deepspeed", "sklearn"]
PATIENCE = 600
POLL = 0.005
PORTS = 1000


@dataclass(frozen=True)
class Ended:
    """How the ranks of a launch ended: exit codes, and what each wrote to stdout and stderr together."""

    codes: list[int | None]
    outputs: list[str]


class Ranks:
    """Processes of one launch, running."""

    def __init__(
        self, target: Callable[..., None], arguments: Sequence, logs: Path, size: int, environment: dict
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{time.monotonic_ns()}-rank-{rank}.log" for rank in range(size)]
        context = multiprocessing.get_context("forkserver")
        self.processes = [
            context.Process(target=_child, args=(target, arguments, self.logs[rank], variables | environment))
            for rank, variables in enumerate(_launched(size))
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> Ended:
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()
            process.join()
        return Ended([process.exitcode for process in self.processes], [log.read_text() for log in self.logs])

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()
            process.join()


def run_script(script: str, options: Sequence[str], logs: Path, size: int = 1, **environment: str) -> Ranks:
    """A recipe file of the project, started on `size` ranks (1: as by plain python)."""
    return Ranks(_script, (script, list(options)), logs, size, environment)


def run_function(function: Callable[..., None], arguments: Sequence, logs: Path, size: int) -> Ranks:
    """An importable function, called on `size` ranks."""
    return Ranks(function, arguments, logs, size, {})


def accelerate(launch_file: str, script: str, options: Sequence[str], log: Path) -> subprocess.Popen:
    """The README's command, in a session of its own, so that a signal to its ranks does not reach pytest."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"ds_configs/{launch_file}.yaml"]
    command += ["--main_process_port", str(free_port())]
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, script, *options], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )


def kill_at(launcher: subprocess.Popen, metrics_file: Path, num_lines: int) -> None:
    """SIGKILL to every rank of a launcher once so many lines are logged."""
    when_logged(metrics_file, num_lines, lambda: launcher.poll() is None)
    kill_ranks(launcher)


def kill_when_there(launcher: subprocess.Popen, path: Path) -> None:
    """SIGKILL to every rank of a launcher as soon as a file, or a checkpoint's temporary directory, is there."""
    while not path.exists():
        assert launcher.poll() is None, f"the launch ended before {path} was seen"
        threading.Event().wait(POLL / 10)
    kill_ranks(launcher)


def kill_ranks(launcher: subprocess.Popen) -> None:
    started = psutil.Process(launcher.pid)
    descendants = started.children(recursive=True)
    for rank in started.children():
        os.kill(rank.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(descendants, timeout=PATIENCE)
    assert not left, f"processes outlive their killed ranks: {left}"


def when_logged(metrics_file: Path, num_lines: int, alive: Callable[[], bool]) -> None:
    """Returns once so many lines are logged."""
    while not metrics_file.exists() or metrics_file.read_text().count("\n") < num_lines:
        assert alive(), "the launch ended before so many lines were logged"
        threading.Event().wait(POLL)


def free_port() -> int:
    """For a launch to meet at: below what Linux gives to sockets that ask for none, and this pytest process's own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + PORTS * worker
    for port in random.SystemRandom().sample(range(first, first + PORTS), PORTS):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"all ports from {first} to {first + PORTS} are taken")


def _launched(size: int) -> list[dict[str, str]]:
    if size == 1:
        return [{}]
    port = str(free_port())
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _child(target: Callable[..., None], arguments: Sequence, log: Path, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - until exit
    os.environ.update(environment)
    target(*arguments)


def _script(script: str, options: list[str]) -> None:
    sys.argv = [script, *options]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics, but for the fields that may differ between equal runs: those that tell the time."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "data_wait", "seconds")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]
