"""fit(): the training loop; launch() and leave(): in and out of a process that trains.

A checkpoint of a step is taken before the evaluation of that step; a run that resumes there evaluates first.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from safetensors.torch import save as as_safetensors

from pipeline.backend import Stepped, World, start
from pipeline.data.batch import Batch
from pipeline.data.stream import evaluation_batches
from pipeline.preflight import dry_run
from pipeline.prepare import load, prepare
from pipeline.recipe import Recipe, Runtime, flatten
from pipeline.record import forget_outcome, last_step, read_outcome, weights_path, write_outcome
from pipeline.run import Run
from shards.crop import has_crop_decode
from shards.durable import atomic_file
from shards.errors import UserError

EXIT_CODES = {"done": 0, "requeue": 75}
EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
WHOLE_IMAGES = (
    "augment.decode fast decodes whole images here, to the same pixels, more slowly: crop decoding was not built; "
    "install libjpeg-turbo's headers (Debian: libjpeg62-turbo-dev) and this package again"
)


def fit(recipe: Recipe, world: World) -> str:
    """Trains the recipe to its end, from its newest checkpoint where there is one; "done", or "requeue" when stopped.
    A dry run is done before the first step, and leaves no outcome.

    Raises UserError before the first step for whatever cannot work.
    """
    if world.is_main and not recipe.dry_run:
        forget_outcome(Path(recipe.run_dir))
    run = prepare(recipe, world)
    if world.is_main:
        print(describe(run), flush=True)
    outcome = dry_run(run) if recipe.dry_run else train(run)
    run.learner.backend.close()
    return outcome


def describe(run: Run) -> str:
    """What is trained, where, on how much, in which order, and from where on."""
    recipe, world, plan, backend = run.recipe, run.world, run.input.stream.plan, run.learner.backend
    share = plan.global_batch // world.size // recipe.data.accumulation
    return (
        f"{recipe.model.name}: {backend.num_parameters() / 1e6:.2f} M parameters in {recipe.runtime.precision}, "
        f"{backend.name} on {world.size} x {world.device.type}; {plan.num_samples:,} samples; a step takes "
        f"{plan.global_batch} = {world.size} ranks x {recipe.data.accumulation} micro-batches x {share}; steps "
        f"{run.progress.start} to {run.durations.total}, {plan.batches_per_epoch} an epoch\n"
        f"{run.input.stream.describe()}"
        + ("" if recipe.augment.decode == "exact" or has_crop_decode() else f"\n{WHOLE_IMAGES}")
    )


def train(run: Run) -> str:
    """The loop. Each rank runs it in step with the others."""
    learner, every, total = run.learner, run.durations, run.durations.total
    start = run.progress.start
    streaming = run.input.stream.open(start, total)
    with run.record.open(start, total), run.checkpoints.settled(), run.telemetry.profile.open(), streaming as batches:
        if due(start, every.evaluate, total) and not evaluate(run, start):
            return stop(run, start)
        for step in range(start, total):
            with run.record.meter.waiting():
                micro_batches = next(batches)
            run.quarantine.note(micro_batches, step + 1)
            learner.backend.set_lr(learner.schedule(step))
            mixed, done = [run.input.augment(batch) for batch in micro_batches], step + 1
            run.telemetry.samples(done, mixed[0])
            stepped = learner.backend.step(learner.criterion, mixed)
            kept = settle(run, done, stepped, micro_batches)
            run.record.step(done, kept)
            run.telemetry.profile.step()
            if due(done, every.log, total) and stepped.applied:
                log(run, done, stepped)
            if run.quarantine.poll():
                return stop(run, done)
            if due(done, every.save, total):
                save(run, done)
            if due(done, every.evaluate, total) and not evaluate(run, done):
                return stop(run, done)
        return finish(run)


def settle(run: Run, done: int, stepped: Stepped, batches: Sequence[Batch]) -> bool:
    """The average follows a sound step; one that is not finite is passed over; one whose loss leaps up takes the run
    back to its newest checkpoint, from where it goes on with the batches after this one. Whether the step stays.

    Raises UserError where that happens more often than the recipe allows.
    """
    if not stepped.applied:
        run.skips.note(done, stepped, batches, "the weights stay as they were")
    elif run.spikes.met(stepped.loss.item()):
        run.checkpoints.wait()
        path = run.checkpoints.newest()
        back = f"the weights are those of {path.name} again" if path else "there is no checkpoint yet, the run goes on"
        run.skips.note(done, stepped, batches, f"a spike, above {run.spikes.limit():.4g}: {back}")
        if path:
            load(run, path)
        return not path
    elif run.learner.ema:
        run.learner.ema.update()
    return stepped.applied


def due(step: int, every: int, total: int) -> bool:
    """Whether what happens every `every` steps, and at the end, happens after `step` of them."""
    return step > 0 and (step % every == 0 or step == total)


def log(run: Run, done: int, stepped: Stepped) -> None:
    """One line of metrics."""
    values = {
        "epoch": done / run.input.stream.plan.batches_per_epoch,
        "loss": stepped.loss.item(),
        "lr": run.learner.schedule(done - 1),
        "grad_norm": stepped.grad_norm.item(),
    }
    run.record.metrics(done, values, run.telemetry.figures)


def evaluate(run: Run, done: int) -> bool:
    """Evaluates into the record; False where a rank was told to stop before the end of it."""
    samples, batch, loading = run.input.validation, run.recipe.evaluation.batch, run.input.stream.loading
    with run.record.meter.paused(), evaluation_batches(samples, batch, run.world, loading) as batches:
        watched = run.record.watch(batches, len(samples.reader) / run.world.size / batch)
        values = run.learner.evaluator(run.quarantine.watch(watched, done))
    if values is None:
        return False
    run.quarantine.poll()
    better = run.best.add(done, values)
    run.record.evaluation(done, run.recipe.data.val, values | run.best.steps())
    with run.record.meter.paused():
        run.telemetry.maps(done)
    for name, score in better.items():
        # One key, for safetensors writes several in any order.
        export(run, name, f"best_{name}", {"best": json.dumps({"step": score.step, score.metric: score.value})})
    return True


def save(run: Run, done: int) -> None:
    """Saves a checkpoint of `done` steps, unless there is one, or the last step was skipped: where training has
    diverged, sound checkpoints would be pruned for useless ones. It may be committed behind the steps that follow."""
    if done in (run.progress.saved, run.skips.latest):
        return
    began = time.perf_counter()
    run.record.flush()
    state = {
        "data": run.input.stream.state(done),
        "ema_updates": run.learner.ema.num_updates if run.learner.ema else 0,
        "losses": list(run.spikes.losses),
        "seconds": run.progress.seconds(),
        "kept_seconds": run.record.meter.kept_seconds,
        "world": run.world.size,
        "strategy": run.learner.backend.name,
        "commit": run.progress.commit,
        "recipe": flatten(run.recipe),
    }
    run.checkpoints.save(done, run.learner.backend, run.learner.averages(), state)
    run.progress.saved = done
    seconds = time.perf_counter() - began
    run.progress.save_seconds += seconds
    run.record.saved(done, seconds)


def stop(run: Run, done: int) -> str:
    """Saves, and asks to be started again."""
    if done:
        save(run, done)
    run.checkpoints.wait()
    if run.world.is_main:
        write_outcome(run.run_dir, "requeue", done, "a signal asked the run to stop; start it again to go on")
    return "requeue"


def finish(run: Run) -> str:
    """Writes the weights to hand over, and the outcome."""
    for name in ("model", "ema") if run.learner.ema else ("model",):
        export(run, name, name, {"format": "pt"})
    run.checkpoints.wait()
    run.checkpoints.wait_for_uploads()
    if run.world.is_main:
        images = run.durations.total * run.recipe.data.global_batch
        reason = f"trained for {run.recipe.schedule.length}"
        spent = {"seconds": run.progress.seconds(), "save_seconds": run.progress.save_seconds}
        write_outcome(run.run_dir, "done", run.durations.total, reason, images=images, **spent)
    run.world.barrier()
    return "done"


def export(run: Run, variant: str, name: str, metadata: dict[str, str]) -> None:
    """RUN/weights/NAME.safetensors: the whole model, as timm names its weights, or its average (variant "ema")."""
    with run.learner.ema.swap() if variant == "ema" and run.learner.ema else nullcontext():
        weights = run.learner.backend.full_weights()
        if run.world.is_main:  # within: the weights may share the memory of the model
            path = weights_path(run.run_dir, name)
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as file:
                file.write(as_safetensors({key: tensor.contiguous() for key, tensor in weights.items()}, metadata))


def run(recipe: Recipe) -> NoReturn:
    """The main of a recipe file: trains it and exits with its outcome's code."""
    launch(lambda world: fit(recipe, world), recipe.runtime, Path(recipe.run_dir), recipe.dry_run)


