"""Finished weights, asked and judged: what a model makes of images, and how often it is right."""

from pipeline.predict.answers import features, predict
from pipeline.predict.checkpoint import Checkpoint, View
from pipeline.predict.find import load_checkpoint
from pipeline.predict.runs import Trained, find_weights, load_run

__all__ = ["Checkpoint", "Trained", "View", "features", "find_weights", "load_checkpoint", "load_run", "predict"]
