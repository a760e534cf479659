"""outcome.json: how a run ended, for launch scripts; launchers hide exit codes."""

import json
from pathlib import Path

from pipeline.record.json_files import read_json
from pipeline.record.run_dir import unwritable
from shards.durable import replace_text

OUTCOME = "outcome.json"
EXIT_CODES = {"done": 0, "requeue": 75, "error": 1}
"""Of a rank, by outcome. A mistake of the user's, which is an error as well, has EXIT_USER_ERROR."""
EXIT_USER_ERROR = 2


def write_outcome(run_dir: Path, outcome: str, step: int, reason: str, **more: float) -> None:
    """outcome: "done", "requeue" or "error"; launch scripts read it, for launchers hide exit codes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / OUTCOME, json.dumps({"outcome": outcome, "step": step, "reason": reason, **more}) + "\n")


def forget_outcome(run_dir: Path) -> None:
    """Removes the outcome of an earlier attempt: a run that is killed leaves none. Raises UserError where it cannot."""
    try:
        (run_dir / OUTCOME).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(run_dir, error) from error


def read_outcome(run_dir: Path) -> dict:
    """The last outcome; {} where there is none. Raises UserError where it is damaged."""
    path = run_dir / OUTCOME
    return read_json(path, dict) if path.exists() else {}
