"""attempts.jsonl: a JSON object for every time that a run was started: `started` (seconds since 1970) and `step`."""

import json
import os
import time
from pathlib import Path

ATTEMPTS = "attempts.jsonl"


def begin_attempt(run_dir: Path, step: int) -> float:
    """Notes that the run goes on from `step` now, on the disk; when it was first started."""
    path = run_dir / ATTEMPTS
    with path.open("a") as file:
        file.write(json.dumps({"started": time.time(), "step": step}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    with path.open() as file:
        return json.loads(file.readline())["started"]
