"""A thread beside the training of each rank: a hang, and a rank that died, are named; and a log a rank.

RUN/logs holds `rank-N.log` (what the rank printed), and after trouble `rank-N.stacks` (all threads of the rank),
`rank-N.flight.json` (its last collectives) and `rank-N.place.json` (where it stood).
"""

from pipeline.watch.log import keep_log
from pipeline.watch.watchdog import Watchdog

__all__ = ["Watchdog", "keep_log"]
