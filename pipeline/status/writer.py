"""Who writes into a run directory, and whether that process still lives."""

import mmap
import os
import re
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HEADER = re.compile(r"=== (\S+): rank (\d+) of (\d+), pid (\d+) on (.+), commit (\S+)")
_HEADS = re.compile(rb"^" + HEADER.pattern.encode(), re.MULTILINE)
SLACK = 2.0  # seconds: times of the log and of /proc are whole seconds and ticks


@dataclass(frozen=True)
class Writer:
    """The process of a rank, as the head of its attempt in its log names it. since: seconds since 1970."""

    rank: int
    world: int
    pid: int
    host: str
    since: float
    commit: str


def last_attempt(log: Path) -> tuple[Writer | None, str]:
    """The head of the last attempt in a rank's log, and the text below it; (None, "") where there is none."""
    head, _, rest = _from_last_head(log).partition("\n")
    if not (found := HEADER.match(head)):
        return None, ""
    when, rank, world, pid, host, commit = found.groups()
    try:
        since = datetime.fromisoformat(when).timestamp()
    except ValueError:
        return None, ""
    return Writer(int(rank), int(world), int(pid), host, since, commit), rest


def lives(writer: Writer) -> bool | None:
    """Whether its process is there; None where it is on another machine."""
    if writer.host != socket.gethostname():
        return None
    try:
        state, started = _status(writer.pid)
    except (OSError, ValueError, IndexError):
        return False
    return state not in "ZX" and started <= writer.since + SLACK  # else its number was given to another one


def boot_time() -> float:
    """Of this machine, in seconds since 1970; 0 where that is not known."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime")), 0.0)


def _status(pid: int) -> tuple[str, float]:
    """The letter of a process's state, and when it was started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], boot_time() + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _from_last_head(log: Path) -> str:
    try:
        with log.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            starts = [found.start() for found in _HEADS.finditer(content)]
            return content[starts[-1] :].decode(errors="replace") if starts else ""
    except (OSError, ValueError):  # missing, or empty
        return ""
