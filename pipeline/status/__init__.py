"""What the files of a run, or of a chain of them, tell of it, whatever became of it. Nothing here imports torch."""

from pipeline.status.facts import Commit, Facts, read_facts
from pipeline.status.progress import Best, Progress, best_evaluation, progress_of, seconds_of
from pipeline.status.stages import Chain, Stage, check_is_run, find_runs, labels, read_chain
from pipeline.status.state import STATES, State, chain_state, state_of

__all__ = [
    "STATES",
    "Best",
    "Chain",
    "Commit",
    "Facts",
    "Progress",
    "Stage",
    "State",
    "best_evaluation",
    "chain_state",
    "check_is_run",
    "find_runs",
    "labels",
    "progress_of",
    "read_chain",
    "read_facts",
    "seconds_of",
    "state_of",
]
