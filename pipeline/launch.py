"""In and out of a process that trains: launch(), fail() and leave()."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from pipeline.backend import TIMEOUT, Place, StopFlag, World, start
from pipeline.recipe import Runtime
from pipeline.record import EXIT_CODES, EXIT_USER_ERROR, forget_outcome, last_step, read_outcome, write_outcome
from pipeline.watch import Watchdog, keep_log
from shards.errors import UserError


def launch(job: Callable[[World], str], runtime: Runtime, run_dir: Path, dry: bool = False) -> NoReturn:
    """Joins the launch, does the job, leaves: code 0 done, 75 to be started again, 2 the user's error, 1 a defect, a
    hang, or a rank that is gone.

    dry: what is done is only a trial: it is not watched, leaves neither logs nor an outcome, and an earlier one stays.
    """
    stop, place = StopFlag(), Place()
    watchdog = Watchdog(run_dir, stop, place, runtime.hang_timeout)
    try:
        stop.listen()
        if not dry:
            if os.environ.get("RANK", "0") == "0":
                forget_outcome(run_dir)
            keep_log(run_dir)
            watchdog.start()
        # The collectives' own time-out would end the ranks without a word on who is missing.
        timeout = max(TIMEOUT, timedelta(seconds=2 * runtime.hang_timeout))
        world = start(runtime.device, runtime.processes, stop, place, timeout)
        if not dry:
            watchdog.join(world)
        outcome = job(world)
        place.at("leaving")
        dist.barrier()
    except UserError as error:
        fail(watchdog, run_dir, EXIT_USER_ERROR, error, dry)
    except Exception as error:
        traceback.print_exc()
        fail(watchdog, run_dir, EXIT_CODES["error"], error, dry)
    leave(EXIT_CODES[outcome])


def fail(watchdog: Watchdog, run_dir: Path, code: int, error: Exception, dry: bool) -> NoReturn:
    """Says why and leaves, waiting for nobody: other ranks may be stuck in a collective that this one has left.

    The first rank's reason stays in outcome.json; what others fail with is often only its consequence. Where a
    collective failed, the watchdog finds out whose fault it is.
    """
    if of_collective(error):
        watchdog.report_failure()
    reason = str(error) if code == EXIT_USER_ERROR else f"{type(error).__name__}: {error}"
    print(f"error: {reason}", file=sys.stderr, flush=True)
    try:
        if not dry and not read_outcome(run_dir):
            write_outcome(run_dir, "error", last_step(run_dir), reason)
    except (OSError, UserError) as error:
        print(f"error: {run_dir} takes no outcome.json: {error}", file=sys.stderr, flush=True)
    leave(code)


def of_collective(error: BaseException | None) -> bool:
    """Whether it comes from talking to other ranks: gloo's are plain RuntimeErrors, and others are made of them."""
    while error is not None:
        if isinstance(error, dist.DistError) or "third_party/gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> NoReturn:
    """Exits. Gloo processes sometimes abort (-6) at interpreter exit, whatever is destroyed before: they skip it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
