"""The files of one run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.record import LOGS, METRICS, OUTCOME, RECIPE
from pipeline.status.files import modified, read_object, read_objects

# As the modules that write them name them, which import torch.
ATTEMPTS, QUARANTINE, SKIPPED = "attempts.jsonl", "quarantine.jsonl", "skipped.jsonl"
CHECKPOINTS, COMMITTED, PROVENANCE = "checkpoints", "COMMITTED", "provenance.json"
EVALUATION = "evaluation.json"
MAX_STEPS = 2**53  # floats count so far

Line = dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint; `time` in seconds since 1970."""

    step: int
    time: float
    path: Path


@dataclass(frozen=True)
class Facts:
    """What the files of a run directory say; empty where they are missing. `recipe`: field -> value. `steps` and
    `evaluations`: the two kinds of lines of metrics.jsonl. `modified`: when the run last wrote, in seconds since 1970.
    """

    path: Path
    recipe: Line
    steps: list[Line]
    evaluations: list[Line]
    attempts: list[Line]
    outcome: Line
    evaluation: Line
    quarantine: list[Line]
    skipped: list[Line]
    commit: Commit | None
    logs: Path
    modified: float

    @property
    def begun(self) -> bool:
        """A stage of a chain that does not train notes at first what goes into it."""
        noted = (self.path / LOGS).is_dir() or (self.path / PROVENANCE).is_file()
        return bool(self.recipe or self.attempts or self.steps or self.commit or noted)


def read_facts(path: Path) -> Facts:
    """Of a run directory; also of one that is not there."""
    lines = [line for line in read_objects(path / METRICS) if _is_step(line.get("step"))]
    logs = path / LOGS if (path / LOGS).is_dir() else path.absolute().parent / LOGS  # a chain keeps those of its stages
    names = (METRICS, ATTEMPTS, RECIPE, OUTCOME, PROVENANCE)
    written = [*(path / name for name in names), logs / "rank-0.log"]
    commit = _newest(path / CHECKPOINTS)
    return Facts(
        path=path,
        recipe=read_object(path / RECIPE),
        steps=[line for line in lines if "split" not in line],
        evaluations=[line for line in lines if "split" in line],
        attempts=read_objects(path / ATTEMPTS),
        outcome=read_object(path / OUTCOME),
        evaluation=read_object(path / EVALUATION),
        quarantine=read_objects(path / QUARANTINE),
        skipped=read_objects(path / SKIPPED),
        commit=commit,
        logs=logs,
        modified=max([*map(modified, written), commit.time if commit else 0.0]),
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_STEPS


def _newest(checkpoints: Path) -> Commit | None:
    found = sorted(checkpoints.glob(f"step-*[0-9]/{COMMITTED}"), reverse=True)
    numbered = [(path, path.parent.name.removeprefix("step-")) for path in found]
    return next((Commit(int(step), modified(path), path.parent) for path, step in numbered if step.isdecimal()), None)
