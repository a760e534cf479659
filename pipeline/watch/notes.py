"""What ranks tell each other through the run directory when collectives do not work: a small file a rank."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

ROOM = 4096


@dataclass(frozen=True)
class Note:
    """Rank `rank` stands at `label`, the `count`-th place of the launch `attempt`, for `seconds`. `beat` counts what
    it has written. `begun`: the name of each group of ranks to the number of collectives that it has begun there, of
    which `last` is the last."""

    rank: int
    attempt: str
    host: str
    pid: int
    trouble: bool = False
    beat: int = 0
    count: int = 0
    label: str = ""
    seconds: float = 0.0
    begun: dict[str, int] = field(default_factory=dict)
    last: str = ""


class Notes:
    """The notes of a launch, and the alarm that makes all ranks write theirs.

    All files are there before they are needed, and written over in place: so a full disk takes them, and a rank that
    opens one on NFS sees what another machine wrote (its close-to-open rule), which it may not of a file made later.
    """

    def __init__(self, logs: Path, rank: int, size: int, attempt: str) -> None:
        """Raises OSError where they cannot be made."""
        self._logs, self._size, self._attempt = logs, size, attempt
        self._own = os.open(self._path(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(self._own, b" " * ROOM, 0)
        self._alarm = logs / "alarm"
        if rank == 0:
            self._alarm.write_text("")

    def write(self, note: Note) -> None:
        data = json.dumps(dataclasses.asdict(note)).ljust(ROOM).encode()
        os.pwrite(self._own, data, 0)
        os.ftruncate(self._own, len(data))

    def read(self) -> dict[int, Note]:
        """Those of this launch that are there."""
        found = (self._read(rank) for rank in range(self._size))
        return {note.rank: note for note in found if note is not None}

    def _read(self, rank: int) -> Note | None:
        try:
            note = Note(**json.loads(self._path(rank).read_bytes()))
        except (OSError, ValueError, TypeError):  # not there yet, or being written
            return None
        return note if note.attempt == self._attempt else None

    @property
    def alarm(self) -> bool:
        try:
            return self._alarm.read_text() == self._attempt
        except OSError:
            return False

    def set_alarm(self, raised: bool) -> None:
        self._alarm.write_text(self._attempt if raised else "")

    def _path(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.place.json"
