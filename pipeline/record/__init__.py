"""What a run leaves to be read: metrics.jsonl, TensorBoard, the progress bar, recipe.json, outcome.json and more."""

from pipeline.record.attempts import Setting, hardware
from pipeline.record.metrics import kept_metrics, last_evaluation, last_step, read_metrics
from pipeline.record.outcome import EXIT_CODES, EXIT_USER_ERROR, OUTCOME, forget_outcome, read_outcome, write_outcome
from pipeline.record.recipes import RECIPE, check_same_recipe, keep_recipe, read_recipe
from pipeline.record.record import Record
from pipeline.record.run_dir import check_writable, code_version, weights_path

__all__ = [
    "EXIT_CODES",
    "EXIT_USER_ERROR",
    "OUTCOME",
    "RECIPE",
    "Record",
    "Setting",
    "check_same_recipe",
    "check_writable",
    "code_version",
    "forget_outcome",
    "hardware",
    "keep_recipe",
    "kept_metrics",
    "last_evaluation",
    "last_step",
    "read_metrics",
    "read_outcome",
    "read_recipe",
    "weights_path",
    "write_outcome",
]
