"""torch's flight recorder: the last collectives of this process, over gloo and over NCCL."""

import json
import pickle
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

PATIENCE = 5.0
OURS = "/pipeline/"


def dump(path: Path) -> tuple[dict[str, int], str]:
    """Writes what is recorded as JSON. Name of each group -> how many collectives were begun there; and which was begun
    last. ({}, "") where nothing is recorded, or the recorder does not answer, as may be where NCCL hangs."""
    found: list[tuple[dict[str, int], str]] = [({}, "")]

    def work() -> None:
        recorded = _recorded()
        entries = [entry for dumped in recorded.values() for entry in dumped["entries"] if not entry["is_p2p"]]
        if entries:
            found.append((_begun(entries), _told(max(entries, key=lambda entry: entry["time_created_ns"]))))
            with suppress(OSError):
                path.write_text(json.dumps(recorded, indent=1, default=str))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[-1]


def _recorded() -> dict[str, Any]:
    """By backend. The pickles are made here and now by torch; as JSON of its own they would lack the stack frames."""
    library = dist.distributed_c10d.torch._C._distributed_c10d
    found = {}
    for backend, name in (("gloo", "_dump_fr_trace"), ("nccl", "_dump_nccl_trace")):
        make = getattr(library, name, None)  # private: another torch may not have it
        dumped = pickle.loads(make()) if make else {}
        if dumped.get("entries"):
            found[backend] = dumped
    return found


def _begun(entries: list[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries:
        name = _group(entry)
        found[name] = max(found.get(name, 0), entry["collective_seq_id"])
    return found


def _told(entry: dict[str, Any]) -> str:
    what, number, ended = entry["profiling_name"], entry["collective_seq_id"], entry["retired"]
    state = "after" if ended else "in"
    return f"{state} {what} {entry['input_sizes']}, number {number} of group {_group(entry)}{_caller(entry)}"


def _group(entry: dict[str, Any]) -> str:
    return " ".join(entry["process_group"])


def _caller(entry: dict[str, Any]) -> str:
    """The innermost of our functions that led to it."""
    for frame in entry.get("frames", ()):
        if OURS in frame["filename"]:
            place = f"{OURS.strip('/')}/{frame['filename'].rpartition(OURS)[2]}"
            return f" from {frame['name']} ({place}:{frame['line']})"
    return ""