def launch(job: Callable[[World], str], runtime: Runtime, run_dir: Path, dry: bool = False) -> NoReturn:
    """Joins the launch, does the job, leaves: code 0 done, 75 to be started again, 2 the user's error, 1 a defect.

    dry: what is done is only a trial, and an earlier outcome stays.
    """
    try:
        if os.environ.get("RANK", "0") == "0" and not dry:
            forget_outcome(run_dir)
        outcome = job(start(runtime.device, runtime.processes))
    except UserError as error:
        fail(run_dir, EXIT_USER_ERROR, str(error))
    except Exception as error:
        traceback.print_exc()
        fail(run_dir, EXIT_DEFECT, f"{type(error).__name__}: {error}")
    dist.barrier()
    leave(EXIT_CODES[outcome])


def fail(run_dir: Path, code: int, reason: str) -> NoReturn:
    """Says why and leaves, waiting for nobody: other ranks may be stuck in a collective that this one has left.

    The first rank's reason stays in outcome.json; what others fail with is often only its consequence.
    """
    print(f"error: {reason}", file=sys.stderr, flush=True)
    try:
        if not read_outcome(run_dir):
            write_outcome(run_dir, "error", last_step(run_dir), reason)
    except (OSError, UserError) as error:
        print(f"error: {run_dir} takes no outcome.json: {error}", file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exits. Gloo processes sometimes abort (-6) at interpreter exit, whatever is destroyed before: they skip it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
