"""From the notes of the ranks to one line that names those that did not arrive."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pipeline.watch.notes import Note

STATES = {"T": "is stopped (SIGSTOP)", "t": "is held by a debugger", "D": "waits for a disk or a network file system"}


def verdict(notes: Mapping[int, Note], silent: Collection[int], own: Note) -> str:
    """Which ranks did not arrive, where they are, and where the others wait.

    notes: of all ranks, as known; silent: those of them that give no sign of life. Without any, ranks that have begun
    fewer collectives of a group than others did not arrive; without any, those at an earlier place.
    """
    there = [notes[rank] for rank in sorted(notes) if rank not in silent]
    behind = _behind(there) if not silent else set()
    missing = sorted({*silent, *behind})
    if not missing:
        return f"no rank is behind the others: {_places(there)}"
    name = "rank" if len(missing) == 1 else "ranks"
    told = [f"{_who(notes[rank])} {_state(notes[rank], own)}" for rank in sorted(silent)]
    told += [f"{_who(notes[rank])} is still at '{notes[rank].label}'" for rank in sorted(behind)]
    shown = told[:8] + ([f"and {len(told) - 8} more"] if len(told) > 8 else [])
    others = [note for note in there if note.rank not in missing]
    waiting = f"; {_places(others)}" if others else ""
    return f"{name} {numbers(missing)} did not arrive: {', '.join(shown)}{waiting}"


def numbers(ranks: Iterable[int]) -> str:
    """0, 2-7"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _behind(there: list[Note]) -> set[int]:
    found: set[int] = set()
    for name in {name for note in there for name in note.begun}:
        begun = {note.rank: note.begun[name] for note in there if name in note.begun}
        found |= {rank for rank, number in begun.items() if number < max(begun.values())}
    latest = max((note.count for note in there), default=0)
    return found or {note.rank for note in there if note.count < latest}


def _who(note: Note) -> str:
    return f"rank {note.rank} (pid {note.pid} on {note.host})"


def _state(note: Note, own: Note) -> str:
    """Of a rank that gives no sign of life."""
    if note.host != own.host:
        return "gives no sign of life: it, its machine or the way there is gone"
    try:
        status = Path(f"/proc/{note.pid}/stat").read_text()
    except OSError:
        return "is dead (killed? the kernel's log tells of memory that ran out)"
    letter = status.rpartition(")")[2].split()[0]
    if letter in "ZX":
        return "is dead (killed? the kernel's log tells of memory that ran out)"
    return STATES.get(letter, "gives no sign of life")


def _places(notes: list[Note]) -> str:
    """rank 0 stands at 'X', ranks 2-7 stand at 'Y'"""
    places: dict[str, list[int]] = {}
    for note in notes:
        places.setdefault(f"'{note.label}'" + (f", {note.last}" if note.last else ""), []).append(note.rank)
    texts = [
        f"rank {ranks[0]} stands at {place}" if len(ranks) == 1 else f"ranks {numbers(ranks)} stand at {place}"
        for place, ranks in places.items()
    ]
    return ", ".join(texts[:4] + ([f"and others at {len(texts) - 4} more places"] if len(texts) > 4 else []))
