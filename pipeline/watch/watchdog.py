"""The thread that watches a rank.

A rank is in trouble when its training has not moved for the time-out, or when a collective of its has failed. It raises
the alarm, upon which every rank whose watchdog lives writes its stacks, its flight recorder and its note. Once every
rank is in trouble or gives no sign of life, the lowest one that does writes the verdict, and all leave. While another
rank still moves, however slowly, nobody speaks of a hang.
"""

import dataclasses
import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from pipeline.backend import Place, StopFlag, World
from pipeline.checkpoint import saved_step
from pipeline.record import EXIT_CODES, LOGS, OUTCOME, last_step, read_outcome, write_outcome
from pipeline.watch import flight
from pipeline.watch.notes import Note, Notes
from pipeline.watch.verdict import verdict
from shards.errors import UserError

CALM, ALARMED = 1.0, 0.25  # seconds between two looks
SILENCE = 5.0  # seconds without a word, in an alarm, after which a rank is taken for stopped, dead or cut off
EARLY = 10.0  # seconds that a signalled rank may take to agree with the others before there is anything to save
REMEDY = (
    "Once all of the launch has ended, start the same command again: it goes on from the newest checkpoint. If it was "
    "only slow, raise --runtime.hang-timeout"
)


class Watchdog:
    """Watches this process from `start` on, and the other ranks from `join` on. hang_timeout: seconds; 0 sees no hang.

    It ends the process by os._exit, for the main thread may be held up in a library for ever.
    """

    def __init__(self, run_dir: Path, stop: StopFlag, place: Place, hang_timeout: float) -> None:
        self._run_dir, self._logs = run_dir, run_dir / LOGS
        self._stop, self._place, self._timeout = stop, place, hang_timeout
        self._signalled, self._failed, self._alarmed = 0.0, False, False
        self._notes: Notes | None = None
        self._known: dict[int, Note] = {}
        self._heard: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, world: World) -> None:
        """Every rank calls it. Where the run directory takes no notes, ranks are not watched, which a message says."""
        attempt = world.from_main(str(time.time_ns()))
        self._note = Note(world.rank, attempt, socket.gethostname(), os.getpid())
        try:
            notes = Notes(self._logs, world.rank, world.size, attempt)
            notes.write(self._note)
            self._stacks = os.open(self._path("stacks"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            print(f"{self._logs} takes no files ({error}): hangs will not be noticed", file=sys.stderr, flush=True)
            return
        self._known = dict(enumerate(world.gather(self._note)))  # and all notes are there now
        self._notes = notes

    def report_failure(self) -> None:
        """A collective has failed: finds out who is missing, tells, and ends the process. Returns only where ranks are
        not watched."""
        if self._notes is not None:
            self._failed = True
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self._leave_early()
            if self._notes is not None:
                self._look(self._notes)
                if self._timeout:
                    # From a thread in C: where one of ours keeps the interpreter's lock for ever, no Python runs here.
                    faulthandler.dump_traceback_later(self._timeout, file=self._stacks)
            time.sleep(ALARMED if self._alarmed or self._failed else min(CALM, self._timeout / 4 or CALM))

    def _leave_early(self) -> None:
        """Asked to stop, and held up in something before the first step: nothing would be lost."""
        if not self._signalled and self._stop.arrived():
            self._signalled = time.monotonic()
        if self._signalled and not self._place.unsaved and time.monotonic() - self._signalled > EARLY:
            reason = f"a signal asked the run to stop before its first step, at '{self._place.label}'; start it again"
            self._end("requeue", saved_step(self._run_dir), reason)

    def _look(self, notes: Notes) -> None:
        trouble = self._failed or 0 < self._timeout < self._place.seconds()
        if trouble != self._note.trouble or (trouble and not notes.alarm):
            with suppress(OSError):  # a full disk; the others will notice by themselves
                notes.set_alarm(trouble)
        alarmed = trouble or notes.alarm
        if (alarmed and not self._alarmed) or (trouble and not self._note.trouble):
            with suppress(OSError):
                self._dump()
            self._heard.clear()
        self._alarmed = alarmed
        if alarmed:
            place, beat = self._place, self._note.beat + 1
            self._note = dataclasses.replace(
                self._note, trouble=trouble, beat=beat, count=place.count, label=place.label, seconds=place.seconds()
            )
            with suppress(OSError):
                notes.write(self._note)
        if trouble:
            self._judge(notes)

    def _dump(self) -> None:
        os.write(self._stacks, f"=== {datetime.now(UTC).isoformat(timespec='seconds')}, {self._place.label}\n".encode())
        faulthandler.dump_traceback(self._stacks)
        begun, last = flight.dump(self._path("flight.json"))
        self._note = dataclasses.replace(self._note, begun=begun, last=last)

    def _judge(self, notes: Notes) -> None:
        if outcome := self._outcome():  # another rank's: this one's trouble is the consequence
            self._leave(outcome["outcome"], f"this rank ends with the launch; {self._run_dir / OUTCOME} says why")
        now = time.monotonic()
        self._known |= notes.read() | {self._note.rank: self._note}
        for rank, note in self._known.items():
            if note.beat != self._heard.get(rank, (-1, now))[0]:
                self._heard[rank] = note.beat, now
        silent = {rank for rank, (_, heard) in self._heard.items() if now - heard > SILENCE}
        speaking = {rank: note for rank, note in self._known.items() if rank not in silent}
        if all(self._is_stuck(note) for note in speaking.values()) and self._note.rank == min(speaking):
            found = verdict(self._known, silent, self._note)
            what = "a collective failed" if self._failed else f"hang: nothing has moved for {self._timeout:.0f} s"
            files = f"stacks and last collectives: {self._logs}/rank-*.stacks and rank-*.flight.json"
            self._end("error", last_step(self._run_dir), f"{what}; {found}; {files}. {REMEDY}")

    def _is_stuck(self, note: Note) -> bool:
        """Once a collective has failed, nobody who waits has to wait for the time-out as well."""
        return note.trouble or (self._failed and note.seconds > SILENCE)

    def _outcome(self) -> dict:
        try:
            return read_outcome(self._run_dir)
        except (OSError, ValueError):  # being written
            return {}

    def _end(self, outcome: str, step: int, reason: str) -> NoReturn:
        """Ends the process with that outcome, unless there is one already."""
        try:
            if not self._outcome():
                write_outcome(self._run_dir, outcome, step, reason)
        except (OSError, UserError) as error:
            reason += f" ({self._run_dir} takes no {OUTCOME}: {error})"
        self._leave(outcome, reason)

    def _leave(self, outcome: str, reason: str) -> NoReturn:
        # Beside this thread: whoever reads what is printed may have stopped, too.
        telling = threading.Thread(target=_tell, args=(f"{outcome}: {reason}",), daemon=True)
        telling.start()
        telling.join(SILENCE)
        os._exit(EXIT_CODES[outcome])

    def _path(self, kind: str) -> Path:
        return self._logs / f"rank-{self._note.rank}.{kind}"


def _tell(message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
