"""Several stages as one pipeline under one launch: what is finished is skipped, what was interrupted is resumed, what
other inputs have made stale is done again beside the old.

Stages share the process group; each builds a backend of its own. Weights are handed over as a safetensors file.
"""

from pipeline.chain.command import USAGE, run, take_options
from pipeline.chain.decide import Options
from pipeline.chain.evaluate import Evaluate, Evaluating
from pipeline.chain.export import Export, Exporting
from pipeline.chain.stage import Stage, check_graph
from pipeline.chain.train import Train
from pipeline.chain.work import do_all

__all__ = [
    "USAGE",
    "Evaluate",
    "Evaluating",
    "Export",
    "Exporting",
    "Options",
    "Stage",
    "Train",
    "check_graph",
    "do_all",
    "run",
    "take_options",
]
