"""--dry-run: the report."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress

import torch

from pipeline.footprint import activations
from pipeline.footprint import measure as measure_footprint
from pipeline.models.build import make_model
from pipeline.preflight import cost, plan
from pipeline.preflight.trial import measure
from pipeline.run import Run
from pipeline.telemetry.flops import Flops


def dry_run(run: Run) -> str:
    """Prints the report (on rank 0) and leaves nothing in the run directory; "done". Every rank calls it. (Lines of
    quarantine.jsonl and skipped.jsonl that lie past the newest checkpoint are dropped, as a start drops them.)

    What needs no measurement is printed first: memory may not suffice for the rest.
    """
    recipe, classes = run.recipe, run.input.augment.num_classes
    micro_batch = run.input.stream.layout.sizes[-1]
    with torch.device("meta"):
        model = make_model(recipe, classes)
    footprint = measure_footprint(recipe, model)
    kept = activations(recipe, classes, micro_batch)
    _say(run, plan.recipe(recipe))
    _say(run, plan.parameters(run, model))
    _say(run, plan.learning_rate(run))
    _say(run, plan.batches(run))
    _say(run, cost.memory(run, footprint, kept))
    _say(run, plan.data(run, os.cpu_count() or 1))
    trial = measure(run)
    _say(run, cost.speed(run, trial))
    per_epoch = run.input.stream.plan.batches_per_epoch
    flops = Flops.of(recipe, classes, micro_batch).mean(run.progress.start / per_epoch, run.durations.total / per_epoch)
    _say(run, cost.whole(run, trial, flops))
    _say(run, cost.disk(run, footprint, shutil.disk_usage(run.run_dir).free))
    run.world.barrier()
    if run.world.is_main:
        print("dry run: nothing was trained and nothing written; leave --dry-run out to start", flush=True)
        with suppress(OSError):  # it is not empty
            run.run_dir.rmdir()
    return "done"


def _say(run: Run, lines: Iterable[str]) -> None:
    """A title, and the lines below it."""
    if run.world.is_main:
        title, *rest = lines
        print("\n".join([title, *(f"  {line}" for line in rest)]), flush=True)
