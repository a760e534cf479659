"""What a run leaves to be read: metrics.jsonl, TensorBoard, the progress bar, recipe.json, outcome.json and more.

Importing this brings no torch, so that tools that only read are quick: `Record`, which writes, is in its own module.
"""

from pipeline.record.classes import CLASSES, keep_classes, read_classes
from pipeline.record.metrics import METRICS, kept_metrics, last_evaluation, last_step, read_metrics
from pipeline.record.outcome import EXIT_CODES, EXIT_USER_ERROR, OUTCOME, forget_outcome, read_outcome, write_outcome
from pipeline.record.recipes import RECIPE, check_same_recipe, decisive_fields, keep_recipe, read_recipe, recipe_of
from pipeline.record.run_dir import LOGS, WEIGHTS, check_writable, code_version, run_of, weights_path

__all__ = [
    "CLASSES",
    "EXIT_CODES",
    "EXIT_USER_ERROR",
    "LOGS",
    "METRICS",
    "OUTCOME",
    "RECIPE",
    "WEIGHTS",
    "check_same_recipe",
    "check_writable",
    "code_version",
    "decisive_fields",
    "forget_outcome",
    "keep_classes",
    "keep_recipe",
    "kept_metrics",
    "last_evaluation",
    "last_step",
    "read_classes",
    "read_metrics",
    "read_outcome",
    "read_recipe",
    "recipe_of",
    "run_of",
    "weights_path",
    "write_outcome",
]
