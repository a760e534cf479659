"""RUN/logs/rank-N.log: what a rank prints, beside where it went before."""

import faulthandler
import os
import signal
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from pipeline.record import LOGS, code_version


def keep_log(run_dir: Path) -> None:
    """From now on whole lines of stdout and stderr are appended to this rank's log as well, and tracebacks of all
    threads where a signal such as SIGSEGV ends the process, or SIGUSR2 asks for them.

    What libraries in C print goes to stderr alone. A log that cannot be written is given up with a message: the check
    of the run directory, which comes later, stops a run that could not be saved either.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    path = run_dir / LOGS / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = _Log(path)
    except OSError as error:
        print(f"{path} cannot be written ({error}): this rank keeps no log", file=sys.stderr, flush=True)
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    log.add(f"=== {now}: rank {rank} of {world}, pid {os.getpid()} on {socket.gethostname()}, commit {code_version()}")
    sys.stdout, sys.stderr = cast(TextIO, _Copied(sys.stdout, log)), cast(TextIO, _Copied(sys.stderr, log))
    faulthandler.enable(log.file)
    faulthandler.register(signal.SIGUSR2, log.file)


class _Log:
    """A file that whole lines are appended to, by any thread, until it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._broken = False

    def add(self, line: str) -> None:
        try:
            os.write(self.file, f"{line}\n".encode(errors="backslashreplace"))
            self._broken = False
        except OSError as error:
            if not self._broken and sys.__stderr__:
                print(f"{self.path} takes no more ({error}): the run goes on", file=sys.__stderr__, flush=True)
            self._broken = True


class _Copied:
    """A text stream, the whole lines of which go to a log too; of what \\r writes over, the last state."""

    def __init__(self, stream: TextIO, log: _Log) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.add(line.removesuffix("\r").rpartition("\r")[2])
        self._line = self._line.rpartition("\r")[2]
        return self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
