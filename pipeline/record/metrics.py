"""metrics.jsonl: a JSON object a line, a logged step or an evaluation ("split")."""

import json
from pathlib import Path

from pipeline.record.json_files import read_lines
from shards.durable import replace_text

METRICS = "metrics.jsonl"


def kept_metrics(run_dir: Path, step: int) -> list[dict]:
    """The lines that a run which resumes at `step` goes on from: those to `step`, but for its evaluation, which a
    checkpoint of that step precedes."""
    lines = read_metrics(run_dir)
    return [line for line in lines if line["step"] < step or (line["step"] == step and "split" not in line)]


def cut_metrics(run_dir: Path, step: int) -> None:
    """Drops what `kept_metrics` does not give, and a torn last line."""
    kept = kept_metrics(run_dir, step)
    replace_text(run_dir / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def last_evaluation(run_dir: Path) -> dict[str, float]:
    """The last evaluation in the metrics of a finished run."""
    return [line for line in read_metrics(run_dir) if "split" in line][-1]


def last_step(run_dir: Path) -> int:
    """The last step in the metrics of a run; 0 where there is none."""
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def read_metrics(run_dir: Path) -> list[dict]:
    """The whole lines of a run's metrics."""
    return read_lines(run_dir / METRICS)
